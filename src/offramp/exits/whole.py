"""Exits at places that have logits already: at the end of a model, or at a head within it."""

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
    """The tapped value itself, if it is logits [B, classes]: a head that is part of the model.

    Args:
        shape: of one row of the tapped value.
        classes: those of the model.

    Raises:
        BadNetwork: the shape is not [classes].
    """
    # A tapped value of another shape may be features, which would be taken for logits.
    if tuple(shape) != (classes,):
        raise BadNetwork(
            f"the exit 'own' needs logits of {classes} classes, got {list(shape)} for each row"
        )
    return Own()


class Own(Exit):
    """The member's own logits [B, C]."""

    def forward(self, seen: Seen) -> Tensor:
        """The model's logits [B, C]."""
        return seen.features

    def pool(self, features: Tensor) -> Tensor:
        """Logits [B, C]: nothing is pooled."""
        return features

    def config(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"name": "Own"}


class Mean(Exit):
    """The log of the mean of the probabilities of this member and of those before it, [B, C].

    It reads the output of the exit before it, which is a mean too, so the members before it always
    run. It is computed in log space: finite logits never give an infinity, while log(mean(softmax))
    gives -inf.

    Args:
        before: the exit before, or None for the first member.
        visited: the number of members before this one.
    """

    def __init__(self, before: str | None, visited: int) -> None:
        super().__init__()
        self.before = before
        self.visited = visited
        self.reads: tuple[str, ...] = ()
        if before is not None:
            self.reads = (before,)

    def forward(self, seen: Seen) -> Tensor:
        """log((k * p_before + p_own) / (k + 1)) for k members visited before."""
        own = seen.features.log_softmax(-1)  # [B, C]
        if self.before is None:
            return own
        # A mean times its count is the sum.
        total = torch.logaddexp(seen.logits[self.before] + math.log(self.visited), own)
        return total - math.log(self.visited + 1)

    def pool(self, features: Tensor) -> Tensor:
        """Logits [B, C]: nothing is pooled."""
        return features

    def config(self) -> dict[str, Any]:
        """Name, the exit before it, and the number of members that it averages."""
        return {"name": "Mean", "before": self.before, "visited": self.visited}
