"""Tucker-2: exact at full ranks, plain convolutions, better than its start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.tucker import Tucker
from offramp.networks.layer import SavesNothing
from offramp.testing import check_layer
from small import seeded


def convolution(**options):
    return seeded(lambda: nn.Conv2d(6, 8, 3, padding=1, **options), 0).eval()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "bias": False}, {"dilation": 2}])
def test_full_ranks_give_the_dense_convolution(options):
    check_layer(Tucker, convolution(**options), (6, 7, 9), same=True, rank_in=6, rank_out=8)


def test_the_kernel_of_all_three_is_near_the_dense_one():
    dense = convolution(bias=False)
    wanted = dense.weight.detach()
    errors = []
    for rank in (2, 4, 6):
        layer = Tucker.from_layer(dense, rank_in=rank, rank_out=rank)
        assert layer.options() == {"rank_in": rank, "rank_out": rank}
        assert [type(part) for part in layer.children()] == [nn.Conv2d] * 3
        kernel = torch.einsum(
            "or,rshw,sc->ochw",
            layer.last.weight[:, :, 0, 0],
            layer.core.weight,
            layer.first.weight[:, :, 0, 0],
        )
        errors.append(((kernel - wanted) ** 2).sum().item())
    assert errors[0] > errors[1] > errors[2]
    unfolded = torch.linalg.svdvals(wanted.flatten(1))
    assert errors[0] >= (unfolded[2:] ** 2).sum().item() - 1e-6  # no rank-2 factor can do better


def test_it_costs_what_the_sheet_of_the_method_says():
    layer = Tucker.from_layer(convolution(stride=2), rank_in=3, rank_out=4)
    high = 8
    wide = 10
    want = high * wide * (6 * 3 + 3 * 4 * 9 / 4 + 4 * 8 / 4)
    assert layer.cost((6, high, wide)).macs == want


def test_energy_chooses_ranks():
    dense = nn.Conv2d(16, 16, 3, bias=False)
    draw = torch.Generator().manual_seed(0)
    outer = torch.randn(16, 2, generator=draw)
    inner = torch.randn(16, 3, generator=draw)
    core = torch.randn(2, 3, 3, 3, generator=draw)
    with torch.no_grad():
        dense.weight.copy_(torch.einsum("or,rshw,cs->ochw", outer, core, inner))
    layer = Tucker.from_layer(dense.eval(), energy=0.999999)
    assert layer.options() == {"rank_in": 3, "rank_out": 2}


@pytest.mark.parametrize(
    ("dense", "options", "error", "says"),
    [
        (nn.Linear(4, 4), {}, BadNetwork, "replaces a Conv2d, got Linear"),
        (nn.Conv2d(4, 4, 3, groups=4), {}, BadNetwork, "grouped convolution, got groups=4"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), {}, BadNetwork, "pad with zeros"),
        (nn.Conv2d(4, 4, 3), {"rank_in": 5}, InvalidArgument, "rank_in must be at most 4"),
        (nn.Conv2d(4, 4, 1), {"energy": 1.0}, SavesNothing, "has 48 weights"),
        (
            nn.Conv2d(4, 4, 3),
            {"rank_in": 2, "rank_out": 3, "energy": 0.5},
            InvalidArgument,
            "energy must be left out beside rank_in and rank_out, got energy=0.5 and rank_in=2, "
            "rank_out=3",
        ),
    ],
)
def test_what_it_refuses(dense, options, error, says):
    with pytest.raises(error, match=says):
        Tucker.from_layer(dense, **options)


def test_an_energy_may_choose_the_other_rank():
    layer = Tucker.from_layer(nn.Conv2d(8, 8, 3).eval(), rank_in=2, energy=0.5)
    assert layer.options()["rank_in"] == 2
    assert layer.options()["rank_out"] < 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    layer = convolution()
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = value
    with pytest.raises(BadNetwork, match="tucker needs finite weights"):
        Tucker.from_layer(layer)
