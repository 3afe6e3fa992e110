"""Tiles of maps: what is gathered, what a unit gives there, and which units can be computed so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.layers._sparse import Tiles, computes, on_tiles, steps_of, tile_of
from offramp.layers.residual import Block
from offramp.models.cifar_bottleneck import Bottleneck
from small import seeded


def stirred(unit):
    """A unit whose batch norms move zeros: what lies outside of a map must not count."""
    draw = torch.Generator().manual_seed(1)
    for part in unit.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(torch.randn(part.num_features, generator=draw))
            part.running_var.copy_(torch.rand(part.num_features, generator=draw) + 0.5)
            with torch.no_grad():
                part.bias.copy_(torch.randn(part.num_features, generator=draw))
    return unit.eval()


UNITS = {
    "basic": lambda: Block(4, 4),
    "biased": lambda: Block(4, 4, bias=True),
    "narrowed": lambda: Bottleneck(8, 2, 1),
}


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_a_unit_gives_the_same_at_active_positions(kind, share):
    unit = stirred(seeded(UNITS[kind], 0))
    steps = steps_of(unit)
    assert computes(unit, steps)
    draw = torch.Generator().manual_seed(2)
    maps = torch.randn(3, steps[0].conv.in_channels, 8, 12, generator=draw)
    active = torch.rand(3, 1, 8, 12, generator=draw) < share
    active[0, 0, 0, 0] = True
    tiles = Tiles(active, 4)
    with torch.no_grad():
        want = unit(maps)
        got = torch.full_like(want, 99.0)
        new, before = on_tiles(steps, maps, tiles)
        tiles.write(got, new)
        assert torch.equal(before, tiles.read(maps))
    torch.testing.assert_close(
        got.where(active, 0.0), want.where(active, 0.0), atol=1e-5, rtol=1e-5
    )
    assert (got == 99).any() == (tiles.share < 1)


def test_tiles_with_a_halo_have_zeros_around_the_map():
    maps = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    active = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    active[0, 0, 3, 0] = True
    tiles = Tiles(active, 2)
    assert tiles.read(maps).tolist() == [[[[9, 10], [13, 14]]]]
    assert tiles.read(maps, 1).tolist() == [
        [[[0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15], [0, 0, 0, 0]]]
    ]
    assert tiles.inside(1).int().tolist() == [
        [[[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]]
    ]
    assert tiles.needed(1).int().tolist() == [
        [[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]]
    ]
    assert tiles.share == 0.25


def test_sides_of_tiles():
    assert [tile_of(32, 32, 8), tile_of(12, 8, 8), tile_of(7, 7, 8), tile_of(7, 5, 4)] == [
        8,
        4,
        7,
        1,
    ]


class Doubled(Block):
    """Has the names of a residual unit and computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Picky(Block):
    """Takes no map of another size."""

    def forward(self, x):
        raise RuntimeError("another size")


def test_units_that_are_something_else():
    assert steps_of(nn.Conv2d(4, 4, 3, padding=1)) is None
    assert steps_of(Block(4, 8)) is None
    for unit in (Doubled(4, 4), Picky(4, 4)):
        assert not computes(unit, steps_of(unit))
    strided = Block(4, 4)
    strided.conv2 = nn.Conv2d(4, 4, 5, padding=2)
    assert steps_of(strided) is None
    strided.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    assert steps_of(strided) is None
    strided.bn2 = nn.Identity()
    assert steps_of(strided) is None
