"""A page in Chromium, in a frame of some width: what it says of itself, and whether anything failed
or hung over.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]

SPY = """<script>
const faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...said) => faults.push(said.join(" "));
const root = document.documentElement;
ASK
addEventListener("load", () => setTimeout(async () => {
  const more = await asked();
  parent.postMessage({
    ...more, faults,
    drawn: Number(root.dataset.drawn || 0),
    width: innerWidth,
    needs: root.scrollWidth,
    outside: [...document.querySelectorAll("body *")].filter((each) =>
      !each.closest(".scroll, svg, .svg-container, pre")
      && each.getBoundingClientRect().right > innerWidth + 1
    ).map((each) => each.outerHTML.slice(0, 80)),
  }, "*");
}, 1500));
</script>"""
FRAME = """<body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="said"></pre><script>
addEventListener("message", (event) => {{
  document.getElementById("said").textContent = JSON.stringify(event.data);
}});
</script>"""


def seen(page: Path, width: int, ask: str) -> dict[str, Any]:
    """What a page says when it is loaded and drawn: faults, drawn, width, needs, outside, and what
    `ask` adds.

    ask: JavaScript that defines `async function asked()`, which may click and gives an object.
    """
    assert CHROMIUM is not None
    spy = SPY.replace("ASK", ask)
    page.write_text(
        page.read_text(encoding="utf-8").replace("<head>", "<head>" + spy, 1), encoding="utf-8"
    )
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=page.name, width=width))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--window-size=1400,1000",
    ]
    done = subprocess.run(
        [
            CHROMIUM,
            *flags,
            f"--user-data-dir={page.with_name('profile')}",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    match = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert match
    assert match[1], "the page said nothing"
    said: dict[str, Any] = json.loads(unescape(match[1]))
    return said
