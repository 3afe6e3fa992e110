"""A gate for sequences that are read piece by piece: what has ended leaves, whatever its score
is.
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

# the score of what has ended, where scores have no upper end: far above those of ordinary logits
FAR = 256.0


class Ended(Gate):
    """Wraps any gate: a sequence without a position from `read` on gets the largest score.

    That score is one above the range of the wrapped gate, or 256 where it has no upper end. A
    threshold at or below it lets only ended sequences leave, among others.

    Args:
        gate: scores what has not ended.
        mask: the input [B, T] that is 0 behind the end, such as "x/attention_mask".
        read: how many positions have been read at this node.
    """

    def __init__(self, gate: Gate, mask: str, read: int) -> None:
        super().__init__()
        if read < 1:
            raise InvalidArgument(f"read must be at least 1, got {read}")
        self.gate = gate
        self.mask = mask
        self.read = read
        self.reads = (*gate.reads, *(() if mask in gate.reads else (mask,)))

    @property
    def largest(self) -> float:
        """The score of what has ended."""
        high = self.gate.score_range().high
        return high + 1 if high < math.inf else FAR

    def score(self, seen: Seen) -> Tensor:
        """[B]."""
        ended = (seen.inputs[self.mask][:, self.read :] == 0).all(1)
        found = self.gate.score(seen).float()
        return torch.where(ended, self.largest, found)

    def score_range(self) -> ScoreRange:
        """The wrapped gate's, and one value above it that many rows share."""
        inner = self.gate.score_range()
        return ScoreRange(inner.low, self.largest, (*inner.saturates, self.largest))

    def config(self) -> dict[str, Any]:
        """Name, arguments, and the wrapped gate's configuration."""
        return {"name": "Ended", "mask": self.mask, "read": self.read, "gate": self.gate.config()}
