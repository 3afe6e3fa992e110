"""Multi-scale dense networks for CIFAR-100 (Huang et al., 2017, arXiv 1703.09844), with several
scales from the first layer on.

Follows the authors' PyTorch port; sizes are checked against its costs per exit. The model here has
only the last classifier. The others are exits: cut the model after its blocks.

    model = msdnet_even().eval()
    net = cut(model, example, at=model.cuts, exits="strided", spec="offramp:msdnet_even")
    fit(net, train, recipe="joint")

A block returns its scales from the coarsest to the finest. An exit after the block reads the first
one, the coarsest. No weights come with it. The port, and so `joint` here, gives all exits the same
weight in the loss. Weights start by torch's own rules: the port tries to use He's, but looks for
layers one level too high, so it changes nothing. The preprocessing is the usual normalisation by
CIFAR-100's own constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from offramp.exits.strided import Strided
from offramp.layers._units import large_stem, narrowed, unit
from offramp.layers.preprocess import Preprocess

__all__ = ["msdnet_even", "msdnet_growing"]

# one [B, channels, H, W] per scale, the coarsest first; each is half as large as the next
Scales = tuple[Tensor, ...]


def preprocess() -> Preprocess:
    """Normalisation by CIFAR-100's own mean and deviation."""
    return Preprocess(mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), expects=(32, 32))


def msdnet_even(blocks: int = 7, base: int = 4, step: int = 2, classes: int = 100) -> MSDNet:
    """An MSDNet whose first block has `base` layers, and every other one `step` layers. Usual are
    5, 7 and 10 blocks.
    """
    return MSDNet([base] + [step] * (blocks - 1), classes)


def msdnet_growing(blocks: int = 5, base: int = 1, step: int = 1, classes: int = 100) -> MSDNet:
    """An MSDNet whose first block has `base` layers, and the i-th block after it step * i + 1
    layers: 1, 2, 3, ... by default.
    """
    return MSDNet([base] + [step * index + 1 for index in range(1, blocks)], classes)


class MSDNet(nn.Module):
    """Images -> logits [B, classes] of the last classifier.

    Args:
        depths: number of layers in each block.
        classes: number of classes.
        channels: of the first layer at the finest scale.
        growth: new channels per layer at the finest scale.
        factors: of channels, growth and bottlenecks, by scale from the finest (1-2-4 on CIFAR).
        large: whether images have 224 pixels a side, and not 32.

    Attributes:
        cuts: names of the blocks before the last one.
    """

    def __init__(
        self,
        depths: Sequence[int],
        classes: int,
        *,
        channels: int = 16,
        growth: int = 6,
        factors: Sequence[int] = (1, 2, 4),
        large: bool = False,
    ) -> None:
        super().__init__()
        self.stem = ScaleStem(channels, factors, large=large)
        blocks = list[nn.Module]()
        width = channels
        index = 0  # of a layer, over all blocks
        dropped = 0  # how many of the finest scales are gone before this layer
        for depth in depths:
            layers = list[nn.Module]()
            for _ in range(depth):
                dropped_after = _dropped(index, sum(depths), len(factors))
                layers.append(ScaleLayer(width, growth, factors, dropped, dropped_after))
                width += growth
                if dropped_after > dropped:  # the scales that are left go on with half the channels
                    layers.append(ScaleTransition(width, factors[dropped_after:]))
                    width //= 2
                dropped = dropped_after
                index += 1
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        self.cuts = tuple(f"blocks.{number}" for number in range(len(depths) - 1))
        # the head reads the coarsest scale
        side = 32
        head_width: int | None = 128
        if large:
            side = 56  # after a stem that divides 224 by 4
            head_width = None
        size = side // 2 ** (len(factors) - 1)
        self.head = Strided((width * factors[-1], size, size), classes, head_width).layers

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        scales: Scales = self.stem(x)
        for block in self.blocks:
            scales = block(scales)
        logits: Tensor = self.head(scales[0])
        return logits


class ScaleStem(nn.Module):
    """The first layer: one convolution for the finest scale, and a strided one from each scale to
    the next coarser one.
    """

    def __init__(self, channels: int, factors: Sequence[int], *, large: bool) -> None:
        super().__init__()
        if large:
            finest = large_stem(channels * factors[0], he=False)
        else:
            finest = unit(3, channels * factors[0], 3, he=False)
        self.scales = nn.ModuleList([finest])
        widths = [channels * factor for factor in factors]
        for width_in, width in pairwise(widths):
            self.scales.append(unit(width_in, width, 3, 2, he=False))

    def forward(self, x: Tensor) -> Scales:
        """Images [B, 3, H, W] -> all scales, the coarsest first."""
        scales = list[Tensor]()
        for scale in self.scales:
            x = scale(x)
            scales.append(x)
        return tuple(reversed(scales))


class ScaleLayer(nn.Module):
    """Adds new features to every scale: half from the next finer scale, half from its own.

    The finest scale of the input makes all of its new features from itself. A bottleneck has the
    factor of the scale that it reads.

    Args:
        width: input channels of a scale with factor 1.
        growth: new channels of a scale with factor 1.
        factors: by scale, from the finest.
        before: how many of the finest scales the input does not have.
        after: how many of the finest scales the output does not have.
    """

    def __init__(
        self, width: int, growth: int, factors: Sequence[int], before: int, after: int
    ) -> None:
        super().__init__()
        self.given = len(factors) - after
        self.across = nn.ModuleDict()
        self.down = nn.ModuleDict()
        for index in range(after, len(factors)):
            # keys count from the coarsest scale, as the tensors do
            key = str(len(factors) - 1 - index)
            new = growth * factors[index]
            if index > before:  # there is a finer scale, which makes the other half
                new //= 2
                self.down[key] = narrowed(
                    width * factors[index - 1], new, factors[index - 1], 2, he=False
                )
            self.across[key] = narrowed(width * factors[index], new, factors[index], he=False)

    def forward(self, scales: Scales) -> Scales:
        """[B, C, H, W] per scale -> [B, C + new, H, W] per scale that is left."""
        outputs = list[Tensor]()
        for index in range(self.given):
            key = str(index)
            # dense: the input, then features from the finer scale, then those from its own
            parts = [scales[index]]
            if key in self.down:
                parts.append(self.down[key](scales[index + 1]))
            parts.append(self.across[key](scales[index]))
            outputs.append(torch.cat(parts, 1))
        return tuple(outputs)


class ScaleTransition(nn.Module):
    """1x1 convolutions to half the channels, on every remaining scale.

    Args:
        width: input channels of a scale with factor 1.
        factors: of the remaining scales, from the finest.
    """

    def __init__(self, width: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.scales = nn.ModuleList()
        for factor in reversed(factors):
            self.scales.append(unit(width * factor, width // 2 * factor, 1, he=False))

    def forward(self, scales: Scales) -> Scales:
        """[B, C, H, W] per scale -> [B, C / 2, H, W] per scale."""
        outputs = list[Tensor]()
        for halving, scale in zip(self.scales, scales, strict=True):
            outputs.append(halving(scale))
        return tuple(outputs)


def _dropped(index: int, layers: int, scales: int) -> int:
    """How many of the finest scales are gone after a layer. One is dropped after every ceil(layers
    / scales) layers.
    """
    return index // math.ceil(layers / scales)
