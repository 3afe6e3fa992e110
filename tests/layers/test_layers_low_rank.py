"""Low rank: exact at full rank, the best approximation below it, honest refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.low_rank import LowRank
from offramp.networks.layer import SavesNothing
from offramp.testing import check_layer
from small import seeded


def convolution(**options):
    """Six channels to eight, of rank at most three."""
    layer = seeded(lambda: nn.Conv2d(6, 8, 3, padding=1, **options), 0).eval()
    draw = torch.Generator().manual_seed(1)
    thin = torch.randn(8, 3, generator=draw) @ torch.randn(3, 54, generator=draw)
    with torch.no_grad():
        layer.weight.copy_(thin.view(8, 6, 3, 3))
    return layer


@pytest.mark.parametrize(
    ("dense", "shape", "options"),
    [
        (convolution(), (6, 5, 7), {"rank": 3}),
        (convolution(stride=2), (6, 5, 7), {"energy": 1.0}),
        (convolution(bias=False, dilation=2), (6, 9, 9), {"energy": 0.9999999}),
        (seeded(lambda: nn.Linear(5, 4), 0).eval(), (5,), {"rank": 4}),
    ],
)
def test_it_is_exact_where_the_rank_is_enough(dense, shape, options):
    check_layer(LowRank, dense, shape, same=True, **options)


def test_energy_chooses_the_smallest_rank_that_keeps_it():
    layer = nn.Linear(20, 20, bias=False).eval()
    values = torch.tensor([3.0, 2.0, 1.0] + 17 * [0.0])
    with torch.no_grad():
        layer.weight.copy_(torch.diag(values))
    kept = {0.5: 1, 9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.95: 3, 1.0: 3}
    for energy, rank in kept.items():
        assert LowRank.from_layer(layer, energy=energy).options() == {"rank": rank}
    error = (LowRank.from_layer(layer, rank=2)(torch.eye(20)) - layer(torch.eye(20))).norm().item()
    assert error == pytest.approx(1.0, abs=1e-5)  # the value that was left out


def test_it_costs_what_its_two_layers_do():
    layer = LowRank.from_layer(convolution(), rank=2)
    assert layer.cost((6, 5, 7)).macs == 35 * (6 * 9 * 2 + 2 * 8)
    assert layer.cost((6, 5, 7)).stored_bytes == 4 * (6 * 9 * 2 + 2 * 8 + 8)


def test_it_keeps_mode_and_type():
    layer = LowRank.from_layer(convolution().double().train(), rank=2)
    assert layer.training
    assert layer.first.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("dense", "options", "error", "says"),
    [
        (nn.ReLU(), {}, BadNetwork, "replaces a Conv2d or a Linear layer, got ReLU"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, BadNetwork, "grouped convolution, got groups=2"),
        (nn.Linear(4, 4), {"rank": 5}, InvalidArgument, "rank must be at most 4"),
        (
            nn.Linear(4, 4),
            {"rank": -1},
            InvalidArgument,
            "rank must be a whole number of at least 1",
        ),
        (nn.Linear(4, 4), {"energy": 1.5}, InvalidArgument, "energy must be above 0 and at most 1"),
        (
            nn.Linear(8, 8),
            {"rank": 2, "energy": 0.9},
            InvalidArgument,
            "energy must be left out beside rank, got energy=0.9 and rank=2",
        ),
        (nn.Linear(4, 4), {"energy": "all"}, InvalidArgument, "energy must be a number above 0"),
        (nn.Linear(4, 4), {"energy": 1.0}, SavesNothing, "needs rank"),
    ],
)
def test_what_it_refuses(dense, options, error, says):
    with pytest.raises(error, match=says):
        LowRank.from_layer(dense, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    layer = convolution()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = value
    with pytest.raises(BadNetwork, match="low_rank needs finite weights"):
        LowRank.from_layer(layer)
