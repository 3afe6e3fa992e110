"""Layers keep the contract, and the kit notices those that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from offramp.contracts import Layer
from offramp.errors import BadNetwork
from offramp.layers.adaptive_depth import AdaptiveDepth
from offramp.layers.residual import Block
from offramp.networks.layer import LayerCost, dense_cost
from offramp.testing import check_layer
from small import seeded


def stage():
    """Three units on signals [B, 4, 9]."""
    return seeded(
        lambda: nn.Sequential(
            *(
                nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
                for _ in range(3)
            )
        ),
        0,
    ).eval()


def test_adaptive_depth():
    check_layer(AdaptiveDepth, stage(), (4, 9))
    check_layer(AdaptiveDepth, stage(), (4, 9), eps=0.1, width=4)


def test_adaptive_depth_has_the_units_of_the_stage_and_costs_all_of_them():
    dense = stage()
    layer = AdaptiveDepth.from_layer(dense)
    x = torch.randn(2, 4, 9)
    assert torch.equal(layer.units[0](x), dense[0](x))
    assert layer.cost((4, 9)).macs > dense_cost(dense, (4, 9)).macs == 3 * 4 * 4 * 3 * 9
    assert (
        AdaptiveDepth.from_layer(stage().double().train()).halts[0].near.weight.dtype
        == torch.float64
    )


@pytest.mark.parametrize(
    "dense", [nn.Linear(3, 3), nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())]
)
def test_adaptive_depth_refuses_what_it_cannot_replace(dense):
    with pytest.raises(BadNetwork, match="must"):
        AdaptiveDepth.from_layer(dense)


def test_the_cost_of_what_runs_as_it_stands():
    layer = nn.Linear(5, 3).train()
    found = dense_cost(layer, (5,))
    assert found == LayerCost(15.0, 15.0 * 32 * 32, 4 * 18)
    assert layer.training
    assert dense_cost(layer.half(), (5,)).stored_bytes == 2 * 18


class Same(Layer):
    """What it replaces, as it is."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    @classmethod
    def from_layer(cls, dense, **options):
        return cls(copy.deepcopy(dense)).train(dense.training)

    def forward(self, x):
        return self.dense(x)

    def cost(self, shape):
        return dense_cost(self, shape)


def test_a_layer_of_ones_own():
    check_layer(Same, nn.Linear(4, 3).eval(), (4,), same=True)


def cheaper(self, shape):
    return LayerCost(0.0, 0.0, 10**6)


def smaller(self, shape):
    return LayerCost(1e9, 1e9, 1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"from_layer": classmethod(lambda cls, dense: cls(dense).eval())}, "shares weights"),
        (
            {"from_layer": classmethod(lambda cls, dense: cls(copy.deepcopy(dense)).train())},
            "eval mode",
        ),
        ({"from_layer": classmethod(lambda cls, dense: cls(nn.Linear(4, 2)).eval())}, "shape"),
        (
            {"from_layer": classmethod(lambda cls, dense: cls(nn.Linear(4, 3)).eval())},
            "replaces give differ",
        ),
        ({"forward": lambda self, x: self.dense(x - x.mean(0))}, "differ"),
        ({"cost": cheaper}, "says 0 MACs and runs 12"),
        ({"cost": smaller}, "says 1 bytes"),
    ],
)
def test_the_kit_notices(changed, says):
    with pytest.raises(AssertionError, match=says):
        check_layer(type("Odd", (Same,), changed), nn.Linear(4, 3).eval(), (4,), same=True)


class Inner(Layer):
    """Two linear layers of an inner width, which it does not tell."""

    def __init__(self, dense, width):
        super().__init__()
        self.both = nn.Sequential(
            nn.Linear(dense.in_features, width), nn.Linear(width, dense.out_features)
        )

    @classmethod
    def from_layer(cls, dense, *, width=3):
        return cls(dense, width).train(dense.training)

    def forward(self, x):
        return self.both(x)

    def cost(self, shape):
        return dense_cost(self, shape)


class Told(Inner):
    def options(self):
        return {"width": self.both[0].out_features}


def test_the_kit_notices_options_that_do_not_tell_the_shapes():
    check_layer(Inner, nn.Linear(4, 3).eval(), (4,))
    check_layer(Told, nn.Linear(4, 3).eval(), (4,), width=2)
    with pytest.raises(AssertionError, match=r"options\(\) must name what the shapes depend on"):
        check_layer(Inner, nn.Linear(4, 3).eval(), (4,), width=2)


@pytest.mark.parametrize("per", ["position", "sample"])
def test_adaptive_depth_on_images(per):
    dense = seeded(lambda: nn.Sequential(Block(4, 8), Block(8, 8), Block(8, 8)), 0).eval()
    options = {"per": per, "bias": 0.0, "break_even": 1.0, "tile": 2}
    check_layer(AdaptiveDepth, dense, (4, 8, 8), **options)
    check_layer(AdaptiveDepth, dense, (4, 8, 8), per=per, bias=-40.0, same=True)
    layer = AdaptiveDepth.from_layer(dense, per=per)
    first = 4 * 4 * 9 * (4 * 8 + 8 * 8)
    others = 2 * 4 * 4 * 9 * 2 * 8 * 8
    heads = 2 * (8 + (4 * 4 * 9 * 8 if per == "position" else 0))
    assert layer.cost((4, 8, 8)).macs == first + others + heads
