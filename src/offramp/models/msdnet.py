"""Multi-scale dense networks for CIFAR-100 (Huang et al., 2017, arXiv 1703.09844): several scales
from the first layer.

Follows the authors' PyTorch port; sizes are checked against its costs per exit. The model here ends
in the last classifier alone. The others are exits: cut after the blocks and hang them on, by name.

    model = msdnet_even().eval()
    net = cut(model, example, at=model.cuts, exits="strided", spec="offramp:msdnet_even")
    fit(net, train, recipe="joint")

Every block gives its scales from the coarsest to the finest: the first of them is what a tap shows,
and what the classifier reads. No weights come with it. The port, and so `joint` here, weighs all
exits alike. Weights start by torch's own rules: the port means to follow He's, but looks for layers
one level too high and so leaves them as they are. The preprocessing is the usual normalisation by
CIFAR-100's own constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

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
    """A first block of `base` layers, and `step` layers in each other one; 5, 7 and 10 blocks are
    the usual ones.
    """
    return MSDNet([base] + [step] * (blocks - 1), classes)


def msdnet_growing(blocks: int = 5, base: int = 1, step: int = 1, classes: int = 100) -> MSDNet:
    """A first block of `base` layers, and step * i + 1 in the i-th after it: 1, 2, 3, ... by
    default.
    """
    return MSDNet([base] + [step * index + 1 for index in range(1, blocks)], classes)


class MSDNet(nn.Module):
    """Images -> logits [B, classes] of the last classifier. `cuts` names the blocks before the last
    one.

    depths: layers of each block. channels: of the finest scale at first; growth: new ones per
    layer. factors: of both and of the bottlenecks, by scale from the finest (1-2-4 on CIFAR).
    large: for images of 224, not of 32.
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
        for start, depth in zip(accumulate([0, *depths]), depths, strict=False):
            layers = list[nn.Module]()
            for index in range(start, start + depth):
                before, after = (
                    _dropped(at, sum(depths), len(factors)) for at in (max(0, index - 1), index)
                )
                layers.append(ScaleLayer(width, growth, factors, before, after))
                width += growth
                if after > before:
                    layers.append(ScaleTransition(width, factors[after:]))
                    width //= 2
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        self.cuts = tuple(f"blocks.{index}" for index in range(len(depths) - 1))
        size = (224 if large else 32) // (4 if large else 1) // 2 ** (len(factors) - 1)
        self.head = Strided(
            (width * factors[-1], size, size), classes, None if large else 128
        ).layers

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        scales: Scales = self.stem(x)
        for block in self.blocks:
            scales = block(scales)
        logits: Tensor = self.head(scales[0])
        return logits


class ScaleStem(nn.Module):
    """The first layer: one convolution for the finest scale, and a strided one from each scale to
    the next.
    """

    def __init__(self, channels: int, factors: Sequence[int], *, large: bool) -> None:
        super().__init__()
        if large:
            finest = large_stem(channels * factors[0], he=False)
        else:
            finest = unit(3, channels * factors[0], 3, he=False)
        widths = [channels * factor for factor in factors]
        down = (unit(width_in, width, 3, 2, he=False) for width_in, width in pairwise(widths))
        self.scales = nn.ModuleList([finest, *down])

    def forward(self, x: Tensor) -> Scales:
        """Images [B, 3, H, W] -> all scales."""
        made = list[Tensor]()
        for scale in self.scales:
            x = scale(x)
            made.append(x)
        return tuple(reversed(made))


class ScaleLayer(nn.Module):
    """New features for every scale, beside those that came in: half from the next finer scale, half
    from its own.

    width: channels that come in at factor 1. before, after: how many of the finest scales came in
    no more, and are given no more. The finest scale that came in has nothing finer, and makes all
    of its new features from itself. A bottleneck's factor is that of the scale which it reads.
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
            if index > before:
                new //= 2
                self.down[key] = narrowed(
                    width * factors[index - 1], new, factors[index - 1], 2, he=False
                )
            self.across[key] = narrowed(width * factors[index], new, factors[index], he=False)

    def forward(self, scales: Scales) -> Scales:
        """[B, C, H, W] per scale -> [B, C + new, H, W] per scale that is left."""
        made = list[Tensor]()
        for index in range(self.given):
            key = str(index)
            parts = [scales[index]]
            if key in self.down:
                parts.append(self.down[key](scales[index + 1]))
            made.append(torch.cat([*parts, self.across[key](scales[index])], 1))
        return tuple(made)


class ScaleTransition(nn.Module):
    """1x1 convolutions to half the channels, on every scale that is left. factors: theirs, from the
    finest.
    """

    def __init__(self, width: int, factors: Sequence[int]) -> None:
        super().__init__()
        halves = (
            unit(width * factor, width // 2 * factor, 1, he=False) for factor in reversed(factors)
        )
        self.scales = nn.ModuleList(halves)

    def forward(self, scales: Scales) -> Scales:
        """[B, C, H, W] per scale -> [B, C / 2, H, W] per scale."""
        return tuple(half(one) for half, one in zip(self.scales, scales, strict=True))


def _dropped(index: int, layers: int, scales: int) -> int:
    """How many of the finest scales a layer gives no more: one per group of ceil(layers / scales)
    layers behind it.
    """
    return index // -(-layers // scales)
