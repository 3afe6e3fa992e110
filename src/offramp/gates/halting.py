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
    """The sum of halting scores h_1 + ... + h_l after unit l of a stage: [B], from 0 to l.

    `offramp.unrolled` makes networks with this gate. The last two features of a unit's output are
    the sum of the scores before it, and its own score. The paper's rule is the threshold 1 - eps.
    With a lower threshold samples leave earlier.

    Args:
        unit: l, from 1.
    """

    def __init__(self, unit: int = 1) -> None:
        super().__init__()
        self.unit = unit

    def score(self, seen: Seen) -> Tensor:
        """Features [B, F] -> [B]."""
        return seen.features[:, -2] + seen.features[:, -1]

    def score_range(self) -> ScoreRange:
        """From 0 to the number of units so far, because each score is at most 1."""
        return ScoreRange(0.0, float(self.unit))

    def config(self) -> dict[str, Any]:
        """The name, and the number of the unit."""
        return {"name": "Halting", "unit": self.unit}
