"""Linear exits trained by cross-entropy on a frozen backbone: a control for `hinge`, with the same
features.

It is multinomial logistic regression with a squared norm as regularizer, solved by the same solver
to the same gap. If exits are not linear, or do more than pool, use the recipe `joint` with
backbone=False, which takes gradient steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offramp.networks.network import Network
from offramp.networks.recipe import FeatureTable, Phase, Recipe
from offramp.recipes._linear import (
    REGULARIZERS,
    phases_of,
    require_linear,
    require_numbers,
    solve_exit,
)

__all__ = ["CrossEntropy"]


class CrossEntropy(Recipe):
    """One convex problem per exit, on cached pooled features.

    Args:
        regularizer: as in `Hinge`.
        gap: as in `Hinge`.
    """

    def __init__(
        self, *, regularizer: float | Sequence[float] = REGULARIZERS, gap: float = 1e-3
    ) -> None:
        self.regularizer = regularizer
        self.gap = gap

    def prepare(self, network: Network) -> None:
        """Check the arguments and the exits.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: a number is out of range.
            BadNetwork: an exit is not linear on pooled features.
        """
        require_numbers(self.regularizer, self.gap)
        require_linear(network)

    def phases(self, network: Network) -> list[Phase]:
        """A phase per exit."""
        return phases_of(network)

    def solve(
        self, phase: Phase, table: FeatureTable, development: FeatureTable | None
    ) -> Mapping[str, float]:
        """Solve for the exit of this phase."""
        return solve_exit(
            phase.name, table, development, "cross_entropy", self.regularizer, self.gap
        )
