"""Residual units at some positions of a map: tiles with a halo for 3x3 convolutions, gathered
positions for 1x1 convolutions.

A unit is local: its output at a position depends on a small square around it. So the tiles with an
active position are gathered together with a halo as wide as the unit's convolutions look beyond
them. They are computed as one batch of small maps, and scattered back. A dense convolution pads
with zeros, in every layer of a unit anew. Therefore positions outside of the map are set to zero
after each layer. Shapes: B rows, C channels, H x W positions, n tiles.
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
    """Find the steps of a residual unit, relu(x + steps(x)), by the names of its layers.

    Known are units with conv1, bn1, conv2, bn2, and optionally conv3, bn3, as ResNets call them.
    `computes` tries out whether the unit really computes these steps.

    Returns:
        None for any other unit.
    """
    steps = list[Step]()
    for conv_name, norm_name in NAMES:
        conv = getattr(unit, conv_name, None)
        norm = getattr(unit, norm_name, None)
        if conv is None:
            break
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            return None
        # only convolutions that keep the size of the map and look at most one position around
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
    # the last ReLU comes after the shortcut is added
    steps[-1] = Step(steps[-1].conv, steps[-1].norm, False)
    return tuple(steps)


def computes(unit: nn.Module, steps: Sequence[Step] | None) -> bool:
    """Whether a unit has the same output as its steps, on a small random map."""
    if steps is None:
        return False
    unit, steps = copy.deepcopy((unit, steps))  # together, because they share the layers
    unit.eval()
    weight = steps[0].conv.weight
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, steps[0].conv.in_channels, TRIED, TRIED, generator=draw).to(weight)
    with torch.no_grad():
        h = x
        for step in steps:
            h = step.norm.eval()(step.conv(h))
            if step.relu:
                h = torch.relu(h)
        try:
            output = unit(x)
        except (RuntimeError, TypeError, ValueError):
            return False
    if not isinstance(output, Tensor) or output.shape != x.shape:
        return False
    return torch.allclose(output, torch.relu(h + x), atol=TOLERANCE, rtol=TOLERANCE)


def tile_of(height: int, width: int, asked: int) -> int:
    """The side of the tiles: the largest one up to `asked` that divides height and width."""
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
        # the index of each active tile: its row, and its place down and across, [n] each
        self.index = grid.any(5).any(3)[:, 0].nonzero(as_tuple=True)
        self.share = len(self.index[0]) / max(1, active.numel() // side**2)

    def read(self, maps: Tensor, halo: int = 0) -> Tensor:
        """Maps [B, C, H, W] -> tiles [n, C, side + 2 halo, side + 2 halo], with zeros around the
        map.

        A tile is gathered line by line. This is several times faster than an index for each number.
        """
        if halo:
            maps = nn.functional.pad(maps, (halo, halo, halo, halo))
        maps = maps.contiguous()
        size = self.side + 2 * halo
        starts = self._starts(maps, size)
        if not len(starts):  # such as in a batch without rows
            return maps.new_zeros(0, maps.shape[1], size, size)
        # A view of all overlapping lines, one from every number of the maps: [numbers, size]. The
        # lines of the tiles are some of them.
        lines = torch.as_strided(maps, (maps.numel() - size + 1, size), (1, 1))
        return lines.index_select(0, starts).view(-1, maps.shape[1], size, size)

    def write(self, maps: Tensor, tiles: Tensor) -> None:
        """Put tiles [n, C, side, side] into contiguous maps [B, C, H, W], in place."""
        # Without a halo every line starts at a multiple of its length, so the maps are a table of
        # lines, and a start is a row of it.
        lines = maps.view(-1, self.side)
        starts = self._starts(maps, self.side).div(self.side, rounding_mode="floor")
        lines.index_copy_(0, starts, tiles.reshape(-1, self.side))

    def _starts(self, maps: Tensor, size: int) -> Tensor:
        """The positions at which the lines of all tiles start in contiguous maps: [n * C * size].

        Maps are stored row by row, then channel by channel, then line by line. So a line starts at
        the first number of its tile, plus whole channels, plus whole lines.
        """
        channels, height, width = maps.shape[1:]
        row, down, across = self.index
        first = (row * channels * height + down * self.side) * width + across * self.side  # [n]
        to_channel = torch.arange(channels, device=maps.device) * height * width
        to_line = torch.arange(size, device=maps.device) * width
        offsets = (to_channel[:, None] + to_line).flatten()  # [C * size]
        return (first[:, None] + offsets).flatten()

    def inside(self, halo: int) -> Tensor:
        """Which positions of the tiles and their halo are inside the map: bool [n, 1, size,
        size].
        """
        offsets = torch.arange(-halo, self.side + halo, device=self.active.device)
        down = self.index[1][:, None] * self.side + offsets  # [n, size]
        across = self.index[2][:, None] * self.side + offsets
        rows = (down >= 0) & (down < self.height)
        columns = (across >= 0) & (across < self.width)
        return (rows[:, :, None] & columns[:, None, :])[:, None]

    def needed(self, halo: int) -> Tensor:
        """Which of these positions are within `halo` of an active one: bool [n, 1, size, size]."""
        reach = self.active
        if halo:
            reach = (
                nn.functional.max_pool2d(reach.float(), 2 * halo + 1, stride=1, padding=halo) > 0
            )
        return self.read(reach, halo)


def on_tiles(steps: Sequence[Step], maps: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Compute a residual unit at the active tiles of maps.

    Args:
        steps: of the unit.
        maps: [B, C, H, W].
        tiles: the active ones.

    Returns:
        The output and the input of the unit at the tiles, [n, C, side, side] each. Only the output
        at active positions is right; at other positions of a tile it may be anything.
    """
    halo = sum(step.radius for step in steps)
    x = tiles.read(maps, halo)  # [n, C, side + 2 halo, side + 2 halo]
    h = x
    halo_left = halo
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if step.radius:
            # without padding, so the tile becomes smaller by the radius on every side
            h = nn.functional.conv2d(h, step.conv.weight, step.conv.bias)
            halo_left -= step.radius
            h = _normed(h, step)
            if halo_left and not last:
                h = h * tiles.inside(halo_left)  # the zeros that a dense convolution would read
        else:
            h = _at_positions(h, step, tiles.needed(halo_left))
    before = x[:, :, halo : halo + tiles.side, halo : halo + tiles.side]
    return torch.relu_(h + before), before


def _normed(h: Tensor, step: Step) -> Tensor:
    """The norm and the ReLU of a step."""
    h = step.norm(h)
    if step.relu:
        return torch.relu_(h)
    return h


def _at_positions(h: Tensor, step: Step, needed: Tensor) -> Tensor:
    """A 1x1 convolution at the needed positions; the output is zero at all others, also outside of
    the map.

    h [n, C, s, s], needed bool [n, 1, s, s] -> [n, C', s, s].
    """
    # gather the positions as rows, multiply, and scatter the results
    where = needed[:, 0].nonzero(as_tuple=True)
    rows = h.permute(0, 2, 3, 1)[where]  # [m, C]
    weight = step.conv.weight[:, :, 0, 0]  # [C', C]
    rows = nn.functional.linear(rows, weight, step.conv.bias)
    rows = _normed(rows[:, :, None, None], step)[:, :, 0, 0]
    out = h.new_zeros(h.shape[0], h.shape[2], h.shape[3], weight.shape[0])
    out[where] = rows
    return out.permute(0, 3, 1, 2)
