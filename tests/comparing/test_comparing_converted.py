"""Cheaper parts in a comparison: converted models alone and with exits on top, each at its cost."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import offramp as off
from made_up import file_of
from offramp.building.converting import conversions_of
from offramp.comparing import cells
from offramp.comparing.comparing import Comparison, measure
from offramp.comparing.costing import ModelCost
from offramp.comparing.page import write_page
from offramp.comparing.spreadsheets import write_spreadsheets
from offramp.errors import InvalidArgument, OverlappingRows, UnknownName

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

SHARED = """
calibration = "digits[700:1000]"
test = "digits[1000:1300]"
train = "digits[0:200]"
batch-size = 50
budgets = [0.7, 1.0]
seeds = [0]
wall-clock = true
wall-clock-budget = 1.0
repeats = 1
"""
PLAIN = """[method.plain]
model = "offramp:digits_large"
recipe = "joint"
with = ["epochs=8", "rate=0.01"]
static = true
"""
EXITS = """[method.exits]
start = "plain"
at = "2,5"
recipe = "cross_entropy"
with = ["regularizer=0.01"]
"""
LOW = """[method.low]
start = "plain"
layer = ["Conv2d=low_rank?rank=16", "0=keep"]
recipe = "recover"
with = ["epochs=4"]
static = true
"""
TOP = """[method.low-exits]
start = "low"
at = "2,5"
recipe = "cross_entropy"
with = ["regularizer=0.01"]
"""
PRUNED = """[method.pruned]
start = "plain"
layer = ["3=pruned?importance=taylor"]
data = "digits[200:260]"
static = true
"""
STACK = '[method.both]\nmembers = ["low", "plain"]\n'


def compared(folder: Path, *tables: str, shared: str = SHARED) -> Comparison:
    return measure(
        file_of(folder, *tables, shared=shared),
        folder / "out",
        say=lambda _: None,
        progress=False,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    pytest.importorskip("torch_pruning")
    folder = tmp_path_factory.mktemp("converted")
    return folder, compared(folder, PLAIN, EXITS, LOW, TOP, PRUNED, STACK)


def cost_of(found: Comparison, label: str) -> ModelCost:
    cost = found.of(label)[0].cost
    assert cost is not None
    return cost


def test_each_model_has_its_cost_alone_and_with_exits(first: tuple[Path, Comparison]) -> None:
    _, found = first
    plain = cost_of(found, "plain")
    low = cost_of(found, "low")
    assert low.macs < 0.7 * plain.macs == 0.7 * found.unit
    assert low.parameters < plain.parameters
    assert low.stored_bytes < plain.stored_bytes
    assert low.bit_operations == 32 * 32 * low.macs
    assert [line.batch for line in low.times] == [1, 64]
    assert all(line.ms > 0 and line.unit_ms > 0 for line in low.times)
    on_top = cost_of(found, "low-exits")
    assert on_top.macs == low.macs
    # both have the same exits
    assert on_top.parameters - low.parameters == cost_of(found, "exits").parameters - (
        plain.parameters
    )
    assert cost_of(found, "pruned").macs < plain.macs
    assert found.of("both")[0].cost is None
    assert found.of("low-exits")[0].figures.plain == found.of("low")[0].figures.plain
    # what `recover` brought back is what the exits stand on
    assert found.of("low")[0].figures.alone[-1] > 0.8
    assert found.of("low-exits")[0].figures.alone[-1] == found.of("low")[0].figures.alone[-1]


def test_the_networks_hold_what_was_converted(first: tuple[Path, Comparison]) -> None:
    folder, _ = first
    low = off.load(folder / "out" / "low-0" / "network")
    on_top = off.load(folder / "out" / "low-exits-0" / "network")
    plain = off.load(folder / "out" / "plain-0" / "network")
    pruned = off.load(folder / "out" / "pruned-0" / "network")
    model = low.model_of(low.members[0])
    assert set(conversions_of(model)) == {"3", "6", "10"}
    assert (low.members[0].spec or "").startswith("offramp:digits_large|")
    # recover changed the first layer, which is kept, and the exits began with its result
    assert not torch.equal(
        model.get_submodule("0").weight, plain.model_of(plain.members[0])[0].weight
    )
    top_model = on_top.model_of(on_top.members[0])
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(top_model.state_dict()[name], value), name
    assert on_top.topology.exits == ("2", "5", "backbone")
    assert pruned.model_of(pruned.members[0]).get_submodule("3").out_channels == 32


def test_nothing_is_made_twice(
    first: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = first
    for name in ("make_model", "load", "converted", "times_of", "size_of", "fit"):
        monkeypatch.setattr(cells, name, None)
    again = compared(folder, PLAIN, EXITS, LOW, TOP, PRUNED, STACK)
    assert [one.cost for one in again.results] == [one.cost for one in found.results]


def test_the_page_and_the_table_tell_the_costs(
    first: tuple[Path, Comparison], tmp_path: Path
) -> None:
    _, found = first
    page = write_page(found, tmp_path / "index.html").read_text(encoding="utf-8")
    section = page.split('id="models"')[1].split("<section")[0]
    for name in ("plain", "exits", "low", "low-exits", "pruned"):
        assert f">{name}<" in section
    assert f"{cost_of(found, 'low').parameters:,}" in section
    written = {path.name: path for path in write_spreadsheets(found, tmp_path)}
    lines = list(csv.DictReader(written["costs.csv"].read_text().splitlines()))
    assert len(lines) == 2 * 5
    low = [line for line in lines if line["method"] == "low"]
    assert {line["batch"] for line in low} == {"1", "64"}
    assert float(low[0]["ratio"]) == pytest.approx(float(low[0]["ms"]) / float(low[0]["unit_ms"]))


@pytest.mark.parametrize(
    ("tables", "error", "says"),
    [
        (
            (PLAIN, EXITS, LOW.replace("Conv2d=low", "Conv3=low")),
            InvalidArgument,
            r"\[method.low\]: the pattern 'Conv3' matches no module",
        ),
        (
            (PLAIN, EXITS, LOW.replace("low_rank?", "low_ranks?")),
            InvalidArgument,
            r"\[method.low\]: there is no method .*did you mean 'low_rank'",
        ),
        ((PLAIN, EXITS, LOW.replace("=low_rank?rank=16", "")), InvalidArgument, "NAME=VALUE"),
        (
            (PLAIN, EXITS, PRUNED.replace('data = "digits[200:260]"\n', "")),
            InvalidArgument,
            "data must be rows with labels, .x, y., for importance='taylor', got None",
        ),
        (
            (PLAIN, EXITS, LOW + 'data = "digits[690:710]"\n'),
            OverlappingRows,
            "calibration",
        ),
        (
            (PLAIN, EXITS, EXITS.replace("exits]", "more]") + 'data = "digits[200:260]"\n'),
            InvalidArgument,
            "has data, the rows for layers",
        ),
        ((PLAIN, EXITS, LOW.replace("layer", "layers")), UnknownName, "'layers'.*'layer'"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_trained(
    tmp_path: Path, tables: tuple[str, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        compared(tmp_path, *tables)
    assert not list(tmp_path.rglob("*.safetensors"))
