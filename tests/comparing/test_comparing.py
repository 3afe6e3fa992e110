"""A comparison on digits from its file to its page: made once, gone on with, refused where it is
another one.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import made_up
import offramp as off
from made_up import DIGITS, contents, file_of
from offramp._support.files import read_json
from offramp.comparing import cells, checking, comparing
from offramp.comparing.cells import Cell
from offramp.comparing.comparing import Comparison, measure
from offramp.comparing.page import write_page
from offramp.comparing.reading import read_settings
from offramp.comparing.settings import Method
from offramp.comparing.spreadsheets import (
    CLOCKS,
    COSTS,
    CURVES,
    RESULTS,
    write_spreadsheets,
)
from offramp.errors import InvalidArgument, OverlappingRows
from offramp.plans.trace import Trace
from offramp.testing import stopping

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

SMALL = DIGITS.replace("stem,blocks.0", "stem")
CLOCK = "wall-clock = true\nwall-clock-budget = 1.0\nrepeats = 1\n"
JOINT = """[method.joint]
recipe = "joint"
with = ["epochs=2", "rate=0.01"]
seeds = [0, 1]
gates = ["own", "max_prob"]
"""
PLAIN = """[method.plain]
model = "offramp:digits_small"
preprocess = "auto"
static = true
seeds = [0]
"""
STACK = '[method.stack]\nmembers = ["plain", "joint"]\nseeds = [0]\n'
MADE = (JOINT, PLAIN, STACK)


def compared(
    folder: Path, *tables: str, shared: str = SMALL + CLOCK
) -> tuple[Comparison, list[str]]:
    """A comparison below a folder, and what it said."""
    said: list[str] = []
    found = measure(
        file_of(folder, *tables, shared=shared), folder / "out", say=said.append, progress=False
    )
    return found, said


def lines_of(file: Path) -> list[dict[str, str]]:
    """The lines of a CSV file by its heads."""
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, list[str]]:
    """A folder with a whole comparison: two seeds under two gates, a static network, and a ladder
    of both.
    """
    folder = tmp_path_factory.mktemp("compared")
    return folder, *compared(folder, *MADE)


@pytest.fixture
def made(first: tuple[Path, Comparison, list[str]], tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(first[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_every_network_is_made_once_and_measured_under_each_gate(
    first: tuple[Path, Comparison, list[str]],
) -> None:
    folder, found, said = first
    assert [(each.method, each.seed, each.gate) for each in found.results] == [
        *(("joint", seed, gate) for seed in (0, 1) for gate in ("own", "max_prob")),
        ("plain", 0, "own"),
        ("stack", 0, "own"),
    ]
    assert found.labels() == ["joint", "joint, max_prob", "stack"]
    assert found.leading() == ["joint", "stack"]
    assert found.labels(static=True) == ["plain"]
    assert [line for line in said if "recording" in line] == [
        "1/4 joint, seed 0: training and recording",
        "2/4 joint, seed 1: training and recording",
        "3/4 plain, seed 0: recording",
        "4/4 stack, seed 0: recording",
    ]
    assert "1/4 joint, seed 0: figures under max_prob" in said
    one, other = (
        off.load(folder / "out" / f"joint-{seed}" / "network", _model()) for seed in (0, 1)
    )
    assert one.fingerprint() != other.fingerprint()


def _model() -> torch.nn.Module:
    from made_up import net

    return net()


def test_the_unit_is_the_plain_network_of_the_first_method_that_is_cut(
    first: tuple[Path, Comparison, list[str]],
) -> None:
    folder, found, _ = first
    trace = Trace.load(folder / "out" / "joint-0" / "test.npz")
    assert found.unit == trace.price(off.Plan.never_leave(trace.topology)).plain
    for result in found.of("joint"):
        for budget in result.figures.budgets:
            assert budget.point is not None
            # on other rows than it was chosen on
            assert budget.point.cost <= 1.1 * budget.budget * found.unit


def test_a_ladder_has_the_exits_of_its_members(first: tuple[Path, Comparison, list[str]]) -> None:
    folder, found, _ = first
    (stack,) = found.of("stack")
    assert stack.figures.exits == ("plain", "joint/stem", "joint")
    own, stacked = (
        Trace.load(folder / "out" / name / "test.npz") for name in ("joint-0", "stack-0")
    )
    assert (own.columns["answer/stem"] == stacked.columns["answer/joint/stem"]).all()


def test_only_the_first_seed_and_gate_are_timed(first: tuple[Path, Comparison, list[str]]) -> None:
    timed = {(each.label, each.seed) for each in first[1].results if each.timed is not None}
    assert timed == {("joint", 0), ("stack", 0)}


def test_the_second_time_nothing_is_made_and_no_network_is_loaded(
    made: Path, first: tuple[Path, Comparison, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, name in (
        (cells, "load"),
        (cells, "make_model"),
        (checking, "make_model"),
        (checking, "index_of"),
    ):
        monkeypatch.setattr(index, name, None)
    before = contents(made / "out")
    found, said = compared(made, *MADE)
    assert contents(made / "out") == before
    assert said == [
        f"3 methods, seeds as the file says: 4 networks, of which 4 are in {made / 'out'} already "
        f"and are kept"
    ]
    assert found == first[1]


def test_another_method_costs_only_itself(made: Path) -> None:
    before = contents(made / "out")
    _, said = compared(made, *MADE, '[method.later]\nrecipe = "hinge"\nseeds = [0]\n')
    after = contents(made / "out")
    assert {name for name in after if name not in before or after[name] != before[name]} == {
        name for name in after if name.startswith(("later-0/", "pooled"))
    }
    assert said[0].startswith("4 methods, seeds as the file says: 5 networks, of which 4 are in ")
    assert {line.split(":")[0] for line in said[1:]} == {"5/5 later, seed 0"}


@pytest.mark.slow
def test_another_test_set_is_recorded_and_trains_nothing(made: Path) -> None:
    before = contents(made / "out")
    found, _ = compared(made, *MADE, shared=(SMALL + CLOCK).replace("[1000:1300]", "[1000:1200]"))
    after = contents(made / "out")
    changed = {Path(name).name for name in after if after[name] != before.get(name)}
    figures = {"figures-own.json", "figures-max_prob.json", "bench-own.json", "cost.json"}
    assert changed == {"test.npz", *figures}
    assert {each.figures.rows for each in found.results} == {200}


@pytest.mark.parametrize(
    ("changed", "to", "folder", "says"),
    [
        ("epochs=2", "epochs=3", "joint-0", r"arguments = \['epochs=2', 'rate=0.01'\]"),
        ("batch-size = 50", "batch-size = 40", "joint-0", "batch-size = 50, but now it is 40"),
        (
            'model = "offramp:digits_small"',
            'model = "offramp:digits_large"',
            "plain-0",
            "digits_small",
        ),
    ],
)
def test_a_network_that_was_made_otherwise_is_refused_and_its_folder_named(
    made: Path, changed: str, to: str, folder: str, says: str
) -> None:
    before = contents(made / "out")
    tables = [table.replace(changed, to) for table in MADE]
    with pytest.raises(
        InvalidArgument, match=rf"out/{folder} was made with .*{says}.*Remove that folder"
    ):
        compared(made, *tables, shared=(SMALL + CLOCK).replace(changed, to))
    assert contents(made / "out") == before


def test_a_method_may_start_with_the_model_that_another_trained(tmp_path: Path) -> None:
    trained = (
        '[method.trained]\nrecipe = "joint"\nwith = ["epochs=1"]\nseeds = [0]\nstatic = true\n'
    )
    exits = '[method.exits]\nstart = "trained"\nat = "stem"\nrecipe = "hinge"\nseeds = [0]\n'
    compared(tmp_path, trained, exits)
    nets = [
        off.load(tmp_path / "out" / name / "network", made_up.net())
        for name in ("trained-0", "exits-0")
    ]
    first, then = (net.backbone.state_dict() for net in nets)
    assert all(torch.equal(value, then[key]) for key, value in first.items())
    # the same rows: each counts once
    assert nets[1].trained_on.digests.tolist() == nets[0].trained_on.digests.tolist()
    shutil.rmtree(tmp_path / "out" / "trained-0")
    with pytest.raises(
        InvalidArgument, match=r"exits-0 was made with of = .*epochs=1.* now it is .*epochs=2"
    ):
        compared(tmp_path, trained.replace("epochs=1", "epochs=2"), exits)


def test_a_ladder_remembers_the_rows_that_trained_its_members(tmp_path: Path) -> None:
    trained = JOINT.replace("[0, 1]", "[0]") + "static = true\n"
    settings = read_settings(
        file_of(
            tmp_path,
            trained,
            PLAIN,
            STACK,
            JOINT.replace("method.joint", "method.cut"),
            shared=SMALL,
        )
    )
    joint, _, stack, *_ = (
        Cell(each, 0, settings, tmp_path / "out", False) for each in settings.methods
    )
    assert stack.network.trained_on is not None
    assert stack.network.trained_on.digests.tolist() == joint.network.trained_on.digests.tolist()


def test_a_ladder_of_members_that_were_made_otherwise_is_refused(made: Path) -> None:
    for path in ("joint-0", "joint-1"):
        shutil.rmtree(made / "out" / path)
    with pytest.raises(InvalidArgument, match="stack-0 was made with of = "):
        compared(made, *(table.replace("epochs=2", "epochs=1") for table in MADE))
    assert not (made / "out" / "joint-0" / "network").exists()


def test_what_means_nothing_to_a_static_network_may_change(made: Path) -> None:
    file = file_of(made, *MADE, shared=SMALL.replace('at = "stem"', 'at = "blocks.0"'))
    settings = read_settings(file)
    Cell(settings.method("plain"), 0, settings, made / "out", progress=False).claim()
    with pytest.raises(InvalidArgument, match="at = 'stem', but now"):
        Cell(settings.method("joint"), 0, settings, made / "out", progress=False).claim()


def test_a_folder_from_before_a_flag_was_there_is_taken(made: Path) -> None:
    settings = read_settings(file_of(made, *MADE))
    cell = Cell(settings.method("stack"), 0, settings, made / "out", progress=False)
    (cell.home / "settings.json").unlink()
    old = {key: value for key, value in cell.method.flags(0).items() if key != "views"}
    cells.write_json(cell.home / "settings.json", cells.KIND, cells.SCHEMA, old)
    cell.claim()


# of 8 steps, 4 in an epoch
@pytest.mark.parametrize("after", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_stopped_in_mid_training_it_goes_on_as_if_it_had_not_been(
    made: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    folder = tmp_path_factory.mktemp("stopped")
    straight = made / "out" / "joint-0"
    alone = JOINT.replace("[0, 1]", "[0]").replace(', "max_prob"', "")
    made_of = cells.recipe_of
    monkeypatch.setattr(
        cells, "recipe_of", lambda *a, **options: stopping(made_of(*a, **options), after)
    )
    with pytest.raises(KeyboardInterrupt):
        compared(folder, alone, shared=SMALL)
    monkeypatch.undo()
    assert (folder / "out" / "joint-0" / "run" / "checkpoint").is_dir()
    assert not (folder / "out" / "joint-0" / "network").exists()
    found, _ = compared(folder, alone, shared=SMALL)
    for name in ("network/weights.safetensors", "figures-own.json"):
        assert (folder / "out" / "joint-0" / name).read_bytes() == (straight / name).read_bytes(), (
            name
        )
    epochs = lines_of(folder / "out" / "joint-0" / "run" / "metrics.csv")
    assert len(epochs) == 2
    assert found.results[0].seconds == pytest.approx(
        sum(float(epoch["seconds"]) for epoch in epochs)
    )


@pytest.mark.parametrize(
    ("changed", "to", "says"),
    [
        (
            "digits[0:200]",
            "digits[600:801]",
            "101 of the 300 calibration rows .* rows of digits.600:801.",
        ),
        ("digits[0:200]", "digits[1299:]", "1 of the 300 test rows"),
        ("digits[700:1000]", "digits[700:1001]", "1 of the 300 test rows"),
        (
            "batch-size = 50",
            'development = "digits[990:1010]"',
            "test rows .* rows of digits.990:1010.",
        ),
        (
            'at = "stem"',
            'at = "auto"\nlabelled = "digits[600:701]"',
            "1 of the 300 calibration rows .* digits.600:701.",
        ),
        (
            'at = "stem"',
            'at = "auto"\nlabelled = "digits[1290:1400]"',
            "test rows .* rows of digits.1290:1400.",
        ),
    ],
)
def test_rows_in_two_roles_are_refused_before_anything_is_trained(
    tmp_path: Path, changed: str, to: str, says: str
) -> None:
    with pytest.raises(OverlappingRows, match=says):
        compared(tmp_path, JOINT, shared=SMALL.replace(changed, to))
    assert not contents(tmp_path / "out")


def test_rows_in_two_roles_are_left_out_if_the_file_says_so(tmp_path: Path) -> None:
    twice = SMALL.replace("digits[700:1000]", "digits[100:400]").replace(
        "digits[1000:1300]", "digits[390:690]"
    )
    twice += "drop-seen = true\n"
    found, _ = compared(tmp_path, JOINT.replace("[0, 1]", "[0]"), shared=twice)
    assert [result.figures.rows for result in found.results] == [290, 290]
    calibration = Trace.load(tmp_path / "out" / "joint-0" / "calibration.npz")
    assert calibration.columns["learned"].sum() == 100


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("at-most = 5.0", "at-most must be"),
        ("confidence = 95.0", "confidence must be"),
        ('repeated-rows = "twice"', "repeats must be"),
    ],
)
def test_what_a_promise_may_ask_is_looked_at_before_anything_is_trained(
    tmp_path: Path, line: str, says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        compared(tmp_path, JOINT, shared=f"{line}\n{SMALL}")
    assert not contents(tmp_path / "out")


def test_the_rows_of_a_probe_count_where_nothing_is_trained_too(tmp_path: Path) -> None:
    untrained = '[method.untrained]\nat = "auto"\nlabelled = "digits[600:701]"\n'
    with pytest.raises(OverlappingRows, match="1 of the 300 calibration rows"):
        compared(tmp_path, untrained, shared=SMALL)


def test_rows_that_trained_a_network_in_the_folder_are_refused_too(made: Path) -> None:
    with pytest.raises(OverlappingRows, match="also trained"):
        compared(made, *MADE, shared=(SMALL + CLOCK).replace("[700:1000]", "[100:400]"))


def test_the_page_and_the_spreadsheets_tell_all_of_it(
    made: Path, first: tuple[Path, Comparison, list[str]]
) -> None:
    found = first[1]
    page = write_page(found, made / "index.html").read_text(encoding="utf-8")
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', page)[0])
    names = {line.get("name") for choice in figures[0]["choices"] for line in choice["data"]}
    assert {"joint", "joint, max_prob", "stack", "plain", "joint's last exit"} <= names
    tables = {path.name: lines_of(path) for path in write_spreadsheets(found, made)}
    heads = {name: tuple(lines[0]) for name, lines in tables.items()}
    assert heads == {
        "results.csv": RESULTS,
        "curves.csv": CURVES,
        "clocks.csv": CLOCKS,
        "costs.csv": COSTS,
    }
    assert len(tables["results.csv"]) == 2 * 2 * 2 + 1 + 2
    assert {line["batch"] for line in tables["clocks.csv"]} == {"1", "64"}
    budget = found.results[0].figures.budgets[0].point
    line = tables["results.csv"][0]
    assert budget is not None
    assert (line["aim"], float(line["accuracy"])) == ("budget 0.7", budget.accuracy)
    assert float(line["macs"]) == budget.cost == pytest.approx(float(line["cost"]) * found.unit)
    assert float(line["seconds"]) > 0
    assert read_json(made / "out" / "joint-0" / "settings.json", "comparison", 1)[
        1
    ] == Method.asked(found.settings.methods[0], 0)


def test_a_comparison_needs_no_say(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparing.measure(file_of(made, *MADE, shared=SMALL + CLOCK), made / "out", progress=False)
    assert capsys.readouterr().out.count("\n") == 1  # how many networks there are


OWN = """
from torch import nn
from offramp.exits.pooled import Pooled
from offramp.models.digits import preprocess

class Halved(nn.Module):
    def forward(self, x):
        return preprocess()(x) / 2

class Exit(Pooled):
    def config(self):
        return super().config() | {"name": "own_parts:Exit"}

def exit_(shape, classes):
    return Exit("flat", shape[0] * shape[1] * shape[2] if len(shape) > 1 else shape[0], classes)

def gate(logits):
    return logits.softmax(1).amax(1)
"""


def test_own_preprocessing_exits_and_gates_are_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    table = """
[method.own]
preprocess = "own_parts:Halved"
exit = "own_parts:exit_"
gate = "own_parts:gate"
recipe = "cross_entropy"
with = ["regularizer=0.01"]
seeds = [0]
gates = ["own"]
"""
    found, _ = compared(tmp_path, table, shared=SMALL)
    more, _ = compared(tmp_path, table.replace('["own"]', '["own", "margin"]'), shared=SMALL)
    assert [len(each.results) for each in (found, more)] == [1, 2]
    assert more.results[0] == found.results[0]
