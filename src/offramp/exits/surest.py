"""The last exit of Shallow-Deep Networks: the output with the highest confidence of all exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.networks.nodes import Exit, Seen

__all__ = ["Surest"]


class Surest(Exit):
    """For each row the logits of the exit with the largest softmax probability: the model's own, or
    an earlier one.

    This is the rule of Kaya, Hong and Dumitras, 2019, arXiv 1810.07052, for rows that reach the
    end. The exit is at the model's end and reads all earlier exits, so they run even if a plan
    closes their gates. Of equals the deepest wins (our choice). The model's own output stays in the
    trace, as `answer/backbone`.

    Args:
        reads: the earlier exits.
    """

    def __init__(self, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits = seen.features  # the model's own
        highest = logits.softmax(-1).amax(-1, keepdim=True)  # [B, 1]
        # From deep to shallow with a strict comparison, so that of equals the deepest wins.
        for name in reversed(self.reads):
            other = seen.logits[name]
            confidence = other.softmax(-1).amax(-1, keepdim=True)  # [B, 1]
            logits = torch.where(confidence > highest, other, logits)
            highest = torch.maximum(confidence, highest)
        return logits

    def pool(self, features: Tensor) -> Tensor:
        """Logits [B, C]: nothing is pooled."""
        return features

    def config(self) -> dict[str, Any]:
        """Name, and the exits that it reads."""
        return {"name": "Surest", "reads": list(self.reads)}
