"""Plans of a network with forks. Each is replayed on the rows along every path that their scores
allow.

Shapes: P plans (plan 0 sends every row to the last successor), N rows, G thresholds of all gates, L
exits on every path to them, B groups of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from offramp.calibration.sweep import band_edges
from offramp.plans.schedule import Schedule, Stage, compiled
from offramp.plans.topology import LEAVE, Topology
from offramp.plans.trace import Trace

MOST = 1000  # plans of a path, at most
LEAST = 200  # plans of a path, at least
WORK = 4_000_000  # plans times rows
USUAL = 256.0  # larger scores are rare

Array = np.ndarray[Any, np.dtype[Any]]


def thresholds_of(
    topology: Topology, thresholds_G: Sequence[float] | Array
) -> dict[str, tuple[float, ...]]:
    """Split a list of all thresholds by gate.

    Args:
        topology: of the network.
        thresholds_G: K - 1 for each gate with K successors, in order. Gates beyond the end of the
            list are closed.

    Returns:
        Thresholds by gate.
    """
    thresholds: dict[str, tuple[float, ...]] = {}
    values = [float(threshold) for threshold in thresholds_G]
    for gate in topology.gates:
        count = topology.routes(gate)
        gate_values = values[:count]
        values = values[count:]
        closed = [float("inf")] * (count - len(gate_values))
        thresholds[gate] = (*gate_values, *closed)
    return thresholds


@dataclass(frozen=True)
class RoutedOutcomes:
    """The losses of plans on the rows of a trace.

    Attributes:
        thresholds_PG: float32.
        trace: of a network with forks.
        losses_NL: of the exits on every path to them.
        max_exit: an exit that answers every row that arrives there.
        groups: the group [N] of every row, from 0, if sums by group are needed.
    """

    thresholds_PG: Array
    trace: Trace
    losses_NL: Array
    max_exit: str | None = None
    groups: Array | None = None

    def schedule(self, plan: int) -> Schedule:
        """The schedule of a plan by its number."""
        topology = self.trace.topology
        return compiled(topology, thresholds_of(topology, self.thresholds_PG[plan]), self.max_exit)

    @cached_property
    def loss_P(self) -> Array:
        """Sum over rows of the worst loss within the float band."""
        loss_P = np.zeros(len(self.thresholds_PG))
        for plan in range(len(loss_P)):
            loss_P[plan] = self.worst(plan).sum(dtype=np.float64)
        return loss_P

    @cached_property
    def leaving_P(self) -> Array:
        """How many rows take another way than the last one at some gate."""
        leaving_P = np.zeros(len(self.thresholds_PG))
        for plan in range(len(leaving_P)):
            leaves_N = np.zeros(len(self.trace), bool)
            for visit in self.trace.visits(self.schedule(plan)):
                if visit.scores is not None:
                    leaves_N[visit.rows] |= visit.chosen < len(visit.stage.edges) - 1
            leaving_P[plan] = np.count_nonzero(leaves_N)
        return leaving_P

    @cached_property
    def on_score_P(self) -> Array:
        """Whether some finite threshold equals the score of a row at its gate."""
        on_score_P = np.zeros(len(self.thresholds_PG), bool)
        topology = self.trace.topology
        for plan in range(len(on_score_P)):
            thresholds = thresholds_of(topology, self.thresholds_PG[plan])
            for label in topology.gate_labels:
                # "head#1" is the gate "head" on path 1
                gate = label if label in thresholds else label.rpartition("#")[0]
                names = topology.score_columns(label)
                for name, threshold in zip(names, thresholds[gate], strict=True):
                    if np.isfinite(threshold):
                        is_score_N = self.trace.columns[name] == np.float32(threshold)
                        on_score_P[plan] |= is_score_N.any()
        return on_score_P

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group.

        Args:
            plans: how many plans to sum at a time.

        Yields:
            Plan numbers [C] and their sums [C, B].
        """
        assert self.groups is not None
        count = int(self.groups.max()) + 1
        for start in range(0, len(self.thresholds_PG), plans):
            plans_C = np.arange(start, min(start + plans, len(self.thresholds_PG)))
            sums = [np.bincount(self.groups, self.worst(int(plan)), count) for plan in plans_C]
            yield plans_C, np.stack(sums)  # C sums [B] -> [C, B]

    def worst(self, plan: int) -> Array:
        """The worst loss [N] of every row over the paths that it may take.

        Near a threshold rounding decides, so a row may take several paths.
        """
        schedule = self.schedule(plan)
        first = schedule.stages[0]
        return self._worst_from(schedule, first, (*schedule.skipped, first.name))

    def _worst_from(self, schedule: Schedule, stage: Stage, path: tuple[str, ...]) -> Array:
        """The worst loss [N] of rows that have come to a stage on a path."""
        topology = self.trace.topology
        label = topology.label(path)
        ends = list[Array]()  # by edge
        for edge in stage.edges:
            if edge.to == LEAVE:
                ends.append(self.losses_NL[:, topology.exit_labels.index(label)])
            else:
                after = schedule.stages[schedule.index[edge.to]]
                ends.append(self._worst_from(schedule, after, (*path, *edge.via, edge.to)))
        worst_N = ends[-1]
        if not stage.gate:
            return worst_N
        near_R, sure_R = band_edges(
            np.array(stage.thresholds, np.float32), self.trace.header.origin.band
        )
        names = topology.score_columns(label)
        # From the last way to the first: a row surely takes a way, may take it, or goes on to the
        # later ones.
        for number, route in reversed(list(enumerate(stage.routes))):
            scores_N = self.trace.columns[names[route]]
            here_N = ends[number]
            undecided_N = np.where(scores_N >= near_R[number], np.maximum(here_N, worst_N), worst_N)
            worst_N = np.where(scores_N >= sure_R[number], here_N, undecided_N)
        return worst_N


def few(path_P: Array, rows: int) -> Array:
    """A path with fewer plans. The choice does not depend on the scores of the rows.

    Every plan is replayed on all rows, so more rows mean fewer plans, from MOST down to LEAST. Only
    the ends of the path are beyond USUAL, because larger scores are rare.

    Args:
        path_P: thresholds.
        rows: how many rows the plans are replayed on.

    Returns:
        Some of the thresholds, in the same order, both ends included.
    """
    count = min(MOST, max(LEAST, WORK // max(rows, 1)))
    usual = np.flatnonzero(np.abs(path_P) <= USUAL)
    if not len(usual):
        usual = np.arange(len(path_P))
    spread = np.unique(np.linspace(0, len(usual) - 1, count - 2).astype(np.intp))
    picks = usual[spread].tolist()
    thinned: Array = path_P[np.unique([0, *picks, len(path_P) - 1])]
    return thinned
