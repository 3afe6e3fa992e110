"""benchmarks/devices.py runs from end to end without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "devices.py"


@pytest.mark.slow
def test_a_short_run_on_a_cpu(tmp_path):
    asked = ["--device", "cpu", "--model", "resnet56", "--batch", "1", "4", "--repeats", "1"]
    asked += ["--engine", "torch", "torch:cuda_graphs"]
    out = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, SCRIPT, *asked, "--json", out], capture_output=True, text=True, check=True
    )
    figures = json.loads(out.read_text(encoding="utf-8"))
    lines = figures["resnet56 torch 4"]
    assert [line["leaving"] for line in lines] == ["none", "half", "all"]
    assert [sum(line["left"]) for line in lines] == [4, 4, 4]
    assert [lines[0]["left"][-1], lines[2]["left"][0]] == [4, 4]
    assert "needs a network on a GPU" in figures["resnet56 torch:cuda_graphs 1"]
    assert run.stderr == ""
