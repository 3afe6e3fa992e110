"""The documentation site is built without a broken link, and every page is in its contents."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGURATION = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_contents() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    # results/index.md leads to these
    pages = {page for page in pages if not re.match(r"results/.*\d\.md", page)}
    assert pages == set(re.findall(r": ([\w/-]+\.md)$", CONFIGURATION, flags=re.MULTILINE))


def test_every_result_is_in_the_list_of_results() -> None:
    index = (ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    results = {page.name for page in (ROOT / "docs" / "results").glob("*-20*.md")}
    assert results == set(re.findall(r"\]\(([\w-]+-20[\d-]+\.md)\)", index))


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "spend the same work on every input" in home
    assert "calibrate" in (tmp_path / "site" / "reference" / "python" / "index.html").read_text(
        encoding="utf-8"
    )
