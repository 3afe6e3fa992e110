"""Residual units at some positions of a map: tiles with a halo for 3x3 convolutions, gathered
positions for 1x1 ones.

A unit is local: what it gives at a position depends on a small square around it. So the tiles of a
map that hold an active position are gathered with as much halo as the unit's convolutions look
beyond them, computed as one batch of small maps, and scattered back. Around the map a dense
convolution reads zeros, in every layer of a unit anew: what lies outside of the map is therefore
set to zero after each layer. Shapes: B rows, C channels, H x W positions, n tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NAMES = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
TRIED = 6  # height and width of the map on which a unit is compared with its steps
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Step:
    """A convolution of stride 1, the batch norm after it, and whether a ReLU follows them."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    relu: bool

    @property
    def radius(self) -> int:
        """How many positions it looks beyond its own."""
        return int(self.conv.kernel_size[0]) // 2


def steps_of(unit: nn.Module) -> tuple[Step, ...] | None:
    """The steps of a residual unit, relu(x + steps(x)), by their names; None for a unit that has
    none.

    Known are units with conv1, bn1, conv2, bn2, and perhaps conv3, bn3, as ResNets call them.
    Whether they compute what their names say, `computes` tries out.
    """
    steps = list[Step]()
    for conv_name, norm_name in NAMES:
        conv = getattr(unit, conv_name, None)
        norm = getattr(unit, norm_name, None)
        if conv is None:
            break
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            return None
        square = (
            conv.kernel_size in ((1, 1), (3, 3))
            and conv.stride == (1, 1)
            and conv.dilation == (1, 1)
        )
        padded = conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[0] // 2)
        if not square or not padded or conv.groups != 1 or conv.padding_mode != "zeros":
            return None
        steps.append(Step(conv, norm, True))
    if len(steps) < 2 or steps[0].conv.in_channels != steps[-1].conv.out_channels:
        return None
    steps[-1] = Step(steps[-1].conv, steps[-1].norm, False)
    return tuple(steps)


def computes(unit: nn.Module, steps: Sequence[Step] | None) -> bool:
    """Whether a unit gives what its steps give, on a small map."""
    if steps is None:
        return False
    unit, steps = copy.deepcopy((unit, steps))
    unit.eval()
    weight = steps[0].conv.weight
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, steps[0].conv.in_channels, TRIED, TRIED, generator=draw).to(weight)
    with torch.no_grad():
        h = x
        for step in steps:
            h = step.norm.eval()(step.conv(h))
            h = torch.relu(h) if step.relu else h
        try:
            given = unit(x)
        except (RuntimeError, TypeError, ValueError):
            return False
    same: bool = isinstance(given, Tensor) and given.shape == x.shape
    return same and torch.allclose(given, torch.relu(h + x), atol=TOLERANCE, rtol=TOLERANCE)


def tile_of(height: int, width: int, asked: int) -> int:
    """The side of the tiles: at most `asked`, and such that height and width are whole numbers of
    them.
    """
    for side in range(min(asked, height, width), 0, -1):
        if height % side == 0 and width % side == 0:
            return side
    return 1


