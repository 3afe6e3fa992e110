"""Plans that are settings of one dial, recorded one by one: tested in their order, from the safest
on.

What a row near a threshold would have become on another path was not recorded, so such a row counts
with the largest loss. Shapes: P plans, N rows, S settings (the first closes all gates), B groups of
rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from offramp.calibration.routed import thresholds_of
from offramp.errors import Notice
from offramp.plans.plan import Plan
from offramp.plans.topology import Topology
from offramp.plans.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Dialled:
    """What settings do on the rows of a trace."""

    settings_P: Array  # numbers of settings
    trace: Trace
    losses_NS: Array
    highest: float  # the largest loss that there is
    # the group [N] of every row, from 0, where sums by group are wanted
    groups: Array | None = None

    def worst(self, plan: int) -> Array:
        """The worst loss [N] of every row."""
        number = int(self.settings_P[plan])
        near_N = self.trace.columns[f"setting/near#{number}"]
        return np.where(near_N, self.highest, self.losses_NS[:, number].astype(float))

    @cached_property
    def loss_P(self) -> Array:
        """Sum over rows of the worst loss within the float band."""
        return np.array([self.worst(plan).sum() for plan in range(len(self.settings_P))])

    @cached_property
    def leaving_P(self) -> Array:
        """Rows that take another way than without gates: those for which other nodes ran."""
        names = self.trace.topology.names
        found = np.zeros(len(self.settings_P))
        for plan, number in enumerate(self.settings_P.tolist()):
            other = np.zeros(len(self.trace), bool)
            for name in names:
                ran = self.trace.columns[f"setting/{name}#{number}"]
                other |= ran != self.trace.columns[f"setting/{name}#0"]
            found[plan] = np.count_nonzero(other)
        return found

    @property
    def on_score_P(self) -> Array:
        """Nothing: a score that is a threshold lies within the band, and counts so."""
        return np.zeros(len(self.settings_P), bool)

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group: plan numbers [C] and sums [C, B], so many plans at a
        time.
        """
        assert self.groups is not None
        count = int(self.groups.max()) + 1
        for start in range(0, len(self.settings_P), plans):
            some_P = np.arange(start, min(start + plans, len(self.settings_P)))
            sums = [np.bincount(self.groups, self.worst(int(plan)), count) for plan in some_P]
            yield some_P, np.stack(sums)


def plan_at(topology: Topology, value: float) -> Plan:
    """The plan of a setting of the dial."""
    width = sum(topology.routes(gate) for gate in topology.gates)
    return Plan(thresholds=thresholds_of(topology, [value] * width))


def costs_of_settings(trace: Trace, unit: str, batch: int) -> Array:
    """Mean cost per row of every setting, in order; says where a lower threshold costs more."""
    costs_S = np.array(
        [
            trace.price(plan_at(trace.topology, value), unit, batch).mean
            for value in trace.header.settings
        ]
    )
    rises = np.flatnonzero(np.diff(costs_S) > 1e-9 * costs_S[0])
    if len(rises):
        first = int(rises[0])
        warnings.warn(
            f"the dial is not monotone in cost: at {trace.header.settings[first + 1]:g} the "
            f"network costs more than at "
            f"{trace.header.settings[first]:g}; name the cheap ways of forks first",
            Notice,
            stacklevel=4,
        )
    return costs_S
