"""Pages whose code is run from top to bottom, and prints what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {  # and how many blocks they have at least
    "all-of-offramp": 12,
    "own-exits": 8,
    "data": 3,
    "adaptive-computation": 6,
    "along-time": 5,
}


@pytest.mark.filterwarnings("default::offramp._support.notices.Notice")
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_and_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    names: dict[str, object] = {"__name__": page}
    text_of_page = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    parts = re.findall(r"```(python|text)\n(.*?)```", text_of_page, flags=re.DOTALL)
    assert len(parts) > PAGES[page]
    printed = ""
    for place, (language, text) in enumerate(parts):
        if language == "text":
            assert printed == text, f"block {place}"
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(text, f"{page}.md", "exec"), names)
        printed = said.getvalue()
