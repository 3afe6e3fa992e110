"""A gate that scores how far an exit agrees with the exit before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Agreement", "agreement"]


class Agreement(Gate):
    """The probability that this exit and the one before it draw the same class, if each draws one
    from its softmax: [0, 1].

    It is large only if both exits are sure of the same class. It is a graded form of patience 1
    (arXiv 2006.04152), and of the distance between two exits that Shallow-Deep Networks calls
    confusion (arXiv 1810.07052). The product is our choice: by a distance alone, two exits that
    know nothing would agree. The first exit is compared with itself.

    Args:
        before: name of the exit before this one; None for the first exit.
    """

    def __init__(self, before: str | None = None) -> None:
        super().__init__()
        self.before = before
        self.reads = ()
        if before is not None:
            self.reads = (before,)

    def score(self, seen: Seen) -> Tensor:
        """The sum over classes of the product of both probabilities, [B]."""
        assert seen.own is not None
        own = seen.own.softmax(-1)  # [B, C]
        other = own
        if self.before is not None:
            other = seen.logits[self.before].softmax(-1)
        return (own * other).sum(-1)

    def score_range(self) -> ScoreRange:
        """From 0, for exits that are sure of different classes, to 1, for exits that are sure of
        the same class.
        """
        return ScoreRange(0.0, 1.0, saturates=(0.0, 1.0))

    def config(self) -> dict[str, Any]:
        """The name, and the exit before."""
        return {"name": "Agreement", "before": self.before}


def agreement(reads: Sequence[str]) -> Agreement:
    """Agreement with the last exit before this one."""
    if not reads:
        return Agreement(None)
    return Agreement(reads[-1])
