"""Exits on pooled features: one linear layer, or a small MLP.

Shapes: B samples, F pooled features, C classes. `pool` has no parameters, so what it gives is computed once while the
backbone is frozen; `classify` is what is taught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadInput, BadNetwork
from offramp.network import Exit, Seen
from offramp.signature import is_input

POOLS = ("mean", "grid", "flat")


class Pooled(Exit):
    """A head on pooled features [B, F]: linear where `hidden` is empty, else an MLP with ReLU between.

    pool "mean": the mean over all positions (F = channels). "grid": mean, maximum, and means over a 4x4 grid
    (F = 18 channels): on CIFAR ResNet-56 worth 22 points at layer1. "flat": everything as it is.
    mask: an input [B, T], such as "x/attention_mask"; "mean" is then over the positions of text [B, T, F] where it is
    not zero, whatever stands at the others.
    """

    def __init__(
        self, pool: str, features: int, classes: int, hidden: Sequence[int] = (), mask: str | None = None
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise BadInput(f"pool is {pool!r}, expected one of {', '.join(POOLS)}")
        if mask is not None and (pool != "mean" or not is_input(mask)):
            raise BadInput(f"pool is {pool!r} and mask {mask!r}, expected 'mean' and the name of an input (x/...)")
        self.pooling, self.features, self.classes, self.hidden = pool, int(features), int(classes), tuple(hidden)
        self.mask, self.reads = mask, () if mask is None else (mask,)
        widths = (self.features, *self.hidden)
        layers: list[nn.Module] = []
        for width_in, width in pairwise(widths):
            layers += [nn.Linear(width_in, width), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], self.classes))

    def pool(self, features: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """[B, channels, ...] -> [B, F]; with a mask [B, T] among the inputs of text [B, T, F]."""
        if self.mask is None or features.dim() == 2:
            return _pooled(features, self.pooling)
        return _masked_mean(features, (inputs or {})[self.mask])

    def classify(self, pooled: Tensor) -> Tensor:
        """[B, F] -> logits [B, C]."""
        logits: Tensor = self.head(pooled)
        return logits

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C] of the tapped features."""
        return self.classify(self.pool(seen.features, seen.inputs))

    def config(self) -> dict[str, Any]:
        """Pool, widths and classes."""
        config = {"name": "Pooled", "pool": self.pooling, "features": self.features, "classes": self.classes}
        hidden = {"hidden": list(self.hidden)} if self.hidden else {}
        return {**config, **hidden, **({"mask": self.mask} if self.mask is not None else {})}


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


def _masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Features [B, T, F] -> [B, F]; a NaN at a position that does not count changes nothing."""
    if features.dim() != 3 or mask.shape != features.shape[:2]:
        raise BadNetwork(
            f"the mask has shape {tuple(mask.shape)} and the features {tuple(features.shape)}, expected [B, T] and "
            "[B, T, F]; pool these features without it"
        )
    keep = mask != 0
    return features.masked_fill(~keep[:, :, None], 0).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)


def linear_masked(shape: Sequence[int], classes: int, mask: str = "x/attention_mask") -> Pooled:
    """A linear exit on the mean over the words of a text [T, F] that the mask does not leave out."""
    if len(shape) != 2:
        raise BadNetwork(
            f"a mask over words stands on features of shape {tuple(shape)}, expected [T, F]; cut elsewhere"
        )
    return Pooled("mean", shape[1], classes, mask=mask)


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
