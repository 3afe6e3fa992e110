"""A list of plans, each gate with a threshold of its own, evaluated in blocks of rows.

Where all gates share one threshold, `sweep` does the same for thousands of plans at once; here a
plan costs two comparisons a row and gate. Shapes: P plans (plan 0 never leaves), N rows, G gates, E
exits, B groups of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from offramp.calibration.sweep import BLOCK, band_edges

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Listed:
    """What the plans of a list do on the rows. The first plan should be the one that never
    leaves.
    """

    thresholds_PG: Array  # float32
    scores_NG: Array  # float32
    losses_NE: Array
    band: float
    # the group [N] of every row, from 0, where sums by group are wanted
    groups: Array | None = None

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.losses_NE), BLOCK):
            yield slice(start, start + BLOCK)

    @cached_property
    def _edges(self) -> tuple[Array, Array]:
        """Per plan and gate the smallest scores that may leave and that must leave."""
        return band_edges(self.thresholds_PG, self.band)

    @cached_property
    def loss_P(self) -> Array:
        """Sum over rows of the worst loss within the float band."""
        loss_P = np.full(len(self.thresholds_PG), self.losses_NE[:, -1].sum(dtype=np.float64))
        for block in self._blocks():
            some, losses = self._uneven(block)
            scores = self.scores_NG[some]
            last_N = losses[:, -1]
            for plan in range(len(loss_P)):
                worst_N = self._worst(plan, scores, losses)
                loss_P[plan] += worst_N.sum(dtype=np.float64) - last_N.sum(dtype=np.float64)
        return loss_P

    @cached_property
    def reach_PE(self) -> Array:
        """Rows that arrive at each exit, as `plan.choose` has it."""
        plans, gates = self.thresholds_PG.shape
        reach_PE = np.zeros((plans, gates + 1))
        for block in self._blocks():
            columns = np.ascontiguousarray(self.scores_NG[block].T)
            for plan in range(plans):
                going_N = np.ones(columns.shape[1], bool)
                reach_PE[plan, 0] += len(going_N)
                for gate in range(gates):
                    t = self.thresholds_PG[plan, gate]
                    if t < np.inf:
                        going_N &= ~(columns[gate] >= t)
                    reach_PE[plan, gate + 1] += np.count_nonzero(going_N)
        return reach_PE

    @property
    def leaving_P(self) -> Array:
        """Rows that leave before the last exit."""
        leaving: Array = self.reach_PE[:, 0] - self.reach_PE[:, -1]
        return leaving

    @cached_property
    def on_score_P(self) -> Array:
        """Whether some finite threshold is itself the score of a row at its gate."""
        on_score = np.zeros(len(self.thresholds_PG), bool)
        for gate in range(self.thresholds_PG.shape[1]):
            t = self.thresholds_PG[:, gate]
            on_score |= np.isfinite(t) & np.isin(t, self.scores_NG[:, gate])
        return on_score

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group: plan numbers [C] and sums [C, B], so many plans at a
        time.
        """
        assert self.groups is not None
        never_B = np.bincount(self.groups, self.losses_NE[:, -1])
        for start in range(0, len(self.thresholds_PG), plans):
            some_P = np.arange(start, min(start + plans, len(self.thresholds_PG)))
            sums_CB = np.repeat(never_B[None], len(some_P), axis=0)
            for block in self._blocks():
                rows, losses = self._uneven(block)
                scores = self.scores_NG[rows]
                for at, plan in enumerate(some_P):
                    change_N = self._worst(int(plan), scores, losses) - losses[:, -1]
                    sums_CB[at] += np.bincount(self.groups[rows], change_N, len(never_B))
            yield some_P, sums_CB

    def _uneven(self, block: slice) -> tuple[Array, Array]:
        """Row numbers and losses of the rows in a block whose loss is not the same at every
        exit.
        """
        losses = self.losses_NE[block]
        some = np.flatnonzero((losses != losses[:, :1]).any(1))
        return some + block.start, losses[some]

    def _worst(self, plan: int, scores_NG: Array, losses_NE: Array) -> Array:
        """The worst loss [N] of some rows under one plan, from the last gate to the first."""
        near_G = self._edges[0][plan]
        sure_G = self._edges[1][plan]
        worst_N = losses_NE[:, -1]
        for gate in reversed(range(scores_NG.shape[1])):
            if np.isnan(near_G[gate]):  # a closed gate
                continue
            here_N = losses_NE[:, gate]
            near_N = scores_NG[:, gate] >= near_G[gate]
            undecided_N = np.where(near_N, np.maximum(here_N, worst_N), worst_N)
            worst_N = np.where(scores_NG[:, gate] >= sure_G[gate], here_N, undecided_N)
        return worst_N
