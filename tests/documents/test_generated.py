"""Pages that are made from the code are up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

MAKERS = Path(__file__).parents[2] / "docs" / "generate"


@pytest.mark.parametrize("name", ["gates", "recipes"])
def test_a_page_is_what_its_maker_writes(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"page_of_{name}", MAKERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), (
        f"run: python docs/generate/{name}.py"
    )
