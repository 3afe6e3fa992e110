"""Refine a plan that was found on a sample of the rows, on all of them, a block of rows at a time.

The search needs every score sorted and several tables of float64. For a million rows that is too
much memory, and a sample gives nearly the same plan. But the cost and loss on the sample are not
those on all rows: a budget may be missed by a little. So one gate at a time is moved to the best
cut that holds the limit on all rows, out of a few thousand cuts between the scores of all rows,
until no gate moves.

Legend: N rows, G gates (= E - 1), E exits, K cuts of a gate: cut 0 is a closed gate, a higher cut
lets more leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.calibration.moves import lowest
from offramp.calibration.sweep import BLOCK
from offramp.calibration.threshold_table import Bools, Floats, Ints, Singles, thinned

MOST_CUTS = 4096  # of one gate: cuts 0.02 % of the rows apart
ROUNDS = 30  # moves; each needs one pass over the rows


@dataclass(frozen=True)
class Refined:
    """A plan on all rows.

    Attributes:
        cut_G: its cuts.
        goal: the summed goal.
        held: the sum that is held below the limit.
    """

    cut_G: Ints
    goal: float
    held: float


class Refiner:
    """All rows of a chain by the cuts at which they leave.

    Args:
        scores_NG: float32 scores.
        losses_NE: losses.
        cost: open exits [E] -> costs [N, E], nothing at closed exits.
        loss_held: whether the loss is held and the cost made small, or the other way round.
        tie: how much the held sum counts in the goal, so that of equal goals the smaller held sum
            is taken.
    """

    def __init__(
        self,
        scores_NG: Singles,
        losses_NE: Floats,
        cost: Callable[[Bools], Floats],
        *,
        loss_held: bool,
        tie: float,
    ) -> None:
        self.losses_NE = losses_NE
        self.cost = cost
        self.loss_held = loss_held
        self.tie = tie
        self.values_GK = [thinned(score_N, MOST_CUTS) for score_N in scores_NG.T]
        # The first cut at which a row leaves, one more than the last for a row that never does.
        # Cuts fall, so their negatives rise and a binary search finds the position.
        self.column_GN: list[NDArray[np.uint16]] = []
        for values_K, score_N in zip(self.values_GK, scores_NG.T, strict=True):
            first_N = np.searchsorted(-values_K[1:], -score_N, side="left") + 1
            self.column_GN.append(first_N.astype(np.uint16))

    def cuts_at(self, thresholds_G: Singles) -> Ints:
        """For each threshold the nearest cut whose value is not lower."""
        cuts = []
        for values_K, threshold in zip(self.values_GK, thresholds_G, strict=True):
            cuts.append(np.searchsorted(-values_K, -threshold, side="right") - 1)
        return np.maximum(np.array(cuts, np.intp), 0)

    def thresholds(self, cut_G: Ints) -> Singles:
        """The thresholds of some cuts."""
        values = [values_K[cut] for values_K, cut in zip(self.values_GK, cut_G, strict=True)]
        return np.array(values, np.float32)

    def refined(self, start_G: Ints, limit: float) -> Refined | None:
        """Make the best move of one gate, again and again, while the held sum keeps the limit.

        While the limit is not kept, the best move that keeps it is made; if there is none, the move
        that comes nearest to it.

        Args:
            start_G: cuts to start from.
            limit: of the held sum.

        Returns:
            The plan, or None if no plan on the way keeps the limit.
        """
        cut_G = start_G.copy()
        for _ in range(ROUNDS):
            curves, (goal_now, held_now) = self._curves(cut_G)
            # a move must lower the goal by more than rounding
            goal = np.inf
            if held_now <= limit:
                goal = goal_now - 1e-12 * abs(goal_now)
            move: tuple[int, int] | None = None
            nearest: tuple[float, int, int] = (held_now - 1e-12 * abs(held_now), -1, 0)
            for gate, goal_K, held_K in curves:
                k = lowest(goal_K, held_K, limit, goal)
                if k is not None:
                    goal = float(goal_K[k])
                    move = (gate, k)
                least = int(held_K.argmin())
                nearest = min(nearest, (float(held_K[least]), gate, least))
            if move is None and held_now > limit and nearest[1] >= 0:
                move = nearest[1:]
            if move is None:
                break
            gate, k = move
            cut_G[gate] = k
        _, (goal_now, held_now) = self._curves(cut_G)
        if held_now > limit:
            return None
        return Refined(cut_G, goal_now, held_now)

    def _curves(self, cut_G: Ints) -> tuple[list[tuple[int, Floats, Floats]], tuple[float, float]]:
        """The goal and held sum of every open gate at all its cuts, and those of the plan itself.

        A gate's curve is a running sum. At cut k the rows whose first cut is at most k leave there,
        and each changes the sum by its gain: its value here minus its value if it goes on, 0 if it
        never arrives. So the gains are summed by first cut, block by block, and then along the
        cuts.
        """
        gates = [int(g) for g in np.flatnonzero(cut_G)]
        cost_NE = self.cost(np.append(cut_G > 0, True))
        gains = {gate: np.zeros((2, len(self.values_GK[gate]) + 1)) for gate in gates}
        loss = 0.0
        cost = 0.0
        for start in range(0, len(self.losses_NE), BLOCK):
            block = slice(start, start + BLOCK)
            loss_NE = self.losses_NE[block]
            price_NE = cost_NE[block]
            # from the first gate to the last: which rows arrive there
            arrives = {}
            here_N = np.ones(len(loss_NE), bool)
            for gate in gates:
                arrives[gate] = here_N
                here_N = here_N & (self.column_GN[gate][block] > cut_G[gate])
            # from the last gate to the first: the value of a row if it goes on
            loss_N = loss_NE[:, -1].astype(np.float64)
            price_N = price_NE[:, -1]
            for gate in reversed(gates):
                column_N = self.column_GN[gate][block]
                arriving = np.flatnonzero(arrives[gate])
                size = gains[gate].shape[1]
                gain_N = (loss_NE[:, gate] - loss_N)[arriving]
                gains[gate][0] += np.bincount(column_N[arriving], gain_N, size)
                gain_N = (price_NE[:, gate] - price_N)[arriving]
                gains[gate][1] += np.bincount(column_N[arriving], gain_N, size)
                leaves_N = column_N <= cut_G[gate]
                loss_N = np.where(leaves_N, loss_NE[:, gate], loss_N)
                price_N = np.where(leaves_N, price_NE[:, gate], price_N)
            loss += float(loss_N.sum())
            cost += float(price_N.sum())
        curves = []
        for gate, gain_2K in gains.items():
            sums_2K = np.cumsum(gain_2K[:, :-1], axis=1)
            # at its present cut the gate's curve has the sums of the plan
            sums_2K += np.array([[loss], [cost]]) - sums_2K[:, [cut_G[gate]]]
            curves.append((gate, *self._goal_and_held(sums_2K[0], sums_2K[1])))
        goal, held = self._goal_and_held(np.array(loss), np.array(cost))
        return curves, (float(goal), float(held))

    def _goal_and_held(self, loss: Floats, cost: Floats) -> tuple[Floats, Floats]:
        """The goal, with a small part of the held sum to decide ties, and the held sum."""
        if self.loss_held:
            return cost + self.tie * loss, loss
        return loss + self.tie * cost, cost
