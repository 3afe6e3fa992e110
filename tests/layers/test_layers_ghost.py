"""Ghost modules: the shapes and costs of the paper, timm's numbers, the start from dense
weights.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.ghost import Ghost, GhostBottleneck, GhostModule
from offramp.testing import check_layer
from packages import real
from small import seeded


def convolution(**options):
    return seeded(lambda: nn.Conv2d(6, 9, 3, padding=1, **options), 0).eval()


@pytest.mark.parametrize("ratio", [2, 4, 9])
def test_it_keeps_the_contract(ratio):
    check_layer(Ghost, convolution(stride=2), (6, 7, 8), ratio=ratio)
    check_layer(Ghost, convolution(bias=False), (6, 7, 8), ratio=ratio, kernel=1)


def test_the_intrinsic_maps_start_as_they_were():
    dense = convolution()
    layer = Ghost.from_layer(dense, ratio=2)
    x = torch.randn(2, 6, 7, 8)
    assert torch.allclose(layer(x)[:, :5], dense(x)[:, :5], atol=1e-4)


def test_ghosts_start_as_the_nearest_multiples():
    dense = convolution()
    with torch.no_grad():
        dense.weight[5:] = dense.weight[:4] * torch.tensor([2.0, -1.0, 0.5, 3.0]).view(4, 1, 1, 1)
    x = torch.randn(2, 6, 7, 8)
    assert torch.allclose(Ghost.from_layer(dense)(x), dense(x), atol=1e-3)


def test_what_it_costs():
    cost = Ghost.from_layer(convolution(bias=False), ratio=3).cost((6, 7, 8))
    assert cost.macs == 7 * 8 * (3 * 6 * 9 + 6 * 9)  # 3 intrinsic maps and 6 ghosts


@pytest.mark.parametrize(
    ("dense", "options", "error", "says"),
    [
        (nn.Linear(4, 4), {}, BadNetwork, "replaces a Conv2d, got Linear"),
        (nn.Conv2d(4, 4, 3, groups=2), {}, BadNetwork, "grouped convolution"),
        (
            nn.Conv2d(4, 4, 3),
            {"ratio": 5},
            InvalidArgument,
            "ratio must be at most 4, the number of channels, got 5",
        ),
        (nn.Conv2d(4, 4, 3), {"ratio": 1}, InvalidArgument, "at least 2, got 1"),
        (nn.Conv2d(4, 4, 3), {"kernel": 2}, InvalidArgument, "kernel must be odd"),
    ],
)
def test_what_it_refuses(dense, options, error, says):
    with pytest.raises(error, match=says):
        Ghost.from_layer(dense, **options)


def test_the_module_has_the_cost_ratio_of_the_paper():
    ours = sum(value.numel() for value in GhostModule(64, 64, 3).primary_conv[0].parameters())
    cheap = sum(value.numel() for value in GhostModule(64, 64, 3).cheap_operation[0].parameters())
    assert ours + cheap == 64 * 9 * 32 + 32 * 9


def test_module_and_bottleneck_are_timms():
    real("timm")
    ghostnet = importlib.import_module("timm.models.ghostnet")
    x = torch.randn(2, 12, 9, 9)
    pairs = [
        (GhostModule(12, 17, 3, 2, 5, 2), ghostnet.GhostModule(12, 17, 3, 2, 5, 2)),
        (GhostBottleneck(12, 30, 16, 5, 2, 0.25), _theirs(ghostnet, 30, 16, 5, 2, 0.25)),
        (GhostBottleneck(12, 30, 12), _theirs(ghostnet, 30, 12, 3, 1, 0.0)),
    ]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(ours.eval()(x), theirs.eval()(x))


def _theirs(ghostnet, inner, width, kernel, stride, squeeze):
    return ghostnet.GhostBottleneck(12, inner, width, kernel, stride, se_ratio=squeeze)
