"""A learned second opinion that keeps over-confident samples from leaving (QuickNets).

Patel and Siegelmann, 2022, arXiv 2212.12866. The paper's formulas are not available, so these are
ours: a logistic unit estimates how likely the exit is right, from its logits and from the features'
means over positions. Confidence and commitment share one threshold. With two thresholds the score
would jump where the second one is crossed, and the last bits of a float would decide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.networks.nodes import Gate, Seen

__all__ = ["Commitment"]


class Commitment(Gate):
    """The smaller of two log-odds: those of the best class against the rest, and those of the
    commitment.

    The recipe `cascaded` adds this gate and trains it. Before that its score means nothing.

    Args:
        features: number of features after the mean over positions.
        classes: of the exit.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.features = int(features)
        self.classes = int(classes)
        self.linear = nn.Linear(self.features + self.classes, 1)

    def odds(self, features: Tensor, own: Tensor) -> Tensor:
        """The log-odds [B] that logits [B, C] on features [B, ...] are right. They are trained."""
        logit: Tensor = self.linear(torch.cat([_averaged(features), own], 1))[:, 0]
        return logit

    def score(self, seen: Seen) -> Tensor:
        """min(ln p / (1 - p), commitment), [B], with the probability p of the best class. Finite
        for finite logits.
        """
        assert seen.own is not None
        # ln p / (1 - p) is the best logit less the logsumexp of all others, without a rounded p
        best, index = seen.own.max(1, keepdim=True)  # [B, 1]
        rest = seen.own.scatter(1, index, -torch.inf).logsumexp(1)  # [B]
        return torch.minimum(best[:, 0] - rest, self.odds(seen.features, seen.own))

    def config(self) -> dict[str, Any]:
        """The name, and the numbers of features and classes."""
        return {"name": "Commitment", "features": self.features, "classes": self.classes}


def _averaged(features: Tensor) -> Tensor:
    """The mean over positions, [B, F], of images [B, F, H, W] or tokens [B, T, F]. Features [B, F]
    are returned as they are.
    """
    if features.dim() <= 2:
        return features
    if features.dim() == 3:  # tokens
        return features.mean(1)
    return features.flatten(2).mean(2)  # [B, F, H, W] -> [B, F, H W] -> [B, F]
