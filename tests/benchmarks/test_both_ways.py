"""benchmarks/both_ways.py goes on where it stopped, and counts what it counts in one go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "both_ways.py"


def run(file: Path, *options: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--engine", "torch", "--json", file, *options],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path: Path) -> None:
    stopped = run(tmp_path / "a.json", "--rows", "20500", "--minutes", "0")
    assert stopped[0]["rows"] == 20_000
    resumed = run(tmp_path / "a.json", "--rows", "20500")
    assert resumed[0]["rows"] == 20_500
    assert resumed == run(tmp_path / "b.json", "--rows", "20500")
    assert resumed[0]["differ"] == {"run": 0}
