"""Poolings of tapped features. Only the mixed one has a parameter.

Shapes: B samples, F features of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument

POOLS = ("mean", "grid", "flat", "peaks")
LAYOUTS = ("channels_first", "channels_last", "both")
CELLS = 8  # the most parts of a signal whose maxima "peaks" takes
SIGNAL_CELLS = 4  # the parts of a signal whose means "grid" takes


def require_pooling(word: str, name: str) -> None:
    """Raise InvalidArgument unless `word`, the value of the argument `name`, is one of POOLS."""
    if word not in POOLS:
        raise InvalidArgument(f"{name} must be one of {', '.join(POOLS)}, got {word!r}")


def require_layout(word: str | None) -> None:
    """Raise InvalidArgument unless `word` is None or one of LAYOUTS."""
    if word is not None and word not in LAYOUTS:
        raise InvalidArgument(f"layout must be one of {', '.join(LAYOUTS)}, got {word!r}")


def pooled(features: Tensor, pool: str, layout: str | None = None) -> Tensor:
    """Features [B, ...] -> [B, F]. Those of shape [B, F] stay as they are.

    Args:
        features: [B, C, ...] or [B, ..., C].
        pool: one of POOLS. "peaks" is for signals [B, C, L]: the mean, and the maxima of up to 8
            equal parts.
        layout: "channels_first" [B, C, ...], "channels_last" [B, ..., C], or "both" if it is not
            known (the means over each of two dimensions, concatenated). None reads three dimensions
            as channels last and more as channels first.

    Raises:
        BadNetwork: "peaks" of features that are not signals.
    """
    if features.dim() == 2 or pool == "flat":
        return features.flatten(1)
    if pool == "peaks":
        return _peaks(features)
    if layout == "both" and features.dim() == 3:
        return torch.cat([features.mean(1), features.mean(2)], 1)  # [B, L + C]
    if layout == "channels_last" or (layout is None and features.dim() == 3):
        if features.dim() == 3:
            return features.mean(1)  # words have no fixed positions, so "grid" is the mean too
        features = features.movedim(-1, 1)  # [B, C, ...]
    if features.dim() == 3:
        if pool == "mean":
            return features.mean(2)
        return _signal_grid(features)
    if features.dim() > 4:  # videos and volumes have only the mean
        return features.flatten(2).mean(2)
    if pool == "mean":
        return features.mean((2, 3))
    # [B, C] + [B, C] + [B, 16 C] -> [B, 18 C]
    grid = nn.functional.adaptive_avg_pool2d(features, 4).flatten(1)
    return torch.cat([features.mean((2, 3)), _largest(features), grid], dim=1)


def _largest(features: Tensor) -> Tensor:
    """The maximum of every channel of [B, C, H, W]: [B, C].

    If the channels are innermost in memory, `amax` takes 25 times as long; the pooling kernel does
    not.
    """
    if not features.is_contiguous():
        return nn.functional.adaptive_max_pool2d(features, 1).flatten(1)
    return features.amax((2, 3))


def _signal_grid(features: Tensor) -> Tensor:
    """Mean, maximum and the means of four equal parts of a signal: [B, C, L] -> [B, 6 C].

    Signals with fewer than four positions have no parts: [B, 2 C].
    """
    poolings = [features.mean(2), features.amax(2)]
    if features.shape[2] >= SIGNAL_CELLS:
        poolings.append(nn.functional.adaptive_avg_pool1d(features, SIGNAL_CELLS).flatten(1))
    return torch.cat(poolings, 1)


def _peaks(features: Tensor) -> Tensor:
    """Mean and the maxima of up to 8 equal parts of a signal: [B, C, L] -> [B, 9 C]."""
    if features.dim() != 3:
        raise BadNetwork(
            f"peaks need features of shape [channels, L], got {tuple(features.shape[1:])}. "
            "Use linear_grid"
        )
    cell = -(-features.shape[2] // CELLS)  # rounded up, so that there are at most CELLS parts
    maxima = nn.functional.max_pool1d(features, cell, ceil_mode=True)
    return torch.cat([features.mean(2), maxima.flatten(1)], 1)


def width(shape: Sequence[int], pool: str, layout: str | None = None) -> int:
    """The width F of a pooling of features [B, *shape]. Raises BadNetwork for an empty shape."""
    if not shape:
        raise BadNetwork(
            "the tapped value must be [B, F] or [B, channels, ...], got one without "
            "features. Cut elsewhere"
        )
    return pooled(torch.zeros(1, *shape), pool, layout).shape[1]


class Mixed(nn.Module):
    """Mixed pooling to about 4x4: share * maximum + (1 - share) * mean, with a learned share (arXiv
    1810.07052).

    The kernel is a quarter of the side, rounded down. A side below 8 has a kernel of 1 and stays as
    it is; if both sides do, there is nothing to mix and no share. The share starts uniform in
    (0, 1) and may leave that range, as in the authors' code.

    Args:
        shape: of one row's features, [C, H, W].

    Raises:
        BadNetwork: the features are not images.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        if len(shape) != 3:
            raise BadNetwork(f"mixed pooling needs features of shape [C, H, W], got {tuple(shape)}")
        self.kernel = max(1, shape[1] // 4), max(1, shape[2] // 4)
        self.features = shape[0] * (shape[1] // self.kernel[0]) * (shape[2] // self.kernel[1])
        self.share: nn.Parameter | None = None
        if self.kernel != (1, 1):
            self.share = nn.Parameter(torch.rand(()))

    def both(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> maxima and means [B, 2 F]; without a share the features [B, F]."""
        if self.share is None:
            return features.flatten(1)
        largest = nn.functional.max_pool2d(features, self.kernel)
        means = nn.functional.avg_pool2d(features, self.kernel)
        return torch.cat([largest.flatten(1), means.flatten(1)], 1)

    def forward(self, both: Tensor) -> Tensor:
        """The output of `both`, [B, 2 F] -> mixed [B, F]."""
        if self.share is None:
            return both
        largest, mean = both.chunk(2, 1)
        return self.share * largest + (1 - self.share) * mean
