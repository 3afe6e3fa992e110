"""Exits that stand where logits are already: at the end of a model, or at a head within it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.networks.nodes import Exit, Seen

__all__ = ["Mean", "Own", "own"]


def own(shape: Sequence[int], classes: int) -> Own:
    """The tapped value itself, where that is logits [B, classes]: a head that is part of the model.

    Args:
        shape: of one row of the tapped value.
        classes: those of the model.

    Raises:
        BadNetwork: another shape.
    """
    if tuple(shape) != (classes,):
        raise BadNetwork(
            f"the exit 'own' needs logits of {classes} classes, got {list(shape)} for each row"
        )
    return Own()


class Own(Exit):
    """The member's own logits [B, C]."""

    def forward(self, seen: Seen) -> Tensor:
        """What the model gave."""
        return seen.features

    def pool(self, features: Tensor) -> Tensor:
        """Logits [B, C], which are all that it reads."""
        return features

    def config(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"name": "Own"}


class Mean(Exit):
    """Log of the average of the probabilities of this member and of the `visited` members before
    it, [B, C].

    It reads the answer of the exit before it, which is such a mean itself; so a member before it is
    always run. In log space: finite logits never give an infinity, where log(mean(softmax)) gives
    -inf.
    """

    def __init__(self, before: str | None, visited: int) -> None:
        super().__init__()
        self.before = before
        self.visited = visited
        self.reads = () if before is None else (before,)

    def forward(self, seen: Seen) -> Tensor:
        """log((k * p_before + p_own) / (k + 1)) for k members visited before."""
        own = seen.features.log_softmax(-1)
        if self.before is None:
            return own
        total = torch.logaddexp(seen.logits[self.before] + math.log(self.visited), own)
        return total - math.log(self.visited + 1)

    def pool(self, features: Tensor) -> Tensor:
        """Logits [B, C], which are all that it reads."""
        return features

    def config(self) -> dict[str, Any]:
        """Name, the exit before it, and how many members that one averages."""
        return {"name": "Mean", "before": self.before, "visited": self.visited}
