"""Linear exits trained by a hinge loss on a frozen backbone: the d-gate.

Shafiee, Shafiee and Wong, 2018, arXiv 1811.01476. A gate there is one linear layer whose outputs
are signed distances to the classes' boundaries. A sample leaves if it is far from every wrong
boundary. The paper's formulas, its pooling and its optimizer are not available, so these choices
are ours: one-vs-rest (each output is the distance to its own class's boundary) by default, and
Crammer-Singer as an option (both in Dogan, Glasmachers and Igel, JMLR 17(45), 2016, which the paper
cites); a squared norm as regularizer, chosen on development rows; and a solution to a proven
relative duality gap, instead of the paper's sub-gradient steps. The paper's score is the largest
output (gate `max_logit`); the default here is the top-two margin (`margin`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offramp.errors import InvalidArgument
from offramp.networks.network import Network
from offramp.networks.recipe import FeatureTable, Phase, Recipe
from offramp.recipes._linear import (
    REGULARIZERS,
    phases_of,
    require_linear,
    require_numbers,
    solve_exit,
)

__all__ = ["Hinge"]

KINDS = ("one_vs_rest", "crammer_singer")


class Hinge(Recipe):
    """One convex problem per exit, on cached pooled features.

    Args:
        kind: "one_vs_rest" or "crammer_singer".
        regularizer: a number, or several. Of several, the one with the highest accuracy on the
            development rows is taken, or on every tenth row if there are no development rows.
        gap: the relative duality gap to reach. The history has the gap that was reached.
    """

    def __init__(
        self,
        kind: str = "one_vs_rest",
        *,
        regularizer: float | Sequence[float] = REGULARIZERS,
        gap: float = 1e-3,
    ) -> None:
        self.kind = kind
        self.regularizer = regularizer
        self.gap = gap

    def prepare(self, network: Network) -> None:
        """Check the arguments and the exits.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: kind is unknown, or a number is out of range.
            BadNetwork: an exit is not linear on pooled features.
        """
        if self.kind not in KINDS:
            raise InvalidArgument(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        require_numbers(self.regularizer, self.gap)
        require_linear(network)

    def phases(self, network: Network) -> list[Phase]:
        """A phase per exit."""
        return phases_of(network)

    def solve(
        self, phase: Phase, table: FeatureTable, development: FeatureTable | None
    ) -> Mapping[str, float]:
        """Solve for the exit of this phase."""
        return solve_exit(phase.name, table, development, self.kind, self.regularizer, self.gap)
