"""How long the answer has not changed: PABEE's counter as a score.

Zhou, Xu, Ge, McAuley, Xu and Wei, 2020, arXiv 2006.04152.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Patience", "patience"]


class Patience(Gate):
    """How many exits in a row, this one last, answered as the one before them did.

    The counter of the paper: 0 at the first exit, one more for each exit that agrees with the one
    before it, 0 again where they differ. A threshold p (or p - 1/2) is the patience p: constant
    answers leave at exit p + 1. A patience of 0, which there runs the whole network, is +inf here.
    ZTW counts from 1 (its patience is one more); the order of rows is the same. The authors' code
    waits until all of a batch agree; here each row counts for itself.
    reads: all earlier exits, shallow to deep.
    """

    def __init__(self, reads: Sequence[str] = ()) -> None:
        super().__init__()
        self.reads = tuple(reads)

    def score(self, seen: Seen) -> Tensor:
        """The counter [B], in float32."""
        assert seen.own is not None
        answers = torch.stack(
            [*(seen.logits[name].argmax(-1) for name in self.reads), seen.own.argmax(-1)], 1
        )
        agree = (answers[:, 1:] == answers[:, :-1]).flip(1)  # [B, E - 1], this exit's first
        return agree.long().cumprod(1).sum(1).float()

    def score_range(self) -> ScoreRange:
        """Whole numbers from 0 to the number of earlier exits."""
        return ScoreRange(0.0, float(max(len(self.reads), 1)), whole=True)

    def config(self) -> dict[str, Any]:
        """Name, and the exits that it reads."""
        return {"name": "Patience", "reads": list(self.reads)}


def patience(reads: Sequence[str]) -> Patience:
    """The counter over all earlier exits."""
    return Patience(reads)
