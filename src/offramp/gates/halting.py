"""The sum of halting scores as a gate: samples leave a stage of adaptive depth when it is large
enough.

Graves, 2016, arXiv 1603.08983; in residual networks Figurnov et al., 2017, arXiv 1612.02297.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Halting"]


class Halting(Gate):
    """h_1 + ... + h_l after unit l of a stage: [B], from 0 to l.

    It stands in networks that `offramp.unrolled` makes: what a unit hands on ends with the sum of
    the scores before it and its own score. The rule of the paper is the threshold 1 - eps; lower
    ones leave earlier.
    """

    def __init__(self, unit: int = 1) -> None:
        super().__init__()
        self.unit = unit

    def score(self, seen: Seen) -> Tensor:
        """[B, ...] -> [B]."""
        return seen.features[:, -2] + seen.features[:, -1]

    def score_range(self) -> ScoreRange:
        """From 0 to as many as there were units."""
        return ScoreRange(0.0, float(self.unit))

    def config(self) -> dict[str, Any]:
        """Name, and the number of the unit."""
        return {"name": "Halting", "unit": self.unit}
