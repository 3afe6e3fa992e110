"""Every exit on the shelf keeps the contract, and the kit notices those that do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp._support import find
from offramp.building.factories import make_exit
from offramp.errors import BadNetwork
from offramp.exits.added import Added
from offramp.exits.attentive import Attentive, Squeezed
from offramp.exits.branch import Branch
from offramp.exits.branchynet import Normed, Residual
from offramp.exits.cascade import Cascade, CascadeConv
from offramp.exits.inline import Inline
from offramp.exits.pooled import Pooled
from offramp.exits.sdn import Internal
from offramp.exits.selective import Selective, selective
from offramp.exits.strided import Strided
from offramp.exits.surest import Surest
from offramp.exits.whole import Mean
from offramp.networks.nodes import Exit
from offramp.testing import check_exit, example_seen
from small import seeded

MADE = {
    "Strided": lambda: Strided((2, 5, 6), 3, None),
    "Added": lambda: Added(Pooled("flat", 5, 3), "before", 0.25),
    "Inline": lambda: Inline(Pooled("flat", 5, 3), "before"),
    "Mean": lambda: Mean("before", 2),
    "Surest": lambda: Surest(("a", "b")),
    "Internal": lambda: Internal((2, 8, 13), 3),
    "Cascade": lambda: Cascade("flat", 5, 3, before="a", place=2, norm=True),
    "CascadeConv": lambda: CascadeConv((2, 8, 13), 3, stride=2),
    "Pooled": lambda: Pooled("flat", 5, 3, (4, 4)),
    "Branch": lambda: Branch((2, 5, 6), 3, (4, 3)),
    "Normed": lambda: Normed((2, 5, 6), 3, (4, 3), first=3),
    "Attentive": lambda: Attentive((2, 9, 8), 3, 2),
    "Squeezed": lambda: Squeezed((2, 9, 8), 3, 4),
    "Selective": lambda: Selective("mean", 5, 3, before="a", place=2, channels=3, inner=4),
    "selective": lambda: selective((2, 5, 6), 3, ()),
    "Residual": lambda: Residual((2, 5, 6), 3, 2),
}  # those that need other arguments than (shape, classes)
IMAGES = [(2, 5, 6), (1, 1, 1)]
MAPS = [*IMAGES, (2, 8, 13)]
SHAPES = {
    "linear_masked": [(6, 5), (1, 2)],
    "Branch": [(2, 5, 6)],
    "branch": IMAGES,
    "b_lenet": IMAGES,
    "Normed": [(2, 5, 6)],
    "Residual": [(2, 5, 6)],
    "Attentive": [(2, 9, 8)],
    "Squeezed": [(2, 9, 8)],
    "attentive": IMAGES,
    "bottleneck": IMAGES,
    "linear_peaks": [(2, 3), (4, 61), (1, 1), (5,)],
    "Selective": [(5,), (5, 2, 3)],
    "selective": [(2, 5, 6)],
    "b_alexnet": [(2, 5, 6)],
    "b_alexnet_1": [(2, 5, 6)],
    "b_alexnet_2": [(2, 5, 6)],
    "b_resnet": IMAGES,
    "b_resnet_1": IMAGES,
    "b_resnet_2": IMAGES,
    "Own": [None],
    "own": [(3,)],
    "Mean": [None],
    "Pooled": [(5,)],
    "Added": [(5,)],
    "Inline": [(5,)],
    "Strided": [(2, 5, 6)],
    "strided": [(2, 5, 6)],
    "strided_wide": [(2, 5, 6), (3, 8, 8)],
    "Surest": [None],
    "Cascade": [(5,)],
    "CascadeConv": [(2, 8, 13)],
    "Internal": [(2, 8, 13)],
    "sdn": MAPS,
    "cascade_conv": MAPS,
}
READS = ("a",)


def rebuild(config):
    arguments = {
        key: rebuild(value) if key == "exit" else value
        for key, value in config.items()
        if key != "name"
    }
    return find.shelved("exits", config["name"])(**arguments)


def made(name, shape):
    if name in MADE:
        return MADE[name]()
    found = find.find("exits", name)
    return found() if isinstance(found, type) else make_exit(name, shape, 3, READS)


OF_A_MODEL = {
    "Adopted",
    "Shared",
}  # their heads are modules of a model: test_adopting.py, test_reading.py in building


@pytest.mark.parametrize("name", [name for name in find.names("exits") if name not in OF_A_MODEL])
def test_the_shelf(name):
    for shape in SHAPES.get(name, [(5,), (2, 3), (2, 5, 6), (2, 1, 1), (2, 3, 4, 5)]):
        exit_ = seeded(lambda shape=shape: made(name, shape), 0).eval()
        check_exit(exit_, example_seen(reads=exit_.reads, classes=3, shape=shape), rebuild)


class Odd(Exit):
    """An exit with one thing wrong."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def forward(self, seen):
        return self.rule(seen)

    def config(self):
        return {"name": "Odd"}


@pytest.mark.parametrize(
    ("rule", "error", "says"),
    [
        (lambda seen: seen.features[:, 0], BadNetwork, "must give logits"),
        (lambda seen: seen.features[:, :1], BadNetwork, "two classes"),
        (lambda seen: seen.features[:3], AssertionError, "shape"),
        (lambda seen: seen.features.half(), AssertionError, "float32"),
        (lambda seen: seen.features.log(), AssertionError, "finite"),
        (lambda seen: seen.features - seen.features.mean(0), AssertionError, "batch"),
        (lambda seen: seen.features + torch.rand(1), AssertionError, "random"),
        (lambda seen: seen.own + 1, TypeError, "NoneType"),
    ],
)
def test_the_kit_notices(rule, error, says):
    with pytest.raises(error, match=says):
        check_exit(Odd(rule), example_seen())


def test_a_batch_norm_in_training_mode_mixes_rows():
    norm = nn.BatchNorm1d(5)
    with pytest.raises(AssertionError):
        check_exit(Odd(lambda seen: norm(seen.features)), example_seen())
    norm.eval()
    check_exit(Odd(lambda seen: norm(seen.features)), example_seen())


@pytest.mark.parametrize("shape", [(5,), (2, 4, 9)])
def test_strided_convolutions_need_room(shape):
    with pytest.raises(BadNetwork, match="5 x 5"):
        Strided(shape, 3)
