"""A command as it was typed, and what a folder holds."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from offramp.cli import app

CALIBRATION = "digits[700:1797:2]"
TEST = "digits[701:1797:2]"


def offramp(*words: object) -> Result:
    """Run `offramp WORDS` in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="offramp")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, but what Python writes for itself."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
