"""A list of plans, each with thresholds of its own for each gate, evaluated in blocks of rows.

Where all gates share one threshold, `sweep` does the same for thousands of plans at once. Here a
plan costs two comparisons per row and gate. Shapes: P plans (plan 0 never leaves), N rows, G gates,
E exits, B groups of rows.
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
    """The losses of the plans of a list on some rows.

    Attributes:
        thresholds_PG: float32. The first plan should be the one that never leaves.
        scores_NG: float32.
        losses_NE: of any type.
        band: the float band.
        groups: the group [N] of every row, from 0, if sums by group are needed.
    """

    thresholds_PG: Array
    scores_NG: Array
    losses_NE: Array
    band: float
    groups: Array | None = None

    def _blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.losses_NE), BLOCK):
            yield slice(start, start + BLOCK)

    @cached_property
    def _edges(self) -> tuple[Array, Array]:
        """The smallest scores that may leave, and that must leave, for each plan and gate."""
        return band_edges(self.thresholds_PG, self.band)

    @cached_property
    def loss_P(self) -> Array:
        """Sum over rows of the worst loss within the float band."""
        loss_P = np.full(len(self.thresholds_PG), self.losses_NE[:, -1].sum(dtype=np.float64))
        for block in self._blocks():
            rows, losses = self._uneven(block)
            scores = self.scores_NG[rows]
            last_N = losses[:, -1]
            for plan in range(len(loss_P)):
                worst_N = self._worst(plan, scores, losses)
                loss_P[plan] += worst_N.sum(dtype=np.float64) - last_N.sum(dtype=np.float64)
        return loss_P

    @cached_property
    def reach_PE(self) -> Array:
        """How many rows arrive at each exit, with the rule of `plan.choose`."""
        plans, gates = self.thresholds_PG.shape
        reach_PE = np.zeros((plans, gates + 1))
        for block in self._blocks():
            columns = np.ascontiguousarray(self.scores_NG[block].T)
            for plan in range(plans):
                going_N = np.ones(columns.shape[1], bool)
                reach_PE[plan, 0] += len(going_N)
                for gate in range(gates):
                    threshold = self.thresholds_PG[plan, gate]
                    if threshold < np.inf:  # NaN scores go on
                        going_N &= ~(columns[gate] >= threshold)
                    reach_PE[plan, gate + 1] += np.count_nonzero(going_N)
        return reach_PE

    @property
    def leaving_P(self) -> Array:
        """How many rows leave before the last exit."""
        leaving: Array = self.reach_PE[:, 0] - self.reach_PE[:, -1]
        return leaving

    @cached_property
    def on_score_P(self) -> Array:
        """Whether some finite threshold equals the score of a row at its gate."""
        on_score_P = np.zeros(len(self.thresholds_PG), bool)
        for gate in range(self.thresholds_PG.shape[1]):
            threshold_P = self.thresholds_PG[:, gate]
            is_score_P = np.isin(threshold_P, self.scores_NG[:, gate])
            on_score_P |= np.isfinite(threshold_P) & is_score_P
        return on_score_P

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group.

        Args:
            plans: how many plans to sum at a time.

        Yields:
            Plan numbers [C] and their sums [C, B].
        """
        assert self.groups is not None
        # start from the losses of never leaving, and add the changes of the rows that have any
        never_B = np.bincount(self.groups, self.losses_NE[:, -1])
        for start in range(0, len(self.thresholds_PG), plans):
            plans_C = np.arange(start, min(start + plans, len(self.thresholds_PG)))
            sums_CB = np.repeat(never_B[None], len(plans_C), axis=0)  # [B] -> [C, B]
            for block in self._blocks():
                rows, losses = self._uneven(block)
                scores = self.scores_NG[rows]
                for index, plan in enumerate(plans_C):
                    change_N = self._worst(int(plan), scores, losses) - losses[:, -1]
                    sums_CB[index] += np.bincount(self.groups[rows], change_N, len(never_B))
            yield plans_C, sums_CB

    def _uneven(self, block: slice) -> tuple[Array, Array]:
        """Numbers and losses of the rows in a block whose loss differs between exits."""
        losses = self.losses_NE[block]
        uneven = np.flatnonzero((losses != losses[:, :1]).any(1))
        return uneven + block.start, losses[uneven]

    def _worst(self, plan: int, scores_NG: Array, losses_NE: Array) -> Array:
        """The worst loss [N] of some rows under one plan, from the last gate to the first."""
        near_G = self._edges[0][plan]
        sure_G = self._edges[1][plan]
        worst_N = losses_NE[:, -1]
        for gate in reversed(range(scores_NG.shape[1])):
            if np.isnan(near_G[gate]):  # a closed gate
                continue
            # the row surely goes on, surely leaves, or may do either: then the worse counts
            here_N = losses_NE[:, gate]
            near_N = scores_NG[:, gate] >= near_G[gate]
            undecided_N = np.where(near_N, np.maximum(here_N, worst_N), worst_N)
            worst_N = np.where(scores_NG[:, gate] >= sure_G[gate], here_N, undecided_N)
        return worst_N
