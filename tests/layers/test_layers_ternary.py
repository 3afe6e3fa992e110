"""Ternary layers: three values, the pull towards them, re-scaled gradients, two bits a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.ternary import Ternary, ternary
from offramp.networks.layer import dense_cost
from offramp.testing import check_layer
from small import seeded


def convolution(**options):
    return seeded(lambda: nn.Conv2d(6, 8, 3, padding=1, **options), 0).eval()


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (convolution(stride=2), (6, 7, 8)),
        (convolution(groups=2, bias=False), (6, 7, 8)),
        (seeded(lambda: nn.Linear(9, 4), 0).eval(), (9,)),
    ],
)
def test_it_keeps_the_contract_and_runs_as_a_dense_layer(dense, shape):
    check_layer(Ternary, dense, shape)
    layer = Ternary.from_layer(dense)
    assert layer.cost(shape).bit_operations == dense_cost(dense, shape).bit_operations


def test_three_values_in_each_channel():
    layer = Ternary.from_layer(convolution())
    for channel in layer.used():
        assert len(channel.unique()) == 3
    assert 0.2 < layer.sparsity() < 0.6


def test_threshold_and_scale():
    weight = torch.tensor([[1.0, -3.0, 0.5, 3.5]])
    signs, scale = ternary(weight)  # the threshold is 0.7 x 2
    assert signs.tolist() == [[0.0, -1.0, 0.0, 1.0]]
    assert scale.tolist() == [3.25]


def test_float_and_pulled_while_it_is_warm():
    layer = Ternary.from_layer(convolution()).train()
    layer.anneal(0.125)
    assert layer.used() is layer.weight
    away = layer.penalty()
    signs, scale = ternary(layer.weight)
    goal = (signs * scale.view(-1, 1, 1, 1)).flatten()
    cosine = torch.nn.functional.cosine_similarity(layer.weight.flatten(), goal, 0)
    assert away.item() == pytest.approx(0.5 * (1 - cosine.item()))
    steps = torch.optim.SGD(layer.parameters(), 0.5)
    for _ in range(50):
        steps.zero_grad()
        layer.penalty().backward()
        steps.step()
    assert layer.penalty() < 0.5 * away
    layer.anneal(0.3)
    assert layer.penalty() is None


def test_the_gradient_is_rescaled_with_mean_one():
    layer = Ternary.from_layer(convolution(bias=False)).train()
    for done in (0.25, 1.0):
        layer.anneal(done)
        layer.zero_grad()
        layer.used().sum().backward()
        slopes = layer.weight.grad.flatten(1)
        assert torch.allclose(slopes.mean(1), torch.ones(8), atol=1e-5)
    size = layer.weight.detach().abs()
    near = (size - 0.7 * size.flatten(1).mean(1).view(-1, 1, 1, 1)).abs()
    channel = near[0].flatten()
    assert slopes[0].argmax() == channel.argmin()  # the weight nearest to the threshold moves most
    assert slopes[0].argmin() == channel.argmax()


@pytest.mark.parametrize(
    ("dense", "options", "error", "says"),
    [
        (nn.ReLU(), {}, BadNetwork, "replaces a Conv2d or a Linear layer, got ReLU"),
        (nn.Conv2d(2, 2, 3, padding="same"), {}, BadNetwork, "pad with zeros, by numbers"),
        (nn.Conv2d(2, 2, 3, padding_mode="circular"), {}, BadNetwork, "pad with zeros, by numbers"),
        (
            nn.Linear(2, 2),
            {"warm": 1.5},
            InvalidArgument,
            "warm must be at least 0 and below 1, got 1.5",
        ),
    ],
)
def test_what_it_refuses(dense, options, error, says):
    with pytest.raises(error, match=says):
        Ternary.from_layer(dense, **options)
