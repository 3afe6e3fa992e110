"""Every gate on the shelf keeps the contract, and the kit notices those that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from offramp._support import find
from offramp.building.factories import make_gate
from offramp.gates.commitment import Commitment
from offramp.gates.controller import Controller
from offramp.gates.tempered import Tempered
from offramp.networks.nodes import Gate
from offramp.testing import check_gate, example_seen

READS = ("a", "b")
FEATURES = example_seen().features.shape[1]
MADE = {
    "Tempered": lambda: Tempered(make_gate("margin"), 1.5),
    "Commitment": lambda: Commitment(5, 5),
    "Controller": lambda: Controller(FEATURES, 2),
    "controller": lambda: make_gate("controller", shape=(FEATURES,)),
}  # those that need arguments


LOOK_AT_INPUTS = {
    "Predictor",
    "predictor",
    "Ended",
}  # tests/gates/test_gates_choosing.py and test_gates_ended.py


@pytest.mark.parametrize("name", sorted({*find.names("gates")} - LOOK_AT_INPUTS))
def test_the_shelf(name):
    gate = MADE[name]() if name in MADE else make_gate(name, READS)
    check_gate(gate, example_seen(reads=gate.reads), make_gate)


@pytest.mark.parametrize("inner", ["margin", "max_prob", "neg_entropy"])
def test_tempered_gates(inner):
    for temperature in (0.05, 1.0, 40.0):
        check_gate(
            Tempered(Tempered(make_gate(inner), 2.0), temperature), example_seen(), make_gate
        )


class Odd(Gate):
    """A gate with one thing wrong."""

    def __init__(self, score=None, reads=(), config=None):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.rule = score or (lambda self, own: own[:, 0])
        self.reads = reads
        self.plain = config or {"name": "Odd"}

    def score(self, seen):
        return self.rule(self, seen.own)

    def config(self):
        return self.plain


def counting(self, own):
    self.count += 1
    return own[:, 0]


def in_place(self, own):
    own[0, 0] += 1
    return own[:, 0].clone()


def training(self, own):
    self.train(not self.training)
    return own[:, 0]


def breaks(self, own):
    if own.isnan().any():
        raise ValueError("NaN")
    return own[:, 0]


WRONG = {
    "shape": (lambda self, own: own[:, :1], "shape"),
    "a scalar": (lambda self, own: own.mean(), "shape"),
    "double": (lambda self, own: own[:, 0].double(), "float32"),
    "integers": (lambda self, own: own.argmax(1), "float32"),
    "NaN": (lambda self, own: own[:, 0] / 0 * 0, "NaN"),
    "ranks": (lambda self, own: own[:, 0].argsort().argsort().float(), "batch"),
    "normalised over the batch": (lambda self, own: own[:, 0] - own[:, 0].mean(), "batch"),
    "the place in the batch": (lambda self, own: torch.arange(len(own)).float(), "batch"),
    "random": (lambda self, own: torch.rand(len(own)), "random"),
    "counting": (counting, "count"),
    "in place": (in_place, "two different|in place"),
    "training": (training, "training mode"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_kit_notices(name):
    rule, says = WRONG[name]
    with pytest.raises(AssertionError, match=says):
        check_gate(Odd(rule), example_seen())


def test_the_kit_notices_rows_of_nan():
    with pytest.raises(ValueError, match="NaN"):
        check_gate(Odd(breaks), example_seen())
    with pytest.raises(AssertionError, match="beside rows of NaN"):
        check_gate(
            Odd(lambda self, own: own[:, 0] + 0 * own.sum().nan_to_num(1e9) + own.isnan().any()),
            example_seen(),
        )


def test_the_kit_notices_reads():
    with pytest.raises(AssertionError, match="tuple of names"):
        check_gate(Odd(reads=["a"]), example_seen())
    with pytest.raises(AssertionError, match="make the example"):
        check_gate(Odd(reads=("a",)), example_seen())
    check_gate(Odd(reads=("a",)), example_seen(reads=("a",)))


def test_the_kit_notices_configs():
    check_gate(Odd(), example_seen(), lambda config: Odd())
    with pytest.raises(AssertionError, match="under 'name'"):
        check_gate(Odd(config={"kind": "Odd"}), example_seen(), lambda config: Odd())
    with pytest.raises(AssertionError, match="another config"):
        check_gate(Odd(), example_seen(), lambda config: Odd(config={"name": "Odd", "a": 1}))
    with pytest.raises(AssertionError, match="made from its config"):
        check_gate(Odd(), example_seen(), lambda config: Odd(lambda self, own: own[:, 1]))
    with pytest.raises(TypeError):
        check_gate(Odd(config={"name": nn.ReLU()}), example_seen(), lambda config: Odd())


def test_a_good_gate_of_ones_own_passes():
    check_gate(Odd(), example_seen())
    check_gate(copy.deepcopy(Odd(lambda self, own: own.amax(-1))), example_seen(rows=5, classes=2))
