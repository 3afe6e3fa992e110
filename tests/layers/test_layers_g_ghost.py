"""G-Ghost stages: of ResNet-like and RegNet-like blocks, the widths and the mix of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.g_ghost import GGhost
from offramp.layers.residual import Block
from offramp.networks.layer import dense_cost
from offramp.testing import check_layer
from small import seeded


class Regnet(nn.Module):
    """RegNetX's block: 1x1, grouped 3x3, 1x1, with a shortcut."""

    def __init__(self, width_in, width, group, stride=1):
        super().__init__()
        self.a = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        conv = nn.Conv2d(width, width, 3, stride, 1, groups=width // group, bias=False)
        self.b = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.down = None
        if stride > 1 or width != width_in:
            self.down = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        return torch.relu(self.c(self.b(self.a(x))) + shortcut)


class Bottleneck(nn.Module):
    """ResNet-50's block, of which the middle is a quarter as wide."""

    def __init__(self, width):
        super().__init__()
        inner = width // 4
        self.path = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return torch.relu(self.path(x) + x)


def basic(blocks=4):
    return seeded(
        lambda: nn.Sequential(Block(8, 16), *(Block(16, 16) for _ in range(blocks - 1))), 0
    ).eval()


def regnet():
    return seeded(
        lambda: nn.Sequential(Regnet(8, 32, 8, 2), Regnet(32, 32, 8), Regnet(32, 32, 8)), 0
    ).eval()


def bottlenecks():
    return seeded(lambda: nn.Sequential(*(Bottleneck(16) for _ in range(5))), 0).eval()


@pytest.mark.parametrize(
    ("dense", "shape", "kept"),
    [(basic(), (8, 8, 8), 8), (regnet(), (8, 8, 8), 12), (bottlenecks(), (16, 8, 8), 8)],
)
def test_it_keeps_the_contract(dense, shape, kept):
    check_layer(GGhost, dense, shape)
    layer = GGhost.from_layer(dense)
    assert layer.kept == kept
    assert layer.cost(shape).macs < dense_cost(dense, shape).macs


def test_groups_of_a_regnet_are_three_quarters_as_wide():
    conv = GGhost.from_layer(regnet()).middle[0].b[0]
    assert (conv.in_channels, conv.groups) == (12, 2)  # floor(0.75 x 8) = 6 channels a group


def test_it_is_computed_as_in_the_paper():
    layer = GGhost.from_layer(basic(5), ratio=0.25)
    x = torch.randn(3, 8, 8, 8)
    with torch.no_grad():
        nn.init.normal_(layer.mix[4].weight)
        nn.init.normal_(layer.cheap.weight)
        first = layer.base(x)
        one = first[:, :12]
        two = layer.middle[0](one)
        three = layer.middle[1](two)
        four = layer.middle[2](three)
        mixed = layer.mix(torch.cat([first, two, three, four], 1).mean((2, 3), keepdim=True))
        cheap = torch.relu(layer.cheap_norm(layer.cheap(first[:, 12:])) + mixed)
        assert torch.allclose(layer(x), layer.end(torch.cat([four, cheap], 1)), atol=1e-5)


def test_it_starts_from_the_blocks_that_stood_there():
    dense = basic()
    layer = GGhost.from_layer(dense)
    assert torch.equal(layer.middle[0].conv1.weight, dense[1].conv1.weight[:8, :8])
    assert torch.equal(layer.base.conv1.weight, dense[0].conv1.weight)
    assert not layer.mix[4].weight.any()


@pytest.mark.parametrize(
    ("dense", "options", "error", "says"),
    [
        (
            nn.Sequential(Block(8, 8), Block(8, 8)),
            {},
            BadNetwork,
            "at least three blocks, got a Sequential of 2",
        ),
        (nn.ReLU(), {}, BadNetwork, "got a ReLU of 0"),
        (
            basic(),
            {"ratio": 0.99},
            InvalidArgument,
            "keep some of 16 channels.*got 0.99, which keeps 0",
        ),
        (basic(), {"ratio": 1.5}, InvalidArgument, "ratio must be above 0 and below 1"),
        (
            regnet(),
            {"ratio": 0.9},
            InvalidArgument,
            "some of 32 channels.*keeps 0 in multiples of 6",
        ),
        (
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))),
            {},
            BadNetwork,
            "stages of convolutions, got a Linear",
        ),
        (
            nn.Sequential(Block(4, 8), Block(8, 16), Block(16, 16)),
            {},
            BadNetwork,
            "cannot be made narrower|changes",
        ),
    ],
)
def test_what_it_refuses(dense, options, error, says):
    with pytest.raises(error, match=says):
        GGhost.from_layer(dense, **options)
