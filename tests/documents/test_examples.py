"""Every example runs and says something, and nothing on standard error."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


LONG = ("imagenet_classifiers",)  # runs below
SHORT = [script for script in EXAMPLES if script.stem not in LONG]


@pytest.mark.parametrize("script", SHORT, ids=lambda script: script.stem)
def test_example_runs(script: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capfd.readouterr()
    assert printed.out.strip()
    assert not printed.err.strip()


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_runs_as_a_stranger_would_run_it(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not done.stderr.strip()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
