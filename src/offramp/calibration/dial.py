"""Plans that are settings of one dial, recorded one by one. They are tested in their order, the
safest first.

The trace does not tell what a row near a threshold would have become on another path, so such a row
counts with the largest loss. Shapes: P plans, N rows, S settings (the first closes all gates), B
groups of rows.
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
    """The losses of settings on the rows of a trace.

    Attributes:
        settings_P: numbers of settings.
        trace: recorded at settings of one dial.
        losses_NS: of every setting.
        highest: the largest possible loss.
        groups: the group [N] of every row, from 0, if sums by group are needed.
    """

    settings_P: Array  # numbers of settings
    trace: Trace
    losses_NS: Array
    highest: float
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
        """How many rows take another way than with all gates closed: other nodes ran for them."""
        names = self.trace.topology.names
        leaving_P = np.zeros(len(self.settings_P))
        for plan, number in enumerate(self.settings_P.tolist()):
            differs_N = np.zeros(len(self.trace), bool)
            for name in names:
                ran_N = self.trace.columns[f"setting/{name}#{number}"]
                differs_N |= ran_N != self.trace.columns[f"setting/{name}#0"]
            leaving_P[plan] = np.count_nonzero(differs_N)
        return leaving_P

    @property
    def on_score_P(self) -> Array:
        """False everywhere: a score that equals a threshold is within the band and counted
        there.
        """
        return np.zeros(len(self.settings_P), bool)

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group.

        Args:
            plans: how many plans to sum at a time.

        Yields:
            Plan numbers [C] and their sums [C, B].
        """
        assert self.groups is not None
        count = int(self.groups.max()) + 1
        for start in range(0, len(self.settings_P), plans):
            plans_C = np.arange(start, min(start + plans, len(self.settings_P)))
            sums = [np.bincount(self.groups, self.worst(int(plan)), count) for plan in plans_C]
            yield plans_C, np.stack(sums)  # C sums [B] -> [C, B]


def plan_at(topology: Topology, value: float) -> Plan:
    """The plan of a setting of the dial."""
    width = sum(topology.routes(gate) for gate in topology.gates)
    return Plan(thresholds=thresholds_of(topology, [value] * width))


def costs_of_settings(trace: Trace, unit: str, batch: int) -> Array:
    """Mean cost per row of every setting, in order [S]. Warns if a lower threshold costs more.

    Args:
        trace: recorded at settings of one dial.
        unit: "macs" or "ms".
        batch: the batch size that milliseconds are for.
    """
    settings = trace.header.settings
    costs = []
    for value in settings:
        plan = plan_at(trace.topology, value)
        costs.append(trace.price(plan, unit, batch).mean)
    costs_S = np.array(costs)
    # With all gates closed they do not run, so the first setting may cost less than the second.
    rises = np.flatnonzero(np.diff(costs_S[1:]) > 1e-9 * costs_S[0])  # more than rounding
    if len(rises):
        first = int(rises[0]) + 1
        warnings.warn(
            f"the dial is not monotone in cost: at {settings[first + 1]:g} the network costs more "
            f"than at {settings[first]:g}; name the cheap ways of forks first",
            Notice,
            stacklevel=4,
        )
    return costs_S
