"""A gate that scores the ensemble of all exits so far."""

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
    """Another gate's score of the mean of log-probabilities over this exit and earlier ones.

    The mean is the geometric ensemble with equal weights. (Wolczyk et al., 2021, arXiv 2106.05409,
    learn the weights: exits `cascade`.) Only the score comes from the ensemble; the answer is still
    the exit's own. With the margin, which is the default, scores do not tie where probabilities
    would.

    Args:
        reads: the earlier exits of the ensemble.
        gate: scores the ensemble; None for the margin.
    """

    def __init__(self, reads: Sequence[str] = (), gate: Gate | None = None) -> None:
        super().__init__()
        if gate is None:
            gate = Scorer("margin", margin)
        self.gate = gate
        self.among = tuple(reads)
        self.reads = tuple(dict.fromkeys((*self.among, *gate.reads)))

    def score(self, seen: Seen) -> Tensor:
        """The wrapped gate's score [B] of the ensemble [B, C]."""
        assert seen.own is not None
        earlier = [seen.logits[name] for name in self.among]
        logits = torch.stack([*earlier, seen.own])  # [E, B, C]
        mean = logits.log_softmax(-1).mean(0)  # [B, C]
        return self.gate.score(Seen(seen.features, seen.logits, mean))

    def score_range(self) -> ScoreRange:
        """The wrapped gate's range."""
        return self.gate.score_range()

    def config(self) -> dict[str, Any]:
        """The name, the exits, and the wrapped gate's configuration."""
        return {"name": "Ensemble", "reads": list(self.among), "gate": self.gate.config()}


def ensemble(reads: Sequence[str]) -> Ensemble:
    """The margin of the ensemble over all exits so far."""
    return Ensemble(reads)
