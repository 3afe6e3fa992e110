"""What is said about inputs that a model refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadData, BadNetwork
from offramp.plans.plan import Plan


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.a(x).mean((2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(9, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.a(x).mean(1))


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)
WRONG = {
    "bytes": (Conv, IMAGES, r"preprocess=off.make_preprocess\('imagenet'\)"),
    "float64": (Conv, IMAGES / 255.0, r"these rows are float64; .*x.astype\('float32'\)"),
    "channels last": (
        Conv,
        IMAGES.transpose(0, 2, 3, 1).astype("float32"),
        r"x.transpose\(0, 3, 1, 2\)",
    ),
    "floats for words": (Words, np.ones((6, 5), np.float32), r"x.astype\('int64'\)"),
    "another width": (
        Conv,
        np.zeros((6, 5, 8, 8), np.float32),
        "of (its shape and type|the type and shape)",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_has_its_own_advice_wherever_it_is_met(kind):
    make, x, says = WRONG[kind]
    model = make().eval()
    net = off.ladder({"a": model, "b": model}).eval()
    labels = np.zeros(len(x), int)
    calls = {
        "cut": lambda: off.cut(model, x, at=["a"]),
        "ladder": lambda: off.ladder({"a": model, "b": model}, example=x),
        "record": lambda: off.record(net, (x, labels), timed=False, progress=False),
        "fit": lambda: off.fit(net, (x, labels), recipe="joint", progress=False),
        "run": lambda: off.run(net, Plan.by_hand({"a": 1.0}), x),
    }
    for call in calls.values():
        with pytest.raises(BadData, match=says):
            call()


def test_the_advice_works():
    from offramp.building.factories import make_preprocess

    model = Conv().eval()
    preprocess = make_preprocess("imagenet")
    assert off.cut(model, IMAGES, at=["a"], preprocess=preprocess).topology.exits == (
        "a",
        "backbone",
    )
    net = off.ladder({"a": (model, preprocess), "b": (model, preprocess)}, example=IMAGES)
    assert len(off.record(net, IMAGES, timed=False, progress=False)) == 6


class Several(Conv):
    """Answers with the logits of its own exits."""

    def forward(self, x):
        logits = super().forward(x)
        return [logits, logits * 2]


def test_a_network_with_exits_of_its_own_is_told_where_to_read():
    model = Several().eval()
    for call in (
        lambda: off.cut(model, IMAGES / np.float32(255), at=["a"]),
        lambda: off.ladder({"a": model, "b": model}, example=IMAGES / np.float32(255)),
    ):
        with pytest.raises(
            BadNetwork, match=r"must give logits .*docs/how-to/my-network-already-has-exits.md"
        ):
            call()


class Two(nn.Module):
    """Two inputs by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, a, b):
        return self.head(torch.relu(self.body(a + b)))


def _opposite_order(x):
    return x.astype(x.dtype.newbyteorder())


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("change", [lambda x: x[::-1].copy()[::-1], _opposite_order])
def test_arrays_that_torch_cannot_share_are_copied(engine, change):
    """Reversed arrays, and arrays in another byte order, are arrays like any other."""
    if engine != "torch":
        pytest.importorskip(engine)
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((6, 4), np.float32)
    one = off.cut(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), x[:2], at=["1"]
    )
    two = off.cut(Two().eval(), {"a": x[:2], "b": x[:2]}, at=["body"])
    for net, given in ((one, x), (two, {"a": x, "b": x})):
        plan = Plan.by_hand({net.topology.nodes[0].name: 0.4})
        runner = off.open(net, plan, engine=engine, example=given)
        reference = runner(given).logits
        if isinstance(given, dict):
            changed = {name: change(value) for name, value in given.items()}
        else:
            changed = change(given)
        assert torch.equal(runner(changed).logits, reference)
