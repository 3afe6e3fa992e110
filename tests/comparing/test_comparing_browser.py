"""The page of a comparison in Chromium: all charts are drawn, nothing fails, and a phone need not scroll sideways."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from made_up import NASTY, comparison

from offramp.comparing.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

SPY = """<script>
const faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...said) => faults.push(said.join(" "));
const root = document.documentElement, look = (what) => document.querySelector("#trade-off " + what);
const plots = [];
function tell() {
  const names = look(".legend").getBoundingClientRect(), plane = look(".xy .gridlayer, .gridlayer");
  parent.postMessage({
    faults, plots,
    drawn: Number(root.dataset.drawn || 0),
    leaving: document.querySelectorAll("#leaving .point").length,
    legend: [names.top, names.bottom], plane: plane.getBoundingClientRect().bottom,
    height: plane.getBoundingClientRect().height,
    scrolls: Boolean(look(".scrollbar") && look(".scrollbar").getBoundingClientRect().height > 0),
    names: document.querySelectorAll("#trade-off .legendtext").length,
    needs: root.scrollWidth, width: innerWidth,
    outside: [...document.querySelectorAll("body *")].filter((each) =>
      !each.closest(".scroll, svg, .svg-container, pre") && each.getBoundingClientRect().right > innerWidth + 1
    ).map((each) => each.outerHTML.slice(0, 80)),
  }, "*");
}
addEventListener("load", () => setTimeout(async () => {
  for (const radio of document.querySelectorAll("#curves .switch input")) {
    radio.click();
    await new Promise((done) => setTimeout(done, 500));
    plots.push(document.querySelectorAll("#trade-off .scatterlayer .trace").length);
  }
  tell();
}, 1500));
</script>"""
FRAME = """<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="said"></pre><script>
addEventListener("message", (event) => {{ document.getElementById("said").textContent = JSON.stringify(event.data); }});
</script>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_and_fits(tmp_path: Path, width: int) -> None:
    found = comparison(8, 3, ("own", NASTY))
    page = write_page(found, tmp_path / "page.html")
    page.write_text(page.read_text(encoding="utf-8").replace("<head>", "<head>" + SPY, 1), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--window-size=1400,1000"]
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    match = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match
    assert match[1], "the page said nothing"
    said = json.loads(unescape(match[1]))
    assert said["faults"] == []
    assert said["drawn"] == 2
    assert said["plots"] == [8 + 8 + 3] * 3  # lines, bands, static networks; the other gates wait for a click
    assert said["leaving"] > 10
    assert said["names"] == 16
    assert said["legend"][0] >= said["plane"]  # below the plot, whole
    assert not said["scrolls"]
    assert said["height"] > 250
    assert said["width"] == width
    assert said["needs"] <= width
    assert said["outside"] == []
