"""Exits that choose, for each row and channel, the layers from which they take their features.

After the layer selective attention of LSANet (Jiang, Liu, Wang, Yang, Dong and Feng, 2022, arXiv
2209.13844). We found none of its equations. According to its abstract, an attention module selects
features across layers and weighs the auxiliary losses by it. The form here is our choice: that of
selective kernels (Li et al., 2019, arXiv 1903.06586) with layers in the place of kernels. Unlike a
network that sees all layers at once, an exit sees only its own layer and earlier ones, and the
model's own output, at the end, is not part of it. Cut with exits="selective" at every place; the
recipe `synergy` trains these exits with weights by the attention.
Shapes: B samples, F pooled features, D channels that all layers are projected to, C classes, m
layers so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.exits._pooling import pooled, require_layout, require_pooling, width
from offramp.networks.nodes import Exit, Seen

__all__ = ["Selective", "selective"]

CHANNELS = 64  # D
INNER = 32  # the width of the attention's hidden layer


class Selective(Exit):
    """u_m = W F_m; s = softmax over layers of (B relu(A sum_l u_l)), [B, m, D]; logits of sum_l s_l
    u_l by one layer.

    It hands on u_1 ... u_m, [B, m, D]. Through them later exits train earlier projections too.

    Args:
        pooling: "mean", "grid" or "flat", as of `Pooled`.
        features: F.
        classes: C.
        before: the exit before, or None at place 1.
        place: m, from 1.
        channels: D.
        inner: the width between A and B.
        layout: where the channels are, as of `Pooled`.

    Raises:
        InvalidArgument: an unknown pooling or layout.
        BadNetwork: `before` and `place` do not fit.
    """

    def __init__(
        self,
        pooling: str,
        features: int,
        classes: int,
        *,
        before: str | None = None,
        place: int = 1,
        channels: int = CHANNELS,
        inner: int = INNER,
        layout: str | None = None,
    ) -> None:
        super().__init__()
        require_pooling(pooling, "pooling")
        require_layout(layout)
        self.layout = layout
        if (before is None) != (place == 1):
            raise BadNetwork(
                "before must be None at place 1 and the name of the exit before elsewhere, "
                f"got place {place} and {before!r}"
            )
        self.pooling = pooling
        self.features = int(features)
        self.classes = int(classes)
        self.before = before
        self.place = place
        self.channels = int(channels)
        self.inner = int(inner)
        self.reads: tuple[str, ...] = ()
        if before is not None:
            self.reads = (before,)
        self.project = nn.Linear(self.features, self.channels)
        self.select: nn.Sequential | None = None
        if place > 1:  # with one layer there is nothing to select
            a = nn.Linear(self.channels, self.inner)
            b = nn.Linear(self.inner, place * self.channels)
            self.select = nn.Sequential(a, nn.ReLU(), b)
        self.linear = nn.Linear(self.channels, self.classes)

    def pool(self, features: Tensor) -> Tensor:
        """[B, channels, ...] -> [B, F]."""
        return pooled(features, self.pooling, self.layout)

    def layers(self, seen: Seen) -> Tensor:
        """u_1 ... u_m, [B, m, D]. Raises BadNetwork if the exit before hands on something else."""
        own: Tensor = self.project(self.pool(seen.features))[:, None]  # [B, 1, D]
        if self.before is None:
            return own
        earlier = seen.logits[self.before]  # [B, m - 1, D]
        if earlier.dim() == 2:  # an exit that hands on only its own logits
            earlier = earlier[:, None]
        if earlier.shape[1:] != (self.place - 1, self.channels):
            raise BadNetwork(
                f"exit {self.before!r} must hand on {(self.place - 1, self.channels)} layers "
                f"and channels, got {tuple(earlier.shape[1:])}. Cut with exits='selective' at "
                "every place"
            )
        return torch.cat([earlier, own], 1)

    def shares(self, layers: Tensor) -> Tensor:
        """The share of each layer in each channel, [B, m, D]; over layers they sum to 1."""
        if self.select is None:
            return torch.ones_like(layers)
        scores: Tensor = self.select(layers.sum(1))  # [B, D] -> [B, m D]
        return scores.reshape(-1, self.place, self.channels).softmax(1)

    def both(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Logits [B, C], and the projected layers [B, m, D], which are handed on."""
        layers = self.layers(seen)
        # Each channel is a mean over the layers, weighted by their shares.
        mixed = (self.shares(layers) * layers).sum(1)  # [B, m, D] -> [B, D]
        logits: Tensor = self.linear(mixed)
        return logits, layers

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        return self.both(seen)[0]

    def config(self) -> dict[str, Any]:
        """Pooling, widths, the exit before and the place among the layers."""
        config = {
            "name": "Selective",
            "pooling": self.pooling,
            "features": self.features,
            "classes": self.classes,
            "before": self.before,
            "place": self.place,
            "channels": self.channels,
            "inner": self.inner,
        }
        if self.layout is not None:
            config["layout"] = self.layout
        return config


def selective(
    shape: Sequence[int], classes: int, reads: Sequence[str], layout: str | None = None
) -> Selective:
    """On mean, maximum and a 4x4 grid of means of each layer."""
    features = width(shape, "grid", layout)
    before = None
    if reads:
        before = reads[-1]
    return Selective("grid", features, classes, before=before, place=len(reads) + 1, layout=layout)
