"""The page in Chromium: charts are drawn, nothing fails, and a phone need not scroll sideways."""

from __future__ import annotations

from pathlib import Path

import pytest

import chromium
from offramp.calibration.calibrating import calibrate
from offramp.reporting.page import report
from reported import images, made

pytestmark = chromium.MARKS

ASK = """
async function asked() {
  const second = document.querySelectorAll(".switch input")[1];
  if (second) second.click();
  await new Promise((done) => setTimeout(done, 1500));
  // A busy machine is slow to measure the tables.
  for (let turn = 0; turn < 20 && !document.querySelector(".scroll.wide"); turn += 1) {
    await new Promise((done) => setTimeout(done, 100));
  }
  return {
    plots: [...document.querySelectorAll(".chart")]
      .filter((each) => each.querySelector(".point")).length,
    points: document.querySelectorAll("#frontier-chart .point").length,
    choice: (document.querySelector("#frontier-chart .xtitle") || {}).textContent,
    csv: decodeURIComponent(
      document.querySelector("#exits .csv").href.split(",").slice(1).join(",")),
    wide: document.querySelectorAll(".scroll.wide").length,
  };
}"""


@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_and_fits(tmp_path: Path, width: int) -> None:
    trace = made(
        names=(
            "a class with quite a long name",
            "b",
            "averyveryverylongnamewithoutanyspaceinsideit",
            "d",
        )
    )
    plan = calibrate(trace, risk="disagreement", at_most=0.1)
    page = report(
        trace,
        plan,
        tmp_path / "page.html",
        data=images(300),
        others={"cheap": calibrate(trace, budget=0.5)},
    )
    said = chromium.seen(page, width, ASK)
    assert said["faults"] == []
    assert said["drawn"] == said["plots"] == 4
    assert said["points"] > 10
    assert "milliseconds at batch 1" in said["choice"]
    assert said["csv"].startswith("exit,leaves when,share,rows,"), "a table as CSV"
    assert len(said["csv"].splitlines()) == 1 + len(trace.topology.exits)
    assert "%" not in said["csv"]
    assert bool(said["wide"]) == (width < 500)  # wide tables say so where they have to be scrolled
    assert said["width"] == width
    assert said["needs"] <= width
    assert said["outside"] == []