class Tiles:
    """The tiles of maps [B, C, H, W] that hold an active position.

    Args:
        active: bool [B, 1, H, W].
        side: of a tile, which divides H and W.
    """

    def __init__(self, active: Tensor, side: int) -> None:
        self.side = side
        self.height = active.shape[2]
        self.width = active.shape[3]
        self.active = active
        down = self.height // side
        across = self.width // side
        grid = active.reshape(len(active), 1, down, side, across, side)
        # rows, and tiles down and across, [n] each
        self.index = grid.any(5).any(3)[:, 0].nonzero(as_tuple=True)
        self.share = len(self.index[0]) / max(1, active.numel() // side**2)

    def read(self, maps: Tensor, halo: int = 0) -> Tensor:
        """Maps [B, C, H, W] -> tiles [n, C, side + 2 halo, side + 2 halo], with zeros around the
        map.

        A tile is gathered line by line: several times quicker than by an index for each of its
        numbers.
        """
        if halo:
            maps = nn.functional.pad(maps, (halo, halo, halo, halo))
        maps = maps.contiguous()
        size = self.side + 2 * halo
        starts = self._starts(maps, size)
        # from every number on
        lines = torch.as_strided(maps, (maps.numel() - size + 1, size), (1, 1))
        return lines.index_select(0, starts).view(-1, maps.shape[1], size, size)

    def write(self, maps: Tensor, tiles: Tensor) -> None:
        """Put tiles [n, C, side, side] into contiguous maps [B, C, H, W], in place."""
        lines = maps.view(-1, self.side)  # a line of a tile starts at a multiple of its length
        starts = self._starts(maps, self.side).div(self.side, rounding_mode="floor")
        lines.index_copy_(0, starts, tiles.reshape(-1, self.side))

    def _starts(self, maps: Tensor, size: int) -> Tensor:
        """Where the lines of all tiles start among the numbers of contiguous maps: [n * C *
        size].
        """
        channels, height, width = maps.shape[1:]
        row, down, across = self.index
        first = (row * channels * height + down * self.side) * width + across * self.side  # [n]
        planes = torch.arange(channels, device=maps.device) * height * width
        lines = torch.arange(size, device=maps.device) * width
        inside = (planes[:, None] + lines).flatten()  # [C * size]
        return (first[:, None] + inside).flatten()

    def inside(self, halo: int) -> Tensor:
        """Which positions of the tiles with their halo lie in the map: bool [n, 1, size, size]."""
        steps = torch.arange(-halo, self.side + halo, device=self.active.device)
        down = self.index[1][:, None] * self.side + steps  # [n, size]
        across = self.index[2][:, None] * self.side + steps
        rows = (down >= 0) & (down < self.height)
        columns = (across >= 0) & (across < self.width)
        return (rows[:, :, None] & columns[:, None, :])[:, None]

    def needed(self, halo: int) -> Tensor:
        """Which of them lie within `halo` of an active position: bool [n, 1, size, size]."""
        reach = self.active
        if halo:
            reach = (
                nn.functional.max_pool2d(reach.float(), 2 * halo + 1, stride=1, padding=halo) > 0
            )
        return self.read(reach, halo)


def on_tiles(steps: Sequence[Step], maps: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What a unit gives at the active tiles of maps [B, C, H, W], and what stands there now: [n, C,
    side, side] each.

    Only its values at active positions count; others in these tiles may be anything.
    """
    halo = sum(step.radius for step in steps)
    x = tiles.read(maps, halo)  # [n, C, side + 2 halo, side + 2 halo]
    h = x
    left = halo
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if step.radius:
            # smaller by its radius on every side
            h = nn.functional.conv2d(h, step.conv.weight, step.conv.bias)
            left -= step.radius
            h = _normed(h, step)
            if left and not last:
                h = h * tiles.inside(left)
        else:
            h = _at_positions(h, step, tiles.needed(left))
    before = x[:, :, halo : halo + tiles.side, halo : halo + tiles.side]
    return torch.relu_(h + before), before


def _normed(h: Tensor, step: Step) -> Tensor:
    h = step.norm(h)
    return torch.relu_(h) if step.relu else h


def _at_positions(h: Tensor, step: Step, needed: Tensor) -> Tensor:
    """A 1x1 convolution, gathered and scattered: at the needed positions; zero elsewhere, outside
    of the map too.

    h [n, C, s, s], needed bool [n, 1, s, s] -> [n, C', s, s].
    """
    where = needed[:, 0].nonzero(as_tuple=True)
    rows = h.permute(0, 2, 3, 1)[where]  # [m, C]
    weight = step.conv.weight[:, :, 0, 0]  # [C', C]
    rows = nn.functional.linear(rows, weight, step.conv.bias)
    rows = _normed(rows[:, :, None, None], step)[:, :, 0, 0]
    out = h.new_zeros(h.shape[0], h.shape[2], h.shape[3], weight.shape[0])
    out[where] = rows
    return out.permute(0, 3, 1, 2)
