"""Resolution adaptive networks for CIFAR-100 (Yang et al., CVPR 2020, arXiv 2003.07326), which read
coarse images first.

The network is a sequence of sub-networks, one per scale, from the coarsest to the finest. Each one
has more blocks than the one before it. Its first blocks are fused: layer by layer they also read
the features of the previous sub-network's blocks. A classifier follows each of the other blocks.
Sizes follow the authors' public code (yangle15/RANet-pytorch), and are checked against the costs
that BoostNet (arXiv 2211.16726) plots. As with MSDNet, the model ends in its last classifier. Cut
it at `cuts`, with exits `strided?he=true`. The first output of a block is the input of its
classifier. Weights start by He's rule, which takes effect in this code. The preprocessing is that
of `msdnet`. No weights come with it.
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

# the input of each layer of a block, and the output of the last one: [B, C, H, W] each
Lows = tuple[Tensor, ...]


def preprocess() -> Preprocess:
    """Normalisation by CIFAR-100's own mean and deviation."""
    return _cifar()


def ranet(classes: int = 100) -> RANet:
    """A RANet with eight exits: four sub-networks of 2, 4, 6 and 8 blocks, from a quarter of the
    image's size to the whole size.
    """
    return RANet(classes, (1, 2, 3, 3), (4, 2, 1, 1))


def ranet_growing(classes: int = 100) -> RANet:
    """A RANet with six exits: three sub-networks, whose blocks have 2, 4, 6, ... layers."""
    return RANet(classes, (1, 2, 3), (4, 2, 1), step=2, growing=True)


class RanetSizes(NamedTuple):
    """The sizes of all blocks in a sub-network.

    Attributes:
        growth: new channels per layer.
        factor: of the bottlenecks.
        low_factor: of the bottlenecks that read the previous sub-network.
        compress: the share of new channels from the previous sub-network.
    """

    growth: int
    factor: int
    low_factor: int
    compress: float


class RANet(nn.Module):
    """Images -> logits [B, classes] of the last classifier.

    Args:
        classes: number of classes.
        levels: the scale of each sub-network. 1 is the coarsest; each level is twice as large as
            the one before.
        factors: of channels and bottlenecks, by sub-network.
        channels: of the first layer, times the factor.
        growth: new channels per layer, times the factor.
        blocks: number of blocks in the first sub-network.
        more: how many more blocks each sub-network has than the one before.
        step: layers of a block.
        growing: whether the n-th block has n times as many layers.
        compress: the share of new channels that come from the previous sub-network.
        large: whether images have 224 pixels a side, and not 32.

    Attributes:
        cuts: names of the blocks that a classifier follows, without the last one.
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
        block_counts = list[int]()  # of the sub-networks so far
        lows = list[list[int]]()  # by block of the previous sub-network, the widths of its `Lows`
        for flow, (level, factor) in enumerate(zip(levels, factors, strict=True)):
            sizes = RanetSizes(growth * factor, factor, factors[max(0, flow - 1)], compress)
            # A sub-network at level l halves height and width l - 1 times, to end at the coarsest
            # scale. The halving blocks are those at which earlier sub-networks end.
            halving = list[int]()
            if level > 1:
                halving = block_counts[-(level - 1) :]
            count = blocks + more * flow
            block_counts.append(count)
            # After each of l equal parts but the last, half of the channels go on.
            shrinking = {count * part // level for part in range(1, level)}
            width = channels * factor
            flow_blocks = nn.ModuleList()
            flow_lows = list[list[int]]()
            for number in range(1, count + 1):
                low: list[int] | None = None  # not fused, with a classifier
                if number <= len(lows):
                    low = lows[number - 1]
                depth = step
                if growing:
                    depth = step * number
                block = RanetBlock(
                    width,
                    depth,
                    sizes,
                    low,
                    halve=number in halving,
                    shrink=number in shrinking,
                )
                flow_blocks.append(block)
                flow_lows.append([width + sizes.growth * index for index in range(depth + 1)])
                width = block.width
                if low is None:
                    self.cuts.append(f"flows.{flow}.{number - 1}")
            self.flows.append(flow_blocks)
            lows = flow_lows
        del self.cuts[-1]
        # the last block works at the coarsest scale
        side = 32
        head_width: int | None = 128
        if large:
            side = 56  # after a stem that divides 224 by 4
            head_width = None
        size = side // 2 ** (max(levels) - 1)
        self.head = Strided((width, size, size), classes, head_width, he=True).layers

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        lows: list[Lows] = []  # of the previous sub-network, by block
        for flow, h in zip(self.flows.children(), self.stem(x), strict=True):
            flow_lows = list[Lows]()
            for index, block in enumerate(flow.children()):
                low: Lows | None = None
                if index < len(lows):
                    low = lows[index]
                h, block_lows = block(h, low)
                flow_lows.append(block_lows)
            lows = flow_lows
        logits: Tensor = self.head(h)
        return logits


class RanetStem(nn.Module):
    """One convolution for the finest scale, and one from each scale to the next coarser one,
    strided if their sizes differ.
    """

    def __init__(
        self, channels: int, levels: Sequence[int], factors: Sequence[int], *, large: bool
    ) -> None:
        super().__init__()
        width = channels * factors[-1]
        finest = large_stem(width) if large else unit(3, width, 3)
        self.scales = nn.ModuleList([finest])
        # from the finest scale, the last one, to the coarsest
        for index in range(len(levels) - 2, -1, -1):
            stride = 2
            if levels[index] == levels[index + 1]:
                stride = 1
            self.scales.append(unit(width, channels * factors[index], 3, stride))
            width = channels * factors[index]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] -> the input of each sub-network, the coarsest first."""
        inputs = list[Tensor]()
        for scale in self.scales:
            x = scale(x)
            inputs.append(x)
        return tuple(reversed(inputs))


