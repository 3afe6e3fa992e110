"""The settings files in benchmarks/compare: each is sound, and most run from end to end on a few
rows.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from offramp.comparing.checking import require_known
from offramp.comparing.comparing import measure
from offramp.comparing.reading import read_settings

pytest.importorskip("accelerate")

FILES = sorted((Path(__file__).parents[2] / "benchmarks" / "compare").glob("*.toml"))
ROWS = {
    "train": "[0:32]",
    "data": "[0:32]",
    "development": "[32:48]",
    "calibration": "[48:108]",
    "test": "[108:148]",
}
LONG = (
    "resnet101-cross-entropy",
    "densenet201-cross-entropy",
)  # the same cuts as those of hinge: minutes
RUN_ELSEWHERE = ("lenet", "resnet20-frozen", "resnet56-frozen")  # on all rows: docs/results


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_names_what_there_is(file: Path) -> None:
    settings = read_settings(file)
    require_known(settings)
    assert f"offramp compare benchmarks/compare/{file.name} -o" in file.read_text(encoding="utf-8")


def shortened(file: Path, data: Path) -> str:
    """A settings file with few rows of the data at hand, one epoch and one seed."""
    body = tomllib.loads(file.read_text(encoding="utf-8"))
    methods = {name: table for name, table in body.pop("method").items() if name not in LONG}
    for table in (body, *methods.values()):
        for key, value in table.items():
            if key == "weights":
                table[key] = str(data / Path(value).relative_to("data"))
            elif key in ROWS:
                table[key] = re.sub(
                    r"(.*/train|cifar10|mnist/test):data/(\w+).*",
                    rf"\1:{data}/\2{ROWS[key]}",
                    value,
                )
            elif key == "with":
                table[key] = [
                    re.sub(r"^(epochs|alone|ensembles)=.*", r"\1=1", text) for text in value
                ]
            elif key == "seeds":
                table[key] = value[:1]
    body |= {"batch-size": 16, "splits": 0, "wall-clock": False}
    lines = [_line(key, value) for key, value in body.items()]
    for name, table in methods.items():
        lines += [f"[method.{name}]", *(_line(key, value) for key, value in table.items())]
    return "\n".join(lines)


def _line(key: str, value: Any) -> str:
    return f"{key} = {json.dumps(value)}"


# a few steps leave some networks with wild logits
@pytest.mark.filterwarnings("ignore::offramp.errors.Notice")
@pytest.mark.slow
@pytest.mark.timeout(900)  # DenseNet-201 alone takes a minute or two
@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in RUN_ELSEWHERE], ids=lambda file: file.stem
)
def test_a_file_runs(file: Path, data_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.toml"
    short.write_text(shortened(file, data_dir), encoding="utf-8")
    found = measure(short, tmp_path / "out", say=lambda _: None, progress=False)
    assert {result.method for result in found.results} | {*LONG} >= {
        each.name for each in read_settings(file).methods
    }
    assert all(0 <= result.figures.alone[-1] <= 1 for result in found.results)
