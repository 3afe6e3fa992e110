"""Pages whose code is run from top to bottom, and prints what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {  # and how many blocks they have at least
    "tour": 12,
    "how-to/choose-a-recipe-and-a-gate": 4,
    "how-to/adapt-the-depth": 6,
    "how-to/answer-in-time": 7,
    "how-to/choose-a-path": 14,
    "how-to/choose-an-engine": 2,
    "how-to/how-many-rows": 2,
    "how-to/make-parts-cheaper": 10,
    "how-to/my-network-already-has-exits": 8,
    "how-to/no-safe-plan": 2,
    "how-to/read-no-further": 5,
    "how-to/search-for-a-cheaper-network": 7,
    "how-to/write-your-own": 9,
    "reference/data": 3,
}


# Each takes more than five seconds. The tour goes through all verbs and stays.
LONG = (
    "how-to/choose-a-path",
    "how-to/make-parts-cheaper",
    "how-to/read-no-further",
    "how-to/search-for-a-cheaper-network",
)


@pytest.mark.filterwarnings("default::offramp._support.notices.Notice")
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in LONG else page for page in PAGES]
)
def test_a_page_runs_and_prints_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    names: dict[str, object] = {"__name__": page}
    text_of_page = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    parts = re.findall(r"```(python|text)\n(.*?)```", text_of_page, flags=re.DOTALL)
    assert len(parts) >= PAGES[page]
    printed = ""
    for index, (language, text) in enumerate(parts):
        if language == "text":
            assert printed == text, f"block {index}"
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(text, f"{page}.md", "exec"), names)
        printed = said.getvalue()


def test_every_page_with_code_is_run() -> None:
    with_code = set()
    for page in DOCS.rglob("*.md"):
        if "```python\n" in page.read_text(encoding="utf-8"):
            with_code.add(str(page.relative_to(DOCS).with_suffix("")))
    assert with_code - {"tutorial"} == set(PAGES), "the tutorial is run by test_tutorial.py"
