"""Exits on pooled features: one linear layer, or a small MLP.

Shapes: B samples, F pooled features, C classes. `pool` has no parameters, so what it gives is computed once while the
backbone is frozen; `classify` is what is taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadInput, BadNetwork
from offramp.network import Exit, Seen

POOLS = ("mean", "grid", "flat")


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
        for width_in, width in pairwise(widths):
            layers += [nn.Linear(width_in, width), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], self.classes))

    def pool(self, features: Tensor) -> Tensor:
        """[B, channels, ...] -> [B, F]."""
        return _pooled(features, self.pooling)

    def classify(self, pooled: Tensor) -> Tensor:
        """[B, F] -> logits [B, C]."""
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C] of the tapped features."""
        return self.classify(self.pool(seen.features))

    def config(self) -> dict[str, Any]:
        """Pool, widths and classes."""
        config = {"pool": self.pooling, "features": self.features, "classes": self.classes}
        return {"name": "Pooled", **config, **({"hidden": list(self.hidden)} if self.hidden else {})}


def _pooled(features: Tensor, pool: str) -> Tensor:
    """Features [B, channels, ...] (or [B, F], which stay as they are) -> [B, F]."""
    if features.dim() == 2 or pool == "flat":
        return features.flatten(1)
    if features.dim() != 4:
        flat = features.flatten(2) if features.dim() > 4 else features
        return flat.mean(1) if features.dim() == 3 else flat.mean(2)
    if pool == "mean":
        return features.mean((2, 3))
    grid = nn.functional.adaptive_avg_pool2d(features, 4).flatten(1)
    return torch.cat([features.mean((2, 3)), features.amax((2, 3)), grid], dim=1)


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
    if not shape:
        raise BadNetwork("the tapped value has no features, expected [B, F] or [B, channels, ...]; cut elsewhere")
    features = _pooled(torch.zeros(1, *shape), pool).shape[1]
    return Pooled(pool, features, classes, hidden)
