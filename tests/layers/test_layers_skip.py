"""`skip`: nothing in the place of a block that gives the shape that it gets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork
from offramp.layers.residual import Block
from offramp.layers.skip import Skip
from offramp.networks.layer import LayerCost
from offramp.testing import check_layer
from small import seeded

X = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def net():
    return seeded(lambda: nn.Sequential(Block(4, 4), Block(4, 8), nn.Flatten()), 0).eval()


def test_it_keeps_the_contract_and_computes_nothing():
    check_layer(Skip, seeded(lambda: Block(4, 4), 0).eval(), (4, 8, 8))
    layer = Skip.from_layer(Block(4, 4).train())
    assert layer.training
    assert layer(X) is X
    assert layer.cost((4, 8, 8)) == LayerCost(0.0, 0.0, 0)


def test_a_model_without_a_block():
    model = net()
    made = off.convert(model, {"0": "skip"}, example=X)
    assert torch.equal(made(X), model[1:](X))
    assert [one.name for one in off.inspect(made, X, original=model).changes] == ["0", ""]


def test_where_shapes_change_it_is_refused():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2)).eval()
    with pytest.raises(BadNetwork, match="the converted model fails on the example"):
        off.convert(model, {"0": "skip"}, example=torch.zeros(2, 8))
