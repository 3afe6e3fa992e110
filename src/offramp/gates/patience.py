"""A gate that counts how long the answer has not changed: PABEE's counter as a score.

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
    """The number of exits in a row, up to this one, whose answer is that of the exit before them.

    The counter of the paper is 0 at the first exit, grows by one at each exit that agrees with the
    one before it, and falls to 0 if they differ. A threshold p (or p - 1/2) is the patience p: a
    sample with constant answers leaves at exit p + 1. The paper's patience of 0, which runs the
    whole network, is +inf here. ZTW counts from 1, so its patience is one more; the order of rows
    is the same. The authors' code waits until a whole batch agrees. Here each row has its own
    counter.

    Args:
        reads: all earlier exits, shallow to deep.
    """

    def __init__(self, reads: Sequence[str] = ()) -> None:
        super().__init__()
        self.reads = tuple(reads)

    def score(self, seen: Seen) -> Tensor:
        """The counter [B], in float32."""
        assert seen.own is not None
        earlier = [seen.logits[name].argmax(-1) for name in self.reads]
        answers = torch.stack([*earlier, seen.own.argmax(-1)], 1)  # [B, E]
        # Whether each exit agrees with the one before it, this exit first: [B, E - 1]. The product
        # of the first k values is 1 as long as all of them agree, so the sum is the counter.
        agree = (answers[:, 1:] == answers[:, :-1]).flip(1)
        return agree.long().cumprod(1).sum(1).float()

    def score_range(self) -> ScoreRange:
        """Whole numbers from 0 to the number of earlier exits."""
        return ScoreRange(0.0, float(max(len(self.reads), 1)), whole=True)

    def config(self) -> dict[str, Any]:
        """The name, and the exits that it reads."""
        return {"name": "Patience", "reads": list(self.reads)}


def patience(reads: Sequence[str]) -> Patience:
    """The counter over all earlier exits."""
    return Patience(reads)
