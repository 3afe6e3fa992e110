"""Residual units that rows may skip."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.layers.preprocess import Preprocess
from offramp.models.cifar_resnet import CifarResNet

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(3).eval()


@pytest.fixture(scope="module")
def net(model):
    before = copy.deepcopy(model.state_dict())
    made = off.cut(model, X, skip=["layer2.*", "layer3.*"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return made


def test_units_that_change_the_shape_stay(net):
    assert net.topology.gates == (
        "skip-layer2-1",
        "skip-layer2-2",
        "skip-layer3-1",
        "skip-layer3-2",
    )
    assert len(net.topology.paths["end"]) == 16
    assert str(net).splitlines()[2:5] == [
        "skip-layer2-1: chooses by controller",
        "├─ (skips)",
        "└─ layer2-1",
    ]


@pytest.mark.parametrize("kind", [set, frozenset])
def test_the_units_of_a_set_are_saved_in_order(model, kind):
    units = ["layer3.2", "layer2.1", "layer1.1", "layer1.2", "layer3.1"]
    made = off.cut(model, X, skip=kind(units))
    assert made.whole.units == tuple(sorted(units))
    assert off.cut(model, X, skip=units).whole.units == tuple(units)


def test_nobody_skips_and_it_is_the_model(model, net):
    with torch.no_grad():
        torch.testing.assert_close(off.run(net, off.Plan.by_hand({}), X).logits, model(X))


def test_who_skips_is_spared_the_unit(model, net):
    plan = off.Plan.by_hand({"skip-layer2-1": -float("inf"), "skip-layer3-2": -float("inf")})
    with torch.no_grad():
        h = torch.relu(model.bn1(model.conv1(X)))
        h = model.layer2[2](model.layer2[0](model.layer1(h)))
        h = model.layer3[1](model.layer3[0](h))
        torch.testing.assert_close(off.run(net, plan, X).logits, model.linear(h.mean((2, 3))))
    trace = off.record(net, X, timed=False, progress=False)
    assert trace.price(plan).mean < trace.price(plan).plain * 0.9


def test_weights_are_shared_and_trained(model):
    own = copy.deepcopy(model)
    net = off.cut(own, X, skip="layer3.*")
    assert {id(value) for value in own.parameters()} <= {id(value) for value in net.parameters()}
    before = own.conv1.weight.clone()
    means = own.bn1.running_mean.clone()
    off.fit(net, (X, torch.arange(8)), recipe="gumbel?epochs=1&rate=0.01", progress=False)
    assert not torch.equal(own.conv1.weight, before)
    assert torch.equal(own.bn1.running_mean, means)


def test_with_preprocessing(model):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    preprocess = Preprocess(mean=(0.5,), std=(0.2,))
    net = off.cut(model, images, skip="layer3.2", preprocess=preprocess)
    assert net.topology.gates == ("skip-layer3-2",)
    with torch.no_grad():
        torch.testing.assert_close(
            off.run(net, off.Plan.by_hand({}), images).logits, model(preprocess(images))
        )


@pytest.mark.parametrize(
    ("options", "problem", "says"),
    [
        ({"skip": "layer9.*"}, UnknownName, "module of this model called 'layer9"),
        ({"skip": "layer3.0"}, BadNetwork, "must give the shape that it takes"),
        ({"skip": []}, InvalidArgument, "skip must be a name"),
        ({"skip": 5}, InvalidArgument, "skip must be a name.*, got 5"),
        ({"skip": "layer3.*", "at": ["layer1"]}, InvalidArgument, "at must be None with skip="),
    ],
)
def test_bad_input(model, options, problem, says):
    with pytest.raises(problem, match=says):
        off.cut(model, X, **options)
