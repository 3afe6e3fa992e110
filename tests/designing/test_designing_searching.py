"""`off.search`: one call from a model to a network within a budget, that can be stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
from math import inf

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.designing import searching, single_path
from offramp.designing.search_folder import MANIFEST, WEIGHTS
from offramp.errors import (
    BadData,
    BadFile,
    BadNetwork,
    Diverged,
    InvalidArgument,
    Mismatch,
    OverlappingRows,
    UnknownName,
)
from offramp.layers.skip import Skip
from offramp.models.digits import digits_large, preprocess
from offramp.runtime.measuring import macs
from small import images_of, seeded
from supernets import small_model

X = images_of(96)
Y = (X.mean((1, 2, 3)) > 0).long()
CHOICES = {"body.*": ["dense", "ghost?ratio=2", "narrow?by=2", "skip"]}
DATA = {"three": (X[:64], Y[:64]), "two": (X[:64], 1 - Y[:64])}
DEVELOPMENT = {"three": (X[64:], Y[64:]), "two": (X[64:], 1 - Y[64:])}
QUICK = {
    "steps": 40,
    "batch_size": 32,
    "rate": 0.1,
    "population": 8,
    "generations": 3,
    "progress": False,
}


def searched(**changes):
    arguments = {"development": DEVELOPMENT, "budget": 0.6, "at": ["body.0", "body.1"], **QUICK}
    choices = changes.pop("choices", CHOICES)
    data = changes.pop("data", DATA)
    model = changes.pop("model", None) or small_model()
    return off.search(model, choices, data, **{**arguments, **changes})


@pytest.fixture(scope="module")
def found():
    return searched()


def test_it_finds_a_network_within_the_budget(found):
    assert found.task == "three"
    assert found.unit == "macs"
    assert found.supernet.places == ("body.0", "body.1", "body.2")
    assert found.dense_cost == found.searcher.state.tables["macs"].whole(
        found.supernet.dense, "three"
    )
    assert found.budget == 0.6 * found.dense_cost
    assert all(judged.cost <= found.budget for judged in found.candidates)
    accuracies = [judged.accuracy for judged in found.candidates]
    assert accuracies == sorted(accuracies, reverse=True)
    front = found.frontier()
    assert front[-1].accuracy == found.best.accuracy
    assert str(found).endswith(found.told())
    assert len(found.rows()) == len(front)
    body = json.loads(json.dumps(found.to_json()))
    assert body["cost"] == found.best.cost
    assert body["networks"] == 4**3 * 2**2


def test_the_model_of_a_candidate_has_batch_norms_of_its_own_and_that_accuracy(found):
    judged = next(one for one in found.candidates if not one.subnet.exits)
    model = found.model(judged)
    right = (model(X[64:]).argmax(1) == Y[64:]).float().mean().item()
    assert right == judged.accuracy
    assert macs(lambda: model(X[:2])) / 2 == judged.cost
    assert not model.training


def test_the_network_has_the_exits_and_is_trained_on(found):
    judged = next(one for one in found.candidates if one.subnet.exits)
    net = found.network(judged, gate="max_prob")
    assert net.topology.exits == (*judged.subnet.exits, "backbone")
    before = {name: value.clone() for name, value in net.named_parameters()}
    off.fit(net, (X[:64], Y[:64]), recipe="joint", epochs=1, progress=False)
    assert any(not torch.equal(value, before[name]) for name, value in net.named_parameters())
    alone = found.network(dataclasses.replace(judged, subnet=found.supernet.dense))
    assert alone.topology.exits == ("backbone",)
    off.fit(alone, (X[:64], Y[:64]), recipe="joint", epochs=1, progress=False)


def test_rows_that_trained_or_judged_it_promise_nothing(found):
    net = found.network(next(one for one in found.candidates if one.subnet.exits))
    fresh = images_of(200)[96:]
    for x, y in (DATA["three"], DEVELOPMENT["three"]):
        trace = off.record(net, (x, y), timed=False, progress=False)
        with pytest.raises(OverlappingRows):
            off.calibrate(trace, risk="accuracy_gap", at_most=0.5)
    trace = off.record(net, fresh, timed=False, progress=False)
    off.calibrate(trace, risk="disagreement", at_most=0.9)
    exits = off.cut(found.model(), X[:4], at=["body.1"])
    off.fit(exits, (fresh, (fresh.mean((1, 2, 3)) > 0).long()), progress=False)
    trace = off.record(exits, DEVELOPMENT["three"], timed=False, progress=False)
    with pytest.raises(OverlappingRows):
        off.calibrate(trace, risk="accuracy_gap", at_most=0.5)


def test_another_search_trains_nothing(found, monkeypatch):
    monkeypatch.setattr(searching, "train_supernet", None)
    before = {name: value.clone() for name, value in found.supernet.state_dict().items()}
    small = found.again(budget=0.3)
    assert small.best.cost <= 0.3 * found.dense_cost
    other = found.again(limit=0.8 * found.dense_cost, task="two", exits=False)
    assert other.task == "two"
    assert all(not judged.subnet.exits for judged in other.candidates)
    assert other.best.accuracy > 0.6
    assert found.again(budget=0.6).best == found.best
    for name, value in found.supernet.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(UnknownName, match="task of this search"):
        found.again(budget=0.5, task="four")


def test_a_budget_in_milliseconds(found):
    ticks = itertools.count()
    result = searched(
        unit="ms", budget=0.9, timing_rows=4, clock=lambda: next(ticks) * 0.004, steps=2
    )
    # Each call takes one tick of 4 ms for four rows, also the complete network, so nothing is left
    # for what stands at no place. A row that leaves at the first exit pays for one block and the
    # exit.
    assert result.dense_cost == pytest.approx(3.0)
    assert result.budget == pytest.approx(0.9 * 3.0)
    assert min(judged.cost for judged in result.candidates) == pytest.approx(2.0)


def interrupted_after(count, monkeypatch):
    """Let the next training be interrupted within the step of this number, by Ctrl-C."""
    import signal

    steps = itertools.count(1)
    loss_of = single_path.loss_of

    def loss(*args):
        if next(steps) == 2 * count:  # two networks a step
            signal.raise_signal(signal.SIGINT)
        return loss_of(*args)

    monkeypatch.setattr(single_path, "loss_of", loss)


@pytest.mark.parametrize("count", [1, 17, 40])
def test_a_stopped_search_goes_on_bit_for_bit(found, tmp_path, monkeypatch, count):
    with monkeypatch.context() as patch:
        interrupted_after(count, patch)
        with pytest.raises(KeyboardInterrupt):
            searched(folder=tmp_path / "search")
    body = json.loads((tmp_path / "search" / MANIFEST).read_text())
    assert body["training"]["step"] == count
    torch.manual_seed(7)  # the state of other generators does not count
    again = searched(folder=tmp_path / "search", resume=True)
    assert again.candidates == found.candidates
    for name, value in again.supernet.state_dict().items():
        assert torch.equal(value, found.supernet.state_dict()[name]), name


def test_a_stopped_evolution_goes_on_where_it_was(found, tmp_path, monkeypatch):
    from offramp.designing import evolution

    judge = evolution.judge
    counts = itertools.count(1)

    def judged(*args, **options):
        if next(counts) == 11:
            raise KeyboardInterrupt
        return judge(*args, **options)

    monkeypatch.setattr(evolution, "judge", judged)
    with pytest.raises(KeyboardInterrupt):
        searched(folder=tmp_path / "search")
    total = len(found.candidates) + found.refused
    left = itertools.count(1)
    monkeypatch.setattr(evolution, "judge", lambda *a, **k: (next(left), judge(*a, **k))[1])
    again = searched(folder=tmp_path / "search", resume=True)
    assert again.candidates == found.candidates
    assert next(left) - 1 == total - 10  # ten were known


def test_the_folder_is_for_the_same_inputs_only(tmp_path):
    folder = tmp_path / "search"
    searched(folder=folder, steps=2)
    with pytest.raises(Mismatch, match=r"steps must be the same as in the search in .*, 2, got 3"):
        searched(folder=folder, steps=3, resume=True)
    other = {**DATA, "two": (X[:60], Y[:60])}
    with pytest.raises(Mismatch, match="rows must be the same as in the search"):
        searched(folder=folder, steps=2, resume=True, data=other)
    with pytest.raises(Mismatch, match="choices must be the same as in the search"):
        searched(folder=folder, steps=2, resume=True, choices={"body.*": ["dense", "skip"]})
    # without resume it begins again
    assert searched(folder=folder, steps=3).searcher.state.training.step == 3
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(BadFile, match="was damaged or exchanged"):
        searched(folder=folder, steps=3, resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(BadFile, match="was not written by offramp"):
        searched(folder=tmp_path / "notes", steps=2)


def test_a_pattern_leaves_out_what_does_not_fit_at_a_place():
    from offramp.layers.residual import Block

    body = seeded(lambda: nn.Sequential(Block(1, 4), Block(4, 4), Block(4, 8)), 0)
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    result = searched(
        model=model, choices={"0.2": ["dense"], "0.[01]": ["dense", "skip"]}, steps=2, at=[]
    )
    names = dict(zip(result.supernet.places, result.supernet.names, strict=True))
    assert names == {"0.0": ("dense",), "0.1": ("dense", "skip"), "0.2": ("dense",)}
    with pytest.raises(BadNetwork, match=r"'skip' fits at none of \['0.0', '0.2'\] \(it gives"):
        searched(model=model, choices={"0.[02]": ["dense", "skip"]}, steps=2, at=[])
    with pytest.raises(BadNetwork, match=r"the option 'skip' does not fit at '0.0'"):
        searched(model=model, choices={"0.0": ["dense", "skip"]}, steps=2, at=[])


def test_a_found_network_is_saved_by_its_name_and_loaded(tmp_path):
    model = digits_large().eval()
    result = off.search(
        model,
        {"3": ["dense", "low_rank?rank=8"], "[46]": ["dense", "skip"]},
        {"ten": "digits[0:200]", "odd": (DIGITS.x, ODD)},
        development={"ten": "digits[200:300]"},
        budget=0.9,
        at=["8"],
        preprocess=preprocess(),
        spec="offramp:digits_large",
        **{**QUICK, "steps": 2},
    )
    chosen = next(one for one in result.candidates if 1 in one.subnet.options)
    bare = dataclasses.replace(chosen, subnet=dataclasses.replace(chosen.subnet, exits=()))
    full = dataclasses.replace(chosen, subnet=dataclasses.replace(chosen.subnet, exits=("8",)))
    x = off.rows("digits[300:320]").take(range(20)).x
    for judged in (bare, full):
        net = result.network(judged)
        off.save(net, tmp_path / "net")
        again = off.load(tmp_path / "net")
        for one, other in zip(net(x), again(x), strict=True):
            assert torch.equal(one, other)
        assert net.members[0].spec.startswith("offramp:digits_large|")
    # the other task has a head of its own, which is part of the name
    held = off.rows("digits[300:400]").take(range(100))
    other = result.again(
        budget=0.9, task="odd", exits=False, development=(held.x, np.asarray(held.y) % 2)
    )
    net = other.network()
    assert "15=resized?inputs=1024&outputs=2" in net.members[0].spec
    off.save(net, tmp_path / "odd")
    assert torch.equal(off.load(tmp_path / "odd")(x)[-1], net(x)[-1])


DIGITS = off.rows("digits[0:200]").take(range(200))
ODD = np.asarray(DIGITS.y) % 2


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"budget": None}, InvalidArgument, "exactly one of budget= and limit=.*got neither"),
        ({"limit": 5.0}, InvalidArgument, "exactly one of budget= and limit=.*got both"),
        ({"budget": 1.5}, InvalidArgument, "budget must be above 0 and at most 1, got 1.5"),
        ({"budget": 1e-9}, InvalidArgument, "no network is within the budget of"),
        ({"budget": None, "limit": -1}, InvalidArgument, "limit must be a number above 0|above 0"),
        ({"unit": "joules"}, InvalidArgument, "unit must be one of macs, ms, got 'joules'"),
        ({"steps": 0}, InvalidArgument, "steps must be a whole number of at least 1, got 0"),
        ({"rate": 0}, InvalidArgument, "rate must be"),
        ({"rate": 1e9}, Diverged, "must be finite, got nan at step|must be finite, got inf at"),
        ({"resume": True}, InvalidArgument, "folder must be the folder of the search.*got None"),
        ({"task": "four"}, UnknownName, "no task of this search called 'four'"),
        ({"augment": "crop_flipp"}, UnknownName, "crop_flip"),
        ({"choices": {}}, InvalidArgument, "choices must map modules to options"),
        ({"choices": {"body.*": "dense"}}, InvalidArgument, "must be a list such as"),
        ({"choices": {"boddy.*": ["dense"]}}, UnknownName, "the nearest names are body"),
        ({"choices": {"body.*": ["dense", "gost"]}}, UnknownName, "did you mean 'ghost'"),
        ({"at": ["boddy.1"]}, UnknownName, "did you mean"),
        ({"head": "stem"}, InvalidArgument, "head must name a linear layer"),
        ({"data": {}}, InvalidArgument, "at least one task"),
        ({"data": {"1": (X, Y)}}, InvalidArgument, "a task must be a name such as 'ten', got '1'"),
        ({"data": X}, BadData, "the rows of the task 'task' must have labels"),
        ({"data": (X, Y + 5)}, BadData, "labels of the task 'task' must be 0 to 2, got 5 to 6"),
        ({"development": X}, BadData, "must have labels"),
        ({"development": {"two": (X, Y)}}, InvalidArgument, "must have rows for the task 'three'"),
        ({"development": (X, Y + 2)}, BadData, "development rows of 'three' must be 0 to 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        searched(**{"steps": 6, **changes})


class Doubled(nn.Module):
    """Its logits come from no linear layer alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return 2 * self.fc(x.flatten(1))


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(BadNetwork, match="must end in a linear layer that gives the logits"):
        searched(model=Doubled().eval(), choices={"fc": ["dense"]}, at=[])


def test_skip_is_an_option_of_the_shelf(found):
    places = zip(found.supernet.options, found.supernet.names, strict=True)
    for options, names in places:
        assert isinstance(options[names.index("skip")], Skip)
    assert found.best.threshold <= inf
