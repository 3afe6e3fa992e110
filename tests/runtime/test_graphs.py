"""Graphs are kept on disk by all that they were made of: the next process neither exports nor takes
a model apart.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import offramp as off
from compiled import carrying, middling
from offramp.errors import MissingExtra
from offramp.networks.inputs import as_inputs
from offramp.plans.plan import BAND
from offramp.runtime import graphs
from offramp.runtime.benching import plain_of
from offramp.runtime.engine import engine_of
from serving import Exporting
from small import dense, rows_of, seeded


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    try:
        engine_of("onnxruntime")
    except MissingExtra as problem:
        pytest.skip(str(problem))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "offramp"


@pytest.fixture
def counted(monkeypatch):
    """The names of the nodes whose graphs were written, and of networks that were taken apart."""
    found = []
    written = graphs.written
    passing = graphs._passing
    monkeypatch.setattr(
        graphs, "written", lambda part, *rest: (found.append(part.name), written(part, *rest))[1]
    )
    monkeypatch.setattr(
        graphs, "_passing", lambda *rest, **more: (found.append("apart"), passing(*rest, **more))[1]
    )
    return found


@dataclass
class First:
    """What the first process made.

    Attributes:
        home: the folder of its cache.
        plan: of the network on twenty rows.
        logits: its answers.
        exit: where the rows left.
        anytime: its answers one after the other.
    """

    home: Path
    plan: off.Plan
    logits: Tensor
    exit: list[int]
    anytime: list[Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("first")
    x = rows_of(20)
    net = seeded(carrying, 0)
    plan = middling(net, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        runner = off.open(net, plan, engine="onnxruntime", example=x)
        answers = runner(x)
        anytime = [one.logits for one in runner.anytime(x)]
    return First(home, plan, answers.logits, answers.exit.tolist(), anytime)


@pytest.fixture
def first(made, folder):
    """The first process, whose files are in the folder of this test."""
    shutil.copytree(made.home / "offramp", folder)
    return made


def test_the_next_process_writes_nothing(first, counted):
    x = rows_of(20)
    after = off.open(seeded(carrying, 0), first.plan, engine="onnxruntime", example=x)
    assert counted == []
    assert "in one graph" in repr(after)
    assert torch.equal(after(x).logits, first.logits)
    assert after(x).exit.tolist() == first.exit
    later = [one.logits for one in after.anytime(x)]
    assert len(later) == len(first.anytime)
    assert all(map(torch.equal, later, first.anytime))


def test_other_graphs_of_a_network_find_its_nodes(first, counted, tmp_path):
    """The baseline of `bench`, other plans and exports need no export of their own."""
    x = rows_of(20)
    net = seeded(carrying, 0)
    never = off.Plan.never_leave(net.topology)
    answers = off.open(net, never, engine="onnxruntime", example=x)(x)
    torch.testing.assert_close(answers.logits, off.open(net, never)(x).logits, atol=BAND, rtol=0)
    off.export(net, first.plan, tmp_path / "exported", example=x)
    assert set(counted) == {"apart"}
    counted.clear()
    for written in (["backbone"], []):  # the plain model is a network of its own
        bind = plain_of(seeded(carrying, 0), as_inputs(x), engine_of("onnxruntime")[0])
        assert [name for name in counted if name != "apart"] == written
        assert len(bind(as_inputs(x))()) == 1
        counted.clear()


def test_other_weights_are_another_network(first, counted):
    x = rows_of(20)
    net = seeded(carrying, 0)
    with torch.no_grad():
        net.backbone.last.bias.add_(1)
    y = off.open(net, first.plan, engine="onnxruntime", example=x)(x)
    assert counted
    torch.testing.assert_close(y.logits, off.open(net, first.plan)(x).logits, atol=BAND, rtol=0)


# test_engines_cache.py has the other kinds of damage on a ladder.
@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        pytest.param("of another version", marks=pytest.mark.slow),
        pytest.param("no graph at all", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_cache_is_made_again(first, folder, counted, damage, monkeypatch):
    x = rows_of(20)
    if damage == "of another version":
        monkeypatch.setattr(graphs, "edition", lambda: "another edition")
    elif damage == "cut":
        for file in folder.glob("*.bin"):
            file.write_bytes(file.read_bytes()[:-10])
    else:
        monkeypatch.setattr(graphs.disk, "read", lambda key: b"[1, 2]\nnot a model")
    got = off.open(seeded(carrying, 0), first.plan, engine="onnxruntime", example=x)(x)
    assert counted
    assert torch.equal(got.logits, first.logits)


def test_a_network_serves_while_it_is_exported(tmp_path):
    model = Exporting().eval()
    net = off.ladder({"a": model, "b": dense(1)})
    plan = off.Plan.by_hand({"a": 0.3})
    x = rows_of(20)
    runner = off.open(net, plan)
    wanted = runner(x).logits
    model.service.during_export(lambda: runner(x).logits)
    off.export(net, plan, tmp_path / "exported", example=x)
    results = model.service.all_results()
    assert results
    for logits in results:
        assert torch.equal(logits, wanted)
