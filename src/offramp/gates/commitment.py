"""A learned second opinion that keeps the over-confident from leaving (QuickNets).

Patel and Siegelmann, 2022, arXiv 2212.12866. The paper's formulas are lost, and these are ours: a
logistic unit on the features' means over positions and the exit's logits says how likely the exit
is right. Confidence and commitment share one threshold; with two of them a score would jump where
the second is crossed, and the last bits of a float decide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.networks.nodes import Gate, Seen

__all__ = ["Commitment"]


class Commitment(Gate):
    """The smaller of two log-odds: that of the best class against the rest, and that of the
    commitment.

    features: how many are left when positions are averaged; classes: of the exit. The recipe
    `cascaded` hangs it on and trains it; until then it says nothing.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.features = int(features)
        self.classes = int(classes)
        self.linear = nn.Linear(self.features + self.classes, 1)

    def odds(self, features: Tensor, own: Tensor) -> Tensor:
        """Log-odds [B] that logits [B, C] on features [B, ...] are right: what is trained."""
        logit: Tensor = self.linear(torch.cat([_averaged(features), own], 1))[:, 0]
        return logit

    def score(self, seen: Seen) -> Tensor:
        """min(ln p / (1 - p), commitment) of the best class's probability p; finite for finite
        logits.
        """
        assert seen.own is not None
        best, index = seen.own.max(1, keepdim=True)
        rest = seen.own.scatter(1, index, -torch.inf).logsumexp(1)
        return torch.minimum(best[:, 0] - rest, self.odds(seen.features, seen.own))

    def config(self) -> dict[str, Any]:
        """Name, features and classes."""
        return {"name": "Commitment", "features": self.features, "classes": self.classes}


def _averaged(features: Tensor) -> Tensor:
    """[B, channels, ...] or tokens [B, T, F] -> means over positions [B, F]; [B, F] stays as it
    is.
    """
    if features.dim() == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.dim() > 3 else features
