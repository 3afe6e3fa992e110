"""Poolings of tapped features, without parameters but for the mixed one.

Shapes: B samples, F features of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.errors import BadInput, BadNetwork

POOLS = ("mean", "grid", "flat", "peaks")
CELLS = 8  # at most so many, in each of which a signal's maximum is looked up


def require_pooling(word: str, name: str) -> None:
    """Raise BadInput, which calls the argument `name`, unless `word` is one of POOLS."""
    if word not in POOLS:
        raise BadInput(f"{name} is {word!r}, expected one of {', '.join(POOLS)}")


def pooled(features: Tensor, pool: str) -> Tensor:
    """Features [B, channels, ...] (or [B, F], which stay as they are) -> [B, F] by one of POOLS.

    "peaks" is for signals [B, channels, L]: the mean, and the maxima of up to 8 equal parts. Raises BadNetwork.
    """
    if features.dim() == 2 or pool == "flat":
        return features.flatten(1)
    if pool == "peaks":
        return _peaks(features)
    if features.dim() != 4:
        flat = features.flatten(2) if features.dim() > 4 else features
        return flat.mean(1) if features.dim() == 3 else flat.mean(2)
    if pool == "mean":
        return features.mean((2, 3))
    grid = nn.functional.adaptive_avg_pool2d(features, 4).flatten(1)
    return torch.cat([features.mean((2, 3)), features.amax((2, 3)), grid], dim=1)


def _peaks(features: Tensor) -> Tensor:
    if features.dim() != 3:
        raise BadNetwork(
            f"peaks are looked for in features of shape {tuple(features.shape[1:])}, expected [channels, L]; use exits "
            "such as linear_grid"
        )
    cell = -(-features.shape[2] // CELLS)
    maxima = nn.functional.max_pool1d(features, cell, ceil_mode=True)
    return torch.cat([features.mean(2), maxima.flatten(1)], 1)


def width(shape: Sequence[int], pool: str) -> int:
    """F of a pooling of features [B, *shape]. Raises BadNetwork where there are none."""
    if not shape:
        raise BadNetwork("the tapped value has no features, expected [B, F] or [B, channels, ...]; cut elsewhere")
    return pooled(torch.zeros(1, *shape), pool).shape[1]


class Mixed(nn.Module):
    """Mixed pooling to about 4x4: share * maximum + (1 - share) * mean, the share being learned (arXiv 1810.07052).

    The kernel is a quarter of the side, rounded down; a side below 8 (a kernel of 1, or none) is left as it is, and
    where both are there is nothing to mix and no share. The share starts uniform in (0, 1) and may leave it, as in the
    authors' code.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        if len(shape) != 3:
            raise BadNetwork(f"mixed pooling stands on features of shape {tuple(shape)}, expected [C, H, W]")
        self.kernel = max(1, shape[1] // 4), max(1, shape[2] // 4)
        self.features = shape[0] * (shape[1] // self.kernel[0]) * (shape[2] // self.kernel[1])
        self.share = nn.Parameter(torch.rand(())) if self.kernel != (1, 1) else None

    def both(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> maxima and means [B, 2 F], or where nothing is pooled the features [B, F]."""
        if self.share is None:
            return features.flatten(1)
        largest = nn.functional.max_pool2d(features, self.kernel)
        return torch.cat([largest.flatten(1), nn.functional.avg_pool2d(features, self.kernel).flatten(1)], 1)

    def forward(self, both: Tensor) -> Tensor:
        """What `both` gave -> mixed [B, F]."""
        if self.share is None:
            return both
        largest, mean = both.chunk(2, 1)
        return self.share * largest + (1 - self.share) * mean
