"""Resolution adaptive networks for CIFAR-100 (Yang et al., CVPR 2020, arXiv 2003.07326): coarse
images first.

A row of sub-networks, one per scale from the coarsest on. Each has more blocks than the one before
it: as many blocks as that one had are fused with what it found there, layer by layer, and a
classifier follows each of the others. Sizes follow the authors' public code
(yangle15/RANet-pytorch), checked against the costs that BoostNet (arXiv 2211.16726) plots. As with
MSDNet, the model ends in its last classifier; cut it at `cuts`, with exits `strided?he=true`. A
block gives first what its classifier reads. Weights start by He's rule, which takes effect in this
code. The preprocessing is that of `msdnet`. No weights come with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from offramp.exits.strided import Strided
from offramp.layers._units import large_stem, narrowed, unit
from offramp.layers.preprocess import Preprocess
from offramp.models.msdnet import preprocess as _cifar

__all__ = ["ranet", "ranet_growing"]

# what came into each layer of a block, and what came out of the last: [B, C, H, W] each
Lows = tuple[Tensor, ...]


def preprocess() -> Preprocess:
    """Normalisation by CIFAR-100's own mean and deviation."""
    return _cifar()


def ranet(classes: int = 100) -> RANet:
    """Eight exits: four sub-networks of 2, 4, 6 and 8 blocks, from a quarter of the size to all of
    it.
    """
    return RANet(classes, (1, 2, 3, 3), (4, 2, 1, 1))


def ranet_growing(classes: int = 100) -> RANet:
    """Six exits: three sub-networks, whose blocks have two layers, four, six, and so on."""
    return RANet(classes, (1, 2, 3), (4, 2, 1), step=2, growing=True)


class RanetSizes(NamedTuple):
    """What all blocks of a sub-network share: new channels per layer, bottlenecks, and those of the
    one before.
    """

    growth: int
    factor: int
    low_factor: int
    compress: float


class RANet(nn.Module):
    """Images -> logits [B, classes] of the last classifier. `cuts` names the blocks of the
    classifiers before it.

    levels: the scale of each sub-network, 1 for the coarsest, each next number twice as large.
    factors: of channels and bottlenecks. blocks: of the first; `more` in each next one. step:
    layers of a block, or, growing, of the first one, and the n-th has n times as many. compress:
    the share of new channels that come from the sub-network before. large: for images of 224, not
    of 32.
    """

    def __init__(
        self,
        classes: int,
        levels: Sequence[int],
        factors: Sequence[int],
        *,
        channels: int = 16,
        growth: int = 6,
        blocks: int = 2,
        more: int = 2,
        step: int = 4,
        growing: bool = False,
        compress: float = 0.25,
        large: bool = False,
    ) -> None:
        super().__init__()
        self.stem = RanetStem(channels, levels, factors, large=large)
        self.flows = nn.ModuleList()
        self.cuts = list[str]()
        ends, lows = (
            [0],
            list[list[int]](),
        )  # blocks of each sub-network; widths of what the one before found
        for flow, (level, factor) in enumerate(zip(levels, factors, strict=True)):
            sizes = RanetSizes(growth * factor, factor, factors[max(0, flow - 1)], compress)
            # where fused blocks halve height and width
            halving = ends[1:][-(level - 1) :] if level > 1 else []
            ends.append(blocks + more * flow)
            width = channels * factor
            made = nn.ModuleList()
            found = list[list[int]]()
            for number in range(1, ends[-1] + 1):
                shrink = number in {ends[-1] * part // level for part in range(1, level)}
                low = lows[number - 1] if number <= ends[-2] else None
                depth = step * (number if growing else 1)
                block = RanetBlock(width, depth, sizes, low, halve=number in halving, shrink=shrink)
                made.append(block)
                found.append([width + sizes.growth * index for index in range(depth + 1)])
                width = block.width
                if low is None:
                    self.cuts.append(f"flows.{flow}.{number - 1}")
            self.flows.append(made)
            lows = found
        del self.cuts[-1]
        size = (56 if large else 32) // 2 ** (max(levels) - 1)
        self.head = Strided((width, size, size), classes, None if large else 128, he=True).layers

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        before: list[Lows] = []
        for flow, h in zip(self.flows.children(), self.stem(x), strict=True):
            found = list[Lows]()
            for index, block in enumerate(flow.children()):
                h, low = block(h, before[index] if index < len(before) else None)
                found.append(low)
            before = found
        logits: Tensor = self.head(h)
        return logits


class RanetStem(nn.Module):
    """One convolution for the finest scale, and one from each to the next coarser, strided where
    they differ.
    """

    def __init__(
        self, channels: int, levels: Sequence[int], factors: Sequence[int], *, large: bool
    ) -> None:
        super().__init__()
        width = channels * factors[-1]
        self.scales = nn.ModuleList([large_stem(width) if large else unit(3, width, 3)])
        for index in range(len(levels) - 2, -1, -1):
            stride = 1 if levels[index] == levels[index + 1] else 2
            self.scales.append(unit(width, channels * factors[index], 3, stride))
            width = channels * factors[index]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] -> what each sub-network begins with, the coarsest first."""
        made = list[Tensor]()
        for scale in self.scales:
            x = scale(x)
            made.append(x)
        return tuple(reversed(made))


class RanetBlock(nn.Module):
    """Densely connected layers; fused, each also reads what the sub-network before had at its
    place.

    low: the widths of that, or None. halve: the last layer halves height and width. shrink: half of
    the channels go on.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        sizes: RanetSizes,
        low: Sequence[int] | None,
        *,
        halve: bool,
        shrink: bool,
    ) -> None:
        super().__init__()
        new = sizes.growth
        from_low = 0 if low is None else math.floor(new * sizes.compress)
        self.across = nn.ModuleList()
        self.up = nn.ModuleList()
        self.last: nn.Module = nn.Identity()
        for index in range(depth):
            stride = 2 if halve and index == depth - 1 else 1
            self.across.append(narrowed(width + new * index, new - from_low, sizes.factor, stride))
            if low is not None:
                self.up.append(narrowed(low[index], from_low, sizes.low_factor))
        self.width = width + new * depth
        if low is not None:
            added = math.floor(self.width * sizes.compress)
            self.last = unit(low[depth], added, 1)
            self.width += added
        self.shrink: nn.Module = nn.Identity()
        if shrink:
            self.shrink = unit(self.width, self.width // 2, 1)
            self.width = self.width // 2

    def forward(self, x: Tensor, low: Lows | None) -> tuple[Tensor, Lows]:
        """[B, C, H, W] -> what goes on, and what the next sub-network reads at this place."""
        found = [x]
        for index, across in enumerate(self.across):
            new = across(x)
            parts = [_sized(x, new)]
            if low is not None:
                parts.append(_sized(self.up[index](low[index]), new))
            x = torch.cat([*parts, new], 1)
            found.append(x)
        if low is not None:
            x = torch.cat([x, _sized(self.last(low[-1]), x)], 1)
        return self.shrink(x), tuple(found)


def _sized(x: Tensor, like: Tensor) -> Tensor:
    """[B, C, H, W] at another's height and width, by straight lines between corners."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