class RanetBlock(nn.Module):
    """Densely connected layers. In a fused block each layer also reads the same layer of the
    previous sub-network's block.

    Args:
        width: input channels.
        depth: number of layers.
        sizes: of the sub-network.
        low: widths of the previous sub-network's features, depth + 1 of them; None if the block is
            not fused.
        halve: whether the last layer halves height and width.
        shrink: whether only half of the channels go on.
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
        from_low = 0
        if low is not None:
            from_low = math.floor(new * sizes.compress)
        self.across = nn.ModuleList()
        self.up = nn.ModuleList()
        self.last: nn.Module = nn.Identity()
        for index in range(depth):
            stride = 1
            if halve and index == depth - 1:
                stride = 2
            self.across.append(narrowed(width + new * index, new - from_low, sizes.factor, stride))
            if low is not None:
                self.up.append(narrowed(low[index], from_low, sizes.low_factor))
        self.width = width + new * depth
        if low is not None:  # after the last layer, more channels from the previous sub-network
            added = math.floor(self.width * sizes.compress)
            self.last = unit(low[depth], added, 1)
            self.width += added
        self.shrink: nn.Module = nn.Identity()
        if shrink:
            self.shrink = unit(self.width, self.width // 2, 1)
            self.width = self.width // 2

    def forward(self, x: Tensor, low: Lows | None) -> tuple[Tensor, Lows]:
        """[B, C, H, W] -> the input of the next block, and the features that the next sub-network
        reads in its block of the same number.
        """
        features = [x]
        for index, across in enumerate(self.across):
            new = across(x)
            # dense: the input, then the channels from the previous sub-network, then the new ones
            parts = [_sized(x, new)]
            if low is not None:
                parts.append(_sized(self.up[index](low[index]), new))
            x = torch.cat([*parts, new], 1)
            features.append(x)
        if low is not None:
            x = torch.cat([x, _sized(self.last(low[-1]), x)], 1)
        return self.shrink(x), tuple(features)


def _sized(x: Tensor, like: Tensor) -> Tensor:
    """[B, C, H, W] resized to another's height and width, bilinearly with aligned corners."""
    if x.shape[2:] == like.shape[2:]:
        return x
    return interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)
