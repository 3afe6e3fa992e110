"""A plan found on a sample of the rows, refined on all of them, in memory for a block of rows.

The search needs every score sorted and several tables of float64; for a million rows that is too
much, and a sample finds nearly the same plan. But what a plan costs and loses on the sample is not
what it does on all rows: a budget may be missed by a little. So one gate at a time is moved, over a
few thousand places between the scores of all rows, to the place that is best while the limit holds
on all rows, until no gate moves.

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

MOST_CUTS = 4096  # of one gate: places 0.02 % of the rows apart
ROUNDS = 30  # moves; each asks for one pass over the rows


@dataclass(frozen=True)
class Refined:
    """The summed goal and the held sum of a plan on all rows, and its cuts."""

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
        # the first cut at which a row leaves; one behind the last for a row that never does
        self.column_GN: list[NDArray[np.uint16]] = []
        for values_K, score_N in zip(self.values_GK, scores_NG.T, strict=True):
            first_N = np.searchsorted(-values_K[1:], -score_N, side="left") + 1
            self.column_GN.append(first_N.astype(np.uint16))

    def cuts_at(self, thresholds_G: Singles) -> Ints:
        """The cuts nearest to some thresholds, none of them lower."""
        found = []
        for values_K, t in zip(self.values_GK, thresholds_G, strict=True):
            found.append(np.searchsorted(-values_K, -t, side="right") - 1)
        return np.maximum(np.array(found, np.intp), 0)

    def thresholds(self, cut_G: Ints) -> Singles:
        """The thresholds that cuts stand for."""
        values = [values_K[cut] for values_K, cut in zip(self.values_GK, cut_G, strict=True)]
        return np.array(values, np.float32)

    def refined(self, start_G: Ints, limit: float) -> Refined | None:
        """The plan after the best move of one gate, again and again, while the held sum keeps the
        limit.

        While the limit is not kept, a move that brings it about is looked for, else the one that
        comes nearest. None if no plan on the way keeps it.
        """
        cut_G = start_G.copy()
        for _ in range(ROUNDS):
            curves, now = self._curves(cut_G)
            least = 1e-12 * abs(now[0])
            goal = now[0] - least if now[1] <= limit else np.inf
            move: tuple[int, int] | None = None
            nearest: tuple[float, int, int] = (now[1] - 1e-12 * abs(now[1]), -1, 0)
            for gate, goal_K, held_K in curves:
                k = lowest(goal_K, held_K, limit, goal)
                if k is not None:
                    goal = float(goal_K[k])
                    move = (gate, k)
                index = int(held_K.argmin())
                nearest = min(nearest, (float(held_K[index]), gate, index))
            if move is None and now[1] > limit and nearest[1] >= 0:
                move = nearest[1:]
            if move is None:
                break
            cut_G[move[0]] = move[1]
        _, now = self._curves(cut_G)
        return Refined(cut_G, *now) if now[1] <= limit else None

    def _curves(self, cut_G: Ints) -> tuple[list[tuple[int, Floats, Floats]], tuple[float, float]]:
        """Every open gate moved alone: goal and held sum at all its cuts; and both sums of the plan
        itself.

        A gate's curve is a running sum. At cut k the rows whose first cut is at most k leave there,
        and each changes the sum by its gain: what it is worth here less what it is worth if it goes
        on, nothing if it never arrives. So the gains are summed by first cut, block by block, and
        then along the cuts.
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
            arrives = {}
            here_N = np.ones(len(loss_NE), bool)
            for gate in gates:
                arrives[gate] = here_N
                here_N = here_N & (self.column_GN[gate][block] > cut_G[gate])
            # from the last gate to the first: what a row is worth if it goes on
            loss_N = loss_NE[:, -1].astype(np.float64)
            price_N = price_NE[:, -1]
            for gate in reversed(gates):
                column_N = self.column_GN[gate][block]
                some = np.flatnonzero(arrives[gate])
                size = gains[gate].shape[1]
                gain_N = (loss_NE[:, gate] - loss_N)[some]
                gains[gate][0] += np.bincount(column_N[some], gain_N, size)
                gain_N = (price_NE[:, gate] - price_N)[some]
                gains[gate][1] += np.bincount(column_N[some], gain_N, size)
                leaves_N = column_N <= cut_G[gate]
                loss_N = np.where(leaves_N, loss_NE[:, gate], loss_N)
                price_N = np.where(leaves_N, price_NE[:, gate], price_N)
            loss += float(loss_N.sum())
            cost += float(price_N.sum())
        curves = []
        for gate, gain_2K in gains.items():
            sums_2K = np.cumsum(gain_2K[:, :-1], axis=1)
            sums_2K += np.array([[loss], [cost]]) - sums_2K[:, [cut_G[gate]]]
            curves.append((gate, *self._goal_and_held(sums_2K[0], sums_2K[1])))
        goal, held = self._goal_and_held(np.array(loss), np.array(cost))
        return curves, (float(goal), float(held))

    def _goal_and_held(self, loss: Floats, cost: Floats) -> tuple[Floats, Floats]:
        if self.loss_held:
            return cost + self.tie * loss, loss
        return loss + self.tie * cost, cost
