"""Cached features as the solver reads them: standardised, with a constant beside them, a block of
rows at a time.

Shapes: N rows, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from offramp.errors import BadData

BLOCK = 2**22  # values of a block: 32 MB in float64
# values of which a float32 copy is held, 1 GB; above that each pass makes its blocks anew
HELD = 2**28
WIDE = 2048  # features up to which all of their second moments are used: F^2 values, and F^3 work


@final
class Standardized:
    """Features [N, F] of any float type, also memory-mapped, as [N, F + 1] with mean 0, deviation
    1, and a 1.

    A feature that is constant over the rows becomes 0. Weights [C, F + 1] have the bias in their
    last column. Few values are worked on in float64, many in float32: it is faster, and with many
    rows the objective is never tiny.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.mean, self.scale = _moments(features)
        self.dtype = torch.float64 if features.numel() <= BLOCK else torch.float32
        self.held: Tensor | None = None
        if features.numel() <= HELD:
            held = features.new_empty((len(features), features.shape[1] + 1), dtype=self.dtype)
            for part, block in self._made(self.dtype):
                held[part] = block
            self.held = held
        self.second = self._second()

    def blocks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and these rows standardised [n, F + 1]; float64 comes from the features
        given, not by float32.
        """
        if self.held is None or dtype not in (None, self.dtype):
            return self._made(dtype or self.dtype)
        return ((part, self.held[part]) for part in _parts(self.features))

    def _made(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        for part in _parts(self.features):
            block = (self.features[part].double() - self.mean) * self.scale
            yield part, torch.cat([block, block.new_ones(len(block), 1)], 1).to(dtype)

    def scores(self, weight: Tensor) -> Tensor:
        """[C, F + 1] -> [N, C]."""
        return torch.cat([block @ weight.T for _, block in self.blocks()])

    def gradient(self, u: Tensor) -> Tensor:
        """The mean over rows of u [N, C] times the features: [C, F + 1]."""
        total = u.new_zeros(u.shape[1], len(self.mean) + 1)
        for part, block in self.blocks():
            total += u[part].T @ block  # in this order: four times faster than block.T @ u
        return total / len(u)

    def _second(self) -> Tensor | None:
        """Mean of the features' products [F + 1, F + 1]; None where there are too many features."""
        if len(self.mean) > WIDE:
            return None
        return sum(
            (block.T @ block for _, block in self.blocks()), torch.zeros((), dtype=self.dtype)
        ) / len(self.features)

    def folded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights on standardised features -> weight [C, F] and bias [C] on the features given,
        float64.
        """
        raw = weight[:, :-1].double() * self.scale
        return raw, weight[:, -1].double() - raw @ self.mean

    def unfolded(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The way back of `folded`, also for weights from other rows."""
        there = torch.where(self.scale > 0, weight / self.scale, 0.0)
        return torch.cat([there, (bias + weight @ self.mean)[:, None]], 1).to(self.dtype)


def _parts(features: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK // max(1, features.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(features), rows))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and 1 / deviation [F] in float64, 0 where a feature is constant. BadData where one
    is not finite.
    """
    damaged = sum(int((~features[part].isfinite()).any(1).sum()) for part in _parts(features))
    if damaged:
        raise BadData(
            f"{damaged:,} of {len(features):,} rows have features that are NaN or infinite; "
            f"expected finite ones: "
            "look at what the backbone gives for these rows"
        )
    zero = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    mean = sum((features[part].double().sum(0) for part in _parts(features)), zero) / len(features)
    squares = sum(
        ((features[part].double() - mean).square().sum(0) for part in _parts(features)), zero
    )
    deviation = (squares / len(features)).sqrt()
    # a constant differs from its own mean by the rounding of a float64 sum: relative to it, not to
    # 0
    return mean, torch.where(deviation > 1e-12 * mean.abs(), 1 / deviation, 0.0)
