"""Plans of a network with forks, each replayed on the rows along every path that its scores leave
open.

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

MOST = 1000  # plans of a path
LEAST = 200
WORK = 4_000_000  # plans times rows
USUAL = 256.0

Array = np.ndarray[Any, np.dtype[Any]]


def thresholds_of(
    topology: Topology, thresholds_G: Sequence[float] | Array
) -> dict[str, tuple[float, ...]]:
    """Thresholds by gate from one list of all; gates beyond the end of the list are closed."""
    thresholds: dict[str, tuple[float, ...]] = {}
    values = [float(t) for t in thresholds_G]
    for gate in topology.gates:
        count = topology.routes(gate)
        some = values[:count]
        values = values[count:]
        thresholds[gate] = (*some, *[float("inf")] * (count - len(some)))
    return thresholds


@dataclass(frozen=True)
class RoutedOutcomes:
    """What plans do on the rows of a trace."""

    thresholds_PG: Array  # float32
    trace: Trace
    losses_NL: Array
    max_exit: str | None = None
    # the group [N] of every row, from 0, where sums by group are wanted
    groups: Array | None = None

    def schedule(self, plan: int) -> Schedule:
        """The schedule of a plan by its number."""
        topology = self.trace.topology
        return compiled(topology, thresholds_of(topology, self.thresholds_PG[plan]), self.max_exit)

    @cached_property
    def loss_P(self) -> Array:
        """Sum over rows of the worst loss within the float band."""
        return np.array(
            [self.worst(plan).sum(dtype=np.float64) for plan in range(len(self.thresholds_PG))]
        )

    @cached_property
    def leaving_P(self) -> Array:
        """Rows that take another way than the last one somewhere."""
        found = np.zeros(len(self.thresholds_PG))
        for plan in range(len(found)):
            other = np.zeros(len(self.trace), bool)
            for visit in self.trace.visits(self.schedule(plan)):
                if visit.scores is not None:
                    other[visit.rows] |= visit.chosen < len(visit.stage.edges) - 1
            found[plan] = np.count_nonzero(other)
        return found

    @cached_property
    def on_score_P(self) -> Array:
        """Whether some finite threshold is itself the score of a row at its gate."""
        found = np.zeros(len(self.thresholds_PG), bool)
        topology = self.trace.topology
        for plan in range(len(found)):
            thresholds = thresholds_of(topology, self.thresholds_PG[plan])
            for label in topology.gate_labels:
                gate = label if label in thresholds else label.rpartition("#")[0]
                for name, t in zip(topology.score_columns(label), thresholds[gate], strict=True):
                    found[plan] |= bool(np.isfinite(t)) and bool(
                        (self.trace.columns[name] == np.float32(t)).any()
                    )
        return found

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group: plan numbers [C] and sums [C, B], so many plans at a
        time.
        """
        assert self.groups is not None
        count = int(self.groups.max()) + 1
        for start in range(0, len(self.thresholds_PG), plans):
            some_P = np.arange(start, min(start + plans, len(self.thresholds_PG)))
            sums = [np.bincount(self.groups, self.worst(int(plan)), count) for plan in some_P]
            yield some_P, np.stack(sums)

    def worst(self, plan: int) -> Array:
        """The worst loss [N] of every row over the paths that it may take: near a threshold last
        bits decide.
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
    """A path with fewer plans, its ends among them: which ones is fixed before a row is seen.

    Every plan is replayed on all rows, so that with more rows there are fewer plans: MOST down to
    LEAST. Scores of more than USUAL in size are rare, so all but the ends lie within.
    """
    count = min(MOST, max(LEAST, WORK // max(rows, 1)))
    usual = np.flatnonzero(np.abs(path_P) <= USUAL)
    places = usual if len(usual) else np.arange(len(path_P))
    picks = places[np.unique(np.linspace(0, len(places) - 1, count - 2).astype(np.intp))]
    some: Array = path_P[np.unique([0, *picks.tolist(), len(path_P) - 1])]
    return some
