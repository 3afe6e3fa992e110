"""Random ways: every arm and every exit learns, and gates stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument

X = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


def network() -> off.Network:
    torch.manual_seed(0)
    steps = [
        ("stem", nn.Linear(5, 8).eval()),
        off.Leave("early", "linear", "margin"),
        off.Fork("way", {"skip": [], "unit": nn.Linear(8, 8).eval()}),
        ("head", nn.Linear(8, 2).eval()),
    ]
    return off.route(steps, example=X[:4])


def test_all_paths_learn_and_the_gate_does_not():
    net = network()
    before = [value.clone() for value in net.gates.parameters()]
    history = off.fit(net, (X, Y), recipe="random_ways", epochs=15, rate=0.02, progress=False)
    for logits in net(X):
        assert (logits.argmax(1) == Y).float().mean() > 0.9
    assert all(torch.equal(a, b) for a, b in zip(net.gates.parameters(), before, strict=True))
    assert {"loss/early", "loss/head"} <= set(history.epochs[0].figures)


def test_exits_alone():
    net = network()
    stem = net.backbone["stem"].weight.clone()
    off.fit(net, (X, Y), recipe="random_ways", epochs=1, models=False, progress=False)
    assert torch.equal(net.backbone["stem"].weight, stem)


def test_what_it_cannot_train():
    with pytest.raises(InvalidArgument, match="norm must be one of"):
        off.fit(network(), (X, Y), recipe="random_ways", norm="no", progress=False)
    fork = off.Fork("f", {"s": [], "t": nn.Tanh().eval()})
    steps = [("a", nn.Flatten().eval()), fork, ("b", nn.ReLU().eval())]
    bare = off.route(steps, example=X[:4])
    with pytest.raises(BadNetwork, match="no parameters to train"):
        off.fit(bare, (X, Y), recipe="random_ways", models=True, progress=False)
    cut = off.cut(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)).eval(), X[:4], at=["0"])
    with pytest.raises(BadNetwork, match="is cut"):
        off.fit(cut, (X, Y), recipe="random_ways", progress=False)
