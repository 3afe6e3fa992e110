"""docs/all-of-offramp.md is run from top to bottom, and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "all-of-offramp.md").read_text(encoding="utf-8")


def test_all_of_offramp_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    names: dict[str, object] = {"__name__": "all_of_offramp"}
    parts = re.findall(r"```(python|text)\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(parts) > 12
    printed = ""
    for place, (language, text) in enumerate(parts):
        if language == "text":
            assert printed == text, f"block {place}"
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(text, "all-of-offramp.md", "exec"), names)
        printed = said.getvalue()
