"""Poolings of tapped features, without parameters but for the mixed one.

Shapes: B samples, F features of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument

POOLS = ("mean", "grid", "flat", "peaks")
LAYOUTS = ("channels_first", "channels_last", "both")
CELLS = 8  # at most so many, in each of which a signal's maximum is looked up
SIGNAL_CELLS = 4  # parts of a signal whose means "grid" takes


def require_pooling(word: str, name: str) -> None:
    """Raise InvalidArgument, which calls the argument `name`, unless `word` is one of POOLS."""
    if word not in POOLS:
        raise InvalidArgument(f"{name} must be one of {', '.join(POOLS)}, got {word!r}")


def require_layout(word: str | None) -> None:
    """Raise InvalidArgument unless `word` is None or one of LAYOUTS."""
    if word is not None and word not in LAYOUTS:
        raise InvalidArgument(f"layout must be one of {', '.join(LAYOUTS)}, got {word!r}")


def pooled(features: Tensor, pool: str, layout: str | None = None) -> Tensor:
    """Features [B, ...] -> [B, F]; those of shape [B, F] stay as they are.

    Args:
        features: [B, C, ...] or [B, ..., C].
        pool: one of POOLS. "peaks" is for signals [B, C, L]: the mean, and the maxima of up to 8
            equal parts.
        layout: "channels_first" [B, C, ...], "channels_last" [B, ..., C], or "both" where it is
            not known (the means over either of two dimensions, one behind the other). None reads
            three dimensions as channels last and more as channels first.

    Raises:
        BadNetwork: "peaks" of features that are no signals.
    """
    if features.dim() == 2 or pool == "flat":
        return features.flatten(1)
    if pool == "peaks":
        return _peaks(features)
    if layout == "both" and features.dim() == 3:
        return torch.cat([features.mean(1), features.mean(2)], 1)  # [B, L + C]
    if layout == "channels_last" or (layout is None and features.dim() == 3):
        if features.dim() == 3:
            return features.mean(1)  # words have no fixed places, so "grid" is the mean too
        features = features.movedim(-1, 1)  # [B, C, ...]
    if features.dim() == 3:
        return features.mean(2) if pool == "mean" else _signal_grid(features)
    if features.dim() > 4:
        return features.flatten(2).mean(2)
    if pool == "mean":
        return features.mean((2, 3))
    grid = nn.functional.adaptive_avg_pool2d(features, 4).flatten(1)
    return torch.cat([features.mean((2, 3)), _largest(features), grid], dim=1)


def _largest(features: Tensor) -> Tensor:
    """The maximum of every channel of [B, C, H, W]: [B, C].

    `amax` takes 25 times as long where the channels are innermost in memory; the pooling kernel
    does not.
    """
    if not features.is_contiguous():
        return nn.functional.adaptive_max_pool2d(features, 1).flatten(1)
    return features.amax((2, 3))


def _signal_grid(features: Tensor) -> Tensor:
    """Mean, maximum and the means of four equal parts of a signal [B, C, L]: [B, 6 C]; of shorter
    ones [B, 2 C].
    """
    found = [features.mean(2), features.amax(2)]
    if features.shape[2] >= SIGNAL_CELLS:
        found.append(nn.functional.adaptive_avg_pool1d(features, SIGNAL_CELLS).flatten(1))
    return torch.cat(found, 1)


def _peaks(features: Tensor) -> Tensor:
    if features.dim() != 3:
        raise BadNetwork(
            f"peaks need features of shape [channels, L], got {tuple(features.shape[1:])}. "
            "Use linear_grid"
        )
    cell = -(-features.shape[2] // CELLS)
    maxima = nn.functional.max_pool1d(features, cell, ceil_mode=True)
    return torch.cat([features.mean(2), maxima.flatten(1)], 1)


def width(shape: Sequence[int], pool: str, layout: str | None = None) -> int:
    """F of a pooling of features [B, *shape]. Raises BadNetwork where there are none."""
    if not shape:
        raise BadNetwork(
            "the tapped value must be [B, F] or [B, channels, ...], got one without "
            "features. Cut elsewhere"
        )
    return pooled(torch.zeros(1, *shape), pool, layout).shape[1]


class Mixed(nn.Module):
    """Mixed pooling to about 4x4: share * maximum + (1 - share) * mean, the share being learned
    (arXiv 1810.07052).

    The kernel is a quarter of the side, rounded down; a side below 8 (a kernel of 1, or none) is
    left as it is, and where both are there is nothing to mix and no share. The share starts uniform
    in (0, 1) and may leave it, as in the authors' code.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        if len(shape) != 3:
            raise BadNetwork(f"mixed pooling needs features of shape [C, H, W], got {tuple(shape)}")
        self.kernel = max(1, shape[1] // 4), max(1, shape[2] // 4)
        self.features = shape[0] * (shape[1] // self.kernel[0]) * (shape[2] // self.kernel[1])
        self.share = nn.Parameter(torch.rand(())) if self.kernel != (1, 1) else None

    def both(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> maxima and means [B, 2 F], or where nothing is pooled the features [B,
        F].
        """
        if self.share is None:
            return features.flatten(1)
        largest = nn.functional.max_pool2d(features, self.kernel)
        return torch.cat(
            [largest.flatten(1), nn.functional.avg_pool2d(features, self.kernel).flatten(1)], 1
        )

    def forward(self, both: Tensor) -> Tensor:
        """What `both` gave -> mixed [B, F]."""
        if self.share is None:
            return both
        largest, mean = both.chunk(2, 1)
        return self.share * largest + (1 - self.share) * mean
