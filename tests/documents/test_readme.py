"""The README is run as written: its code prints what it says, its commands work."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("offramp ")]


@pytest.fixture
def home(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `data/` is the real data, as a reader of the README has it."""
    (tmp_path / "data").symlink_to(data_dir.resolve())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_ten_lines_print_what_the_readme_says(home: Path) -> None:
    code = blocks("python")[0]
    said = blocks("text")[0]
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    assert printed.getvalue().split() == said.split()
    assert names["y"].logits.shape == (64, 10)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_run_in_order(home: Path) -> None:
    assert len(commands()) >= 6
    for command in commands():
        line = [sys.executable, "-m", "offramp.cli", *command[1:]]
        done = subprocess.run(line, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    assert (home / "report.html").stat().st_size > 100_000


def test_every_command_and_flag_in_the_documents_exists() -> None:
    help_pages = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
    documents = [
        README,
        *(file.read_text(encoding="utf-8") for file in (ROOT / "docs").rglob("*.md")),
    ]
    blocks = [
        block
        for text in documents
        for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
    ]
    used = [
        line
        for block in blocks
        for line in re.findall(r"^(?:\$ )?(offramp [a-z].*)", block, flags=re.MULTILINE)
    ]
    used += [line for text in documents for line in re.findall(r"`(offramp [a-z][^`\n]*)`", text)]
    assert used
    for line in used:
        name, *rest = line.removeprefix("offramp ").split()
        if name in {"is", "makes", "does", "can", "to"}:
            continue
        assert f"\n## offramp {name}\n" in help_pages, line
        page = help_pages.split(f"\n## offramp {name}\n")[1].split("\n## ")[0]
        for flag in (word for word in rest if word.startswith("--")):
            assert flag in page, line


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z-]+)", README, flags=re.M)
    assert {"demo", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert not [
        link for link in links if not link.startswith("http") and not os.path.exists(ROOT / link)
    ]
