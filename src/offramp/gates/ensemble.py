"""A gate that looks at the ensemble of all exits so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.gates.confidence import margin
from offramp.networks.nodes import Gate, Scorer, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Ensemble", "ensemble"]


class Ensemble(Gate):
    """Another gate's score of the mean over exits, this one included, of their log-probabilities.

    That mean is the geometric ensemble with equal weights (Wolczyk et al., 2021, arXiv 2106.05409,
    learn them: exits `cascade`). Only the score is of the ensemble; the answer stays the exit's
    own. With the margin (the default) scores do not tie where probabilities would. reads: the exits
    that it takes in beside this one.
    """

    def __init__(self, reads: Sequence[str] = (), gate: Gate | None = None) -> None:
        super().__init__()
        self.gate = Scorer("margin", margin) if gate is None else gate
        self.among = tuple(reads)
        self.reads = tuple(dict.fromkeys((*self.among, *self.gate.reads)))

    def score(self, seen: Seen) -> Tensor:
        """The wrapped gate's score [B] of the ensemble [B, C]."""
        assert seen.own is not None
        every = torch.stack([*(seen.logits[name] for name in self.among), seen.own])  # [E, B, C]
        return self.gate.score(Seen(seen.features, seen.logits, every.log_softmax(-1).mean(0)))

    def score_range(self) -> ScoreRange:
        """The wrapped gate's."""
        return self.gate.score_range()

    def config(self) -> dict[str, Any]:
        """Name, the exits, and the wrapped gate's configuration."""
        return {"name": "Ensemble", "reads": list(self.among), "gate": self.gate.config()}


def ensemble(reads: Sequence[str]) -> Ensemble:
    """The margin of the ensemble over all exits so far."""
    return Ensemble(reads)
