"""Exits on pooled features: one linear layer, or a small MLP.

Shapes: B samples, F pooled features, C classes. `pool` has no parameters, so what it gives is computed once while the
backbone is frozen; `classify` is what is taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from offramp.errors import BadInput
from offramp.exits._pooling import POOLS, pooled, width
from offramp.network import Exit, Seen


class Pooled(Exit):
    """A head on pooled features [B, F]: linear where `hidden` is empty, else an MLP with ReLU between.

    pool "mean": the mean over all positions (F = channels). "grid": mean, maximum, and means over a 4x4 grid
    (F = 18 channels): on CIFAR ResNet-56 worth 22 points at layer1. "flat": everything as it is.
    """

    def __init__(self, pool: str, features: int, classes: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        if pool not in POOLS:
            raise BadInput(f"pool is {pool!r}, expected one of {', '.join(POOLS)}")
        self.pooling, self.features, self.classes, self.hidden = pool, int(features), int(classes), tuple(hidden)
        widths = (self.features, *self.hidden)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], self.classes))

    def pool(self, features: Tensor) -> Tensor:
        """[B, channels, ...] -> [B, F]."""
        return pooled(features, self.pooling)

    def classify(self, features: Tensor) -> Tensor:
        """[B, F] -> logits [B, C]."""
        logits: Tensor = self.head(features)
        return logits

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C] of the tapped features."""
        return self.classify(self.pool(seen.features))

    def config(self) -> dict[str, Any]:
        """Pool, widths and classes."""
        config = {"pool": self.pooling, "features": self.features, "classes": self.classes}
        return {"name": "Pooled", **config, **({"hidden": list(self.hidden)} if self.hidden else {})}


def linear(shape: Sequence[int], classes: int) -> Pooled:
    """A linear exit on the mean over positions; `shape` is that of one row's features."""
    return _made("mean", shape, classes)


def linear_grid(shape: Sequence[int], classes: int) -> Pooled:
    """A linear exit on mean, maximum and a 4x4 grid of means."""
    return _made("grid", shape, classes)


def mlp(shape: Sequence[int], classes: int) -> Pooled:
    """One hidden layer of 128 units on mean, maximum and grid."""
    return _made("grid", shape, classes, (128,))


def _made(pool: str, shape: Sequence[int], classes: int, hidden: Sequence[int] = ()) -> Pooled:
    return Pooled(pool, width(shape, pool), classes, hidden)
