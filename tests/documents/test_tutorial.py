"""The tutorial is a notebook that runs, and its page shows what it printed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    pytest.importorskip("nbclient")
    spec = importlib.util.spec_from_file_location(
        "tutorial_page", ROOT / "docs" / "generate" / "tutorial.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter, about the event loop
def test_the_notebook_runs_and_its_page_shows_its_cells(maker: ModuleType) -> None:
    text, picture = maker.page(maker.executed())
    written = maker.PAGE.read_text(encoding="utf-8")
    assert picture.startswith(b"\x89PNG")
    assert cells(text) == cells(written), "run: python docs/generate/tutorial.py"
    assert len(cells(text)) >= 8


def cells(page: str) -> list[str]:
    """The code of a page. What it prints may differ in the last digits between machines."""
    return [part.split("```")[0] for part in page.split("```python\n")[1:]]
