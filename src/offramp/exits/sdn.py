"""The internal classifier of Shallow-Deep Networks (Kaya, Hong and Dumitras, 2019, arXiv
1810.07052).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from offramp.exits._pooling import Mixed
from offramp.networks.nodes import Exit, Seen

__all__ = ["Internal", "sdn"]


class Internal(Exit):
    """Mixed pooling to about 4x4, then one linear layer.

    The share of the mixture is learned, so the mixture cannot be computed once. The maxima and the
    means that it mixes can: `pool` returns them, and a phase on pooled features reads them.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
    """

    def __init__(self, shape: Sequence[int], classes: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.classes = int(classes)
        self.mixed = Mixed(self.shape)  # has the learned share
        self.linear = nn.Linear(self.mixed.features, self.classes)

    def pool(self, features: Tensor) -> Tensor:
        """[B, channels, H, W] -> maxima and means [B, 2 F]. Pooled features stay as they are."""
        if features.dim() != 4:
            return features
        return self.mixed.both(features)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.mixed(self.pool(seen.features)))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape and classes."""
        return {"name": "Internal", "shape": list(self.shape), "classes": self.classes}


def sdn(shape: Sequence[int], classes: int) -> Internal:
    """Mixed pooling and one linear layer."""
    return Internal(shape, classes)
