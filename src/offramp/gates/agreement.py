"""How far an exit agrees with the one before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Agreement", "agreement"]


class Agreement(Gate):
    """The probability that this exit and its neighbour, each drawing a class from its softmax, draw
    the same: [0, 1].

    Large only where both are sure of one class; a graded form of patience 1 (arXiv 2006.04152), and
    of the distance between an exit and another that Shallow-Deep Networks calls confusion (arXiv
    1810.07052). The product is our choice: by a distance alone two exits that know nothing would
    agree. Without a neighbour, at the first exit, it is that of the exit with itself.
    """

    def __init__(self, before: str | None = None) -> None:
        super().__init__()
        self.before = before
        self.reads = () if before is None else (before,)

    def score(self, seen: Seen) -> Tensor:
        """Sum over classes of the two probabilities' product, [B]."""
        assert seen.own is not None
        own = seen.own.softmax(-1)
        other = own if self.before is None else seen.logits[self.before].softmax(-1)
        return (own * other).sum(-1)

    def score_range(self) -> ScoreRange:
        """A probability: of sure exits 1, of exits that are sure of different classes 0."""
        return ScoreRange(0.0, 1.0, saturates=(0.0, 1.0))

    def config(self) -> dict[str, Any]:
        """Name, and the neighbour."""
        return {"name": "Agreement", "before": self.before}


def agreement(reads: Sequence[str]) -> Agreement:
    """Agreement with the last exit before this one."""
    return Agreement(reads[-1] if reads else None)
