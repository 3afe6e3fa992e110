"""Cached features for the solver: standardised, with a constant column, a block of rows at a time.

Shapes: N rows, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from offramp.errors import BadData

BLOCK = 2**22  # values of a block: 32 MB in float64
# The largest number of values of which a float32 copy (1 GB) is kept. Above it, each pass computes
# its blocks again.
HELD = 2**28
# The largest number of features F whose second moments are used: F^2 values, and F^3 work.
WIDE = 2048


@final
class Standardized:
    """Features [N, F] of any float type, also memory-mapped, as [N, F + 1] with mean 0, deviation
    1, and a 1.

    A feature that is constant over the rows becomes 0. Weights [C, F + 1] have the bias in their
    last column. Small tables use float64. Large ones use float32, which is faster; with many rows
    the objective is never tiny.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.mean, self.scale = _moments(features)
        self.dtype = torch.float32
        if features.numel() <= BLOCK:
            self.dtype = torch.float64
        self.held: Tensor | None = None
        if features.numel() <= HELD:
            held = features.new_empty((len(features), features.shape[1] + 1), dtype=self.dtype)
            for rows, block in self._computed(self.dtype):
                held[rows] = block
            self.held = held
        self.second = self._second()

    def blocks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The table block by block.

        Args:
            dtype: of the blocks; None is the table's own. float64 is computed from the original
                features and never passes through float32.

        Yields:
            The rows of a block as a slice, and these rows standardised, [n, F + 1].
        """
        if self.held is None or dtype not in (None, self.dtype):
            yield from self._computed(dtype or self.dtype)
            return
        for rows in _row_blocks(self.features):
            yield rows, self.held[rows]

    def _computed(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The blocks, computed from the features."""
        for rows in _row_blocks(self.features):
            block = (self.features[rows].double() - self.mean) * self.scale  # [n, F]
            ones = block.new_ones(len(block), 1)
            yield rows, torch.cat([block, ones], 1).to(dtype)  # [n, F + 1]

    def scores(self, weight: Tensor) -> Tensor:
        """[C, F + 1] -> [N, C]."""
        return torch.cat([block @ weight.T for _, block in self.blocks()])

    def gradient(self, u: Tensor) -> Tensor:
        """The mean over rows of u [N, C] times the features: [C, F + 1]."""
        total = u.new_zeros(u.shape[1], len(self.mean) + 1)
        for rows, block in self.blocks():
            total += u[rows].T @ block  # in this order: four times faster than block.T @ u
        return total / len(u)

    def _second(self) -> Tensor | None:
        """The mean of the features' products [F + 1, F + 1], or None if F is too large."""
        if len(self.mean) > WIDE:
            return None
        total = torch.zeros((), dtype=self.dtype)
        for _, block in self.blocks():
            total = total + block.T @ block
        return total / len(self.features)

    def folded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [C, F + 1] on standardised features as a layer on the original features.

        Returns:
            The layer's weight [C, F] and bias [C], float64.
        """
        raw = weight[:, :-1].double() * self.scale  # [C, F]
        return raw, weight[:, -1].double() - raw @ self.mean

    def unfolded(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The inverse of `folded`, also for a layer that was solved on other rows."""
        scaled = torch.where(self.scale > 0, weight / self.scale, 0.0)  # [C, F]
        shifted = bias + weight @ self.mean  # [C]
        return torch.cat([scaled, shifted[:, None]], 1).to(self.dtype)  # [C, F + 1]


def _row_blocks(features: Tensor) -> Iterator[slice]:
    """Slices of rows with at most `BLOCK` values."""
    rows = max(1, BLOCK // max(1, features.shape[1]))
    for start in range(0, len(features), rows):
        yield slice(start, start + rows)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and 1 / deviation [F] in float64; the latter is 0 if a feature is constant.

    Raises BadData if a feature is not finite.
    """
    damaged = 0
    for rows in _row_blocks(features):
        damaged += int((~features[rows].isfinite()).any(1).sum())
    if damaged:
        raise BadData(
            f"Features must be finite, got NaN or infinity in {damaged:,} of {len(features):,} "
            "rows. Check the backbone's outputs for these rows"
        )
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for rows in _row_blocks(features):
        total = total + features[rows].double().sum(0)
    mean = total / len(features)  # [F]
    squares = torch.zeros_like(total)
    for rows in _row_blocks(features):
        squares = squares + (features[rows].double() - mean).square().sum(0)
    deviation = (squares / len(features)).sqrt()
    # A constant differs from its computed mean by the rounding of a float64 sum. That error is
    # relative to the mean, so a comparison with 0 would miss it.
    return mean, torch.where(deviation > 1e-12 * mean.abs(), 1 / deviation, 0.0)
