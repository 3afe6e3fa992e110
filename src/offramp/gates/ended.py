"""A gate for sequences that are read piece by piece: a sequence that has ended leaves, whatever its
score is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from offramp.errors import InvalidArgument
from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Ended"]

# the score of ended sequences if scores have no upper end; far above the scores of ordinary logits
FAR = 256.0


class Ended(Gate):
    """Wraps any gate, and gives the largest score to a sequence that has ended.

    This score is one above the range of the wrapped gate, or 256 if the range has no upper end.
    With a threshold between the range and this score, only ended sequences leave.

    Args:
        gate: the gate for sequences that have not ended.
        mask: name of the input [B, T] that is 0 after the end, such as "x/attention_mask".
        read: number of positions that have been read at this node.

    Raises:
        InvalidArgument: `read` is below 1.
    """

    def __init__(self, gate: Gate, mask: str, read: int) -> None:
        super().__init__()
        if read < 1:
            raise InvalidArgument(f"read must be at least 1, got {read}")
        self.gate = gate
        self.mask = mask
        self.read = read
        self.reads = gate.reads
        if mask not in gate.reads:
            self.reads = (*gate.reads, mask)

    @property
    def largest(self) -> float:
        """The score of a sequence that has ended."""
        high = self.gate.score_range().high
        if high == math.inf:
            return FAR
        return high + 1

    def score(self, seen: Seen) -> Tensor:
        """The wrapped gate's score, or the largest one, [B]."""
        # ended: no position from `read` on is left in the mask
        ended = (seen.inputs[self.mask][:, self.read :] == 0).all(1)  # [B]
        inner = self.gate.score(seen).float()
        return torch.where(ended, self.largest, inner)

    def score_range(self) -> ScoreRange:
        """The wrapped gate's range, and one value above it that many rows share."""
        inner = self.gate.score_range()
        return ScoreRange(inner.low, self.largest, (*inner.saturates, self.largest))

    def config(self) -> dict[str, Any]:
        """The name, the arguments, and the wrapped gate's configuration."""
        return {"name": "Ended", "mask": self.mask, "read": self.read, "gate": self.gate.config()}
