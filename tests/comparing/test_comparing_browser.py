"""The page of a comparison in Chromium: all charts are drawn, nothing fails, and a phone need not
scroll sideways.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import chromium
from made_up import NASTY, comparison
from offramp.comparing.page import write_page

pytestmark = chromium.MARKS

ASK = """
async function asked() {
  const look = (what) => document.querySelector("#trade-off " + what), plots = [];
  for (const radio of document.querySelectorAll("#curves .switch input")) {
    radio.click();
    await new Promise((done) => setTimeout(done, 500));
    plots.push(document.querySelectorAll("#trade-off .scatterlayer .trace").length);
  }
  const names = look(".legend").getBoundingClientRect(), plane = look(".xy .gridlayer, .gridlayer");
  return {
    plots,
    leaving: document.querySelectorAll("#leaving .point").length,
    legend: [names.top, names.bottom], plane: plane.getBoundingClientRect().bottom,
    height: plane.getBoundingClientRect().height,
    scrolls: Boolean(look(".scrollbar") && look(".scrollbar").getBoundingClientRect().height > 0),
    names: document.querySelectorAll("#trade-off .legendtext").length,
  };
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_and_fits(tmp_path: Path, width: int) -> None:
    found = comparison(8, 3, ("own", NASTY))
    page = write_page(found, tmp_path / "page.html")
    said = chromium.seen(page, width, ASK)
    assert said["faults"] == []
    assert said["drawn"] == 2
    # lines, bands, static networks; the other gates wait for a click
    assert said["plots"] == [8 + 8 + 3] * 3
    assert said["leaving"] > 10
    assert said["names"] == 16
    assert said["legend"][0] >= said["plane"]  # below the plot, whole
    assert not said["scrolls"]
    assert said["height"] > 250
    assert said["width"] == width
    assert said["needs"] <= width
    assert said["outside"] == []
