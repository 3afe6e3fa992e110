"""The page in Chromium: charts are drawn, nothing fails, and a phone need not scroll sideways."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from test_reporting_page import images, made

from offramp.calibration.calibrating import calibrate
from offramp.reporting.page import report

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
const root = document.documentElement;
function tell() {
  parent.postMessage({
    faults,
    drawn: Number(root.dataset.drawn || 0),
    plots: [...document.querySelectorAll(".chart")].filter((each) => each.querySelector(".point")).length,
    points: document.querySelectorAll("#frontier-chart .point").length,
    choice: (document.querySelector("#frontier-chart .xtitle") || {}).textContent,
    width: innerWidth,
    needs: root.scrollWidth,
    outside: [...document.querySelectorAll("body *")].filter((each) =>
      !each.closest(".scroll, svg, .svg-container, pre") && each.getBoundingClientRect().right > innerWidth + 1
    ).map((each) => each.outerHTML.slice(0, 80)),
  }, "*");
}
addEventListener("load", () => setTimeout(() => {
  const second = document.querySelectorAll(".switch input")[1];
  if (second) second.click();
  setTimeout(tell, 1500);
}, 1500));
</script>"""
FRAME = """<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="said"></pre><script>
addEventListener("message", (event) => {{ document.getElementById("said").textContent = JSON.stringify(event.data); }});
</script>"""


@pytest.mark.parametrize("width", [1280, 390])
def test_it_draws_and_fits(tmp_path: Path, width: int) -> None:
    trace = made(names=("a class with quite a long name", "b", "averyveryverylongnamewithoutanyspaceinsideit", "d"))
    plan = calibrate(trace, risk="disagreement", at_most=0.1)
    page = report(trace, plan, tmp_path / "page.html", data=images(300), others={"cheap": calibrate(trace, budget=0.5)})
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
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found
    said = json.loads(unescape(found[1]))
    assert said["faults"] == []
    assert said["drawn"] == said["plots"] == 4
    assert said["points"] > 10
    assert "milliseconds at batch 1" in said["choice"]
    assert said["width"] == width
    assert said["needs"] <= width
    assert said["outside"] == []
