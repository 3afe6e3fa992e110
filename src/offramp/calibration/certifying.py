"""Which of many plans keep a promise, by tests in a fixed order, and which of those is cheapest.

Plan 0 of every list is the plan that never leaves. It is the safest, it comes first, and its cost
is always compared with the others: leaving early is worth it only if it is cheaper on these rows.

Shapes: P plans, N rows, G gates, E exits, B bets, C plans of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.calibration.candidates import in_order, losses_up_to, problem_of, trade_offs
from offramp.calibration.descending import trade_offs_of_routes
from offramp.calibration.dial import Dialled, costs_of_settings
from offramp.calibration.listed import Listed
from offramp.calibration.path import UNKNOWN, shared_path
from offramp.calibration.routed import RoutedOutcomes, few, thresholds_of
from offramp.calibration.sweep import Sweep, sweep
from offramp.guarantees.bounds import (
    CELLS,
    Bound,
    betting,
    from_bets,
    from_sums,
    level_of,
    rows_per_bet,
    smallest_level_of_sum,
)
from offramp.guarantees.risks import Risk
from offramp.guarantees.testing import fixed_sequence
from offramp.plans.draws import order_of
from offramp.plans.plan import Plan
from offramp.plans.pricing import called
from offramp.plans.schedule import Schedule, compiled
from offramp.plans.topology import LEAVE
from offramp.plans.trace import Trace

POINTS = 100  # candidates of Pareto testing
ROUTED = 200  # candidates of Pareto testing in a network with forks
IN_SIGHT = 33  # plans that are tried for the smallest level in sight
EXACT_BITS = 52  # of a float64: sums of numbers that fit into them are exact

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tested:
    """Plans in the order of testing, with their results on the tested rows.

    Attributes:
        thresholds_PG: float32.
        outcomes: sums of losses, and how many rows leave.
        cost_P: mean costs.
        passed: how many leading plans keep the promise.
        ends_early: whether even the plan that never leaves ends before the last exit.
    """

    thresholds_PG: Array
    outcomes: Sweep | Listed | RoutedOutcomes | Dialled
    cost_P: Array
    passed: int
    ends_early: bool

    @property
    def leaves_P(self) -> Array:
        """Which plans let a row leave, and have no threshold that equals a score."""
        leaves: Array = (self.outcomes.leaving_P > 0) & ~self.outcomes.on_score_P
        return leaves

    def cheapest(self) -> Array | None:
        """Thresholds [G] of the cheapest plan that passed; None if no useful plan passed.

        A plan is left out if one of its thresholds equals the score of a row, because rounding
        would decide there. Among plans of equal cost the safest is taken. Never leaving is the
        answer only if some other plan passed as well, if it ends early itself, or if a search has
        found nothing cheaper.
        """
        if self.passed == 0:
            return None
        passed = np.flatnonzero(self.leaves_P[: self.passed])
        is_only_plan = len(self.cost_P) == 1
        if not len(passed) and not self.ends_early and not is_only_plan:
            return None
        candidates = np.append(0, passed)
        best = candidates[np.argmin(self.cost_P[candidates])]
        chosen: Array = self.thresholds_PG[best]
        return chosen


@dataclass(frozen=True)
class Certifier:
    """The conditions of a plan, and how it is tested.

    Args:
        risk: the risk that is promised.
        at_most: the level of the promise.
        confidence: of the promise.
        bound: the test of a single plan.
        reference: the exit that the risk compares with.
        unit: in which costs are compared.
        batch: the batch size that milliseconds are for.
        max_exit: the exit that answers every row that arrives there; None for the last one.
    """

    risk: Risk
    at_most: float
    confidence: float
    bound: Bound
    reference: str
    unit: str
    batch: int
    max_exit: str | None

    @property
    def delta(self) -> float:
        """The probability with which the promise may fail."""
        return 1 - self.confidence

    def tested(self, searched: Trace | None, certified: Trace) -> Tested:
        """Test plans on the certified rows.

        Args:
            searched: rows that give candidates, or None for a path fixed beforehand.
            certified: the rows to test on.

        Returns:
            The plans in the order of testing, with their results.
        """
        if certified.header.settings:
            return self._along_dial(certified)
        if searched is None and not certified.topology.is_chain:
            return self._along_routes(certified)
        if searched is None:
            return self._along_path(certified)
        return self._from_list(certified, self._found_on(searched))

    def smallest_level(self, trace: Trace, tested: Tested) -> float | None:
        """The smallest level at which a plan that saves cost would pass.

        All plans before it must pass too, so this is the largest of their levels.

        Args:
            trace: the tested rows.
            tested: the plans.

        Returns:
            The level, or None if no plan saves.
        """
        saves_P = tested.leaves_P & (tested.cost_P < tested.cost_P[0])
        saves_P[0] = tested.ends_early
        if not saves_P.any():
            return None
        first = int(np.argmax(saves_P))
        # the plans up to the first that saves; never leaving may not need a test
        needed_P = np.arange(1 if self._never_is_safe(trace) else 0, first + 1)
        if self.bound is not betting:
            # these bounds depend on the sum of losses only: the largest sum decides
            worst = float(tested.outcomes.loss_P[needed_P].max())
            return smallest_level_of_sum(worst, len(trace), self.bound, **self._limits)
        # betting on every plan at every level would take long: try some of the plans, the last
        # first, which mostly needs the largest level
        spread = np.unique(np.linspace(0, len(needed_P) - 1, IN_SIGHT).astype(np.intp))
        tried_P = needed_P[spread][::-1]
        thresholds_PG = tested.thresholds_PG[tried_P]
        plans: Listed | RoutedOutcomes | Dialled
        if trace.header.settings:
            plans = self._dialled(trace, tried_P)
        elif trace.topology.is_chain:
            plans = self._listed(trace, thresholds_PG)
        else:
            plans = self._routed(trace, thresholds_PG)
        largest = self.risk.low
        for _, sums_CB in plans.group_sums(1):
            p_at = self._p_by_level(sums_CB, len(trace))
            # A plan that passes at the largest level so far does not raise it.
            if p_at(largest) > self.delta:
                largest = level_of(p_at, **self._limits)
        return largest

    def _along_path(self, trace: Trace) -> Tested:
        """Test plans of one shared threshold along the path fixed beforehand."""
        scores_NG = self._scores(trace)
        gates = trace.topology.exits[: scores_NG.shape[1]]
        band = trace.header.origin.band
        path_P = shared_path([trace.header.scores.get(gate, UNKNOWN) for gate in gates], band)
        schedule = compiled(trace.topology, dict.fromkeys(gates, (0.0,)), self.max_exit)
        prices = [trace.prices.per_call_and_row(stage, self.unit) for stage in schedule]
        # where the cost of a stage differs between rows, the sweep sums it up for those that arrive
        weights: list[Array | None] = [None] * (len(gates) + 1)
        for stage, (_, per_row) in zip(schedule, prices, strict=True):
            if per_row.ndim:
                weights[trace.topology.exit_index(stage.name)] = per_row
        outcomes = sweep(
            path_P,
            scores_NG,
            self._losses(trace),
            band,
            weights=weights,
            groups=self._groups(trace),
        )
        cost_P = np.zeros(len(path_P) + 1)
        for stage, (per_call, per_row) in zip(schedule, prices, strict=True):
            index = trace.topology.exit_index(stage.name)
            if per_call:
                cost_P += per_call * called(outcomes.reach_PE[:, index] / len(trace), self.batch)
            if per_row.ndim and outcomes.carried_PE is not None:
                cost_P += outcomes.carried_PE[:, index] / len(trace)
            else:
                cost_P += per_row * outcomes.reach_PE[:, index] / len(trace)
        cost_P[0] = self._cost(trace, (np.inf,) * len(gates))  # plan 0 runs no gate
        thresholds_P = np.append(np.float32(np.inf), path_P)
        thresholds_PG = np.broadcast_to(thresholds_P[:, None], (len(thresholds_P), len(gates)))
        return Tested(
            thresholds_PG, outcomes, cost_P, self._passing(trace, outcomes), self._ends_early(trace)
        )

    def _along_routes(self, trace: Trace) -> Tested:
        """Test plans of one threshold shared by all gates of a network with forks."""
        topology = trace.topology
        ranges = [trace.header.scores.get(gate, UNKNOWN) for gate in topology.gates]
        path_P = few(shared_path(ranges, trace.header.origin.band), len(trace))
        thresholds_P = np.append(np.float32(np.inf), path_P)
        width = sum(topology.routes(gate) for gate in topology.gates)
        return self._from_routes(trace, np.repeat(thresholds_P[:, None], width, axis=1))

    def _along_dial(self, trace: Trace) -> Tested:
        """Test the recorded settings of one dial, from the one that closes all gates on."""
        settings = np.array(trace.header.settings, np.float32)
        width = sum(trace.topology.routes(gate) for gate in trace.topology.gates)
        outcomes = self._dialled(trace, np.arange(len(settings)))
        passed = self._passing(trace, outcomes)
        cost_P = costs_of_settings(trace, self.unit, self.batch)
        return Tested(np.repeat(settings[:, None], width, axis=1), outcomes, cost_P, passed, False)

    def _dialled(self, trace: Trace, settings_P: Array) -> Dialled:
        """The losses of some settings of the dial."""
        losses_NS = trace.losses(self.risk, self.reference)
        return Dialled(settings_P, trace, losses_NS, self.risk.high, self._groups(trace))

    def _from_routes(self, trace: Trace, thresholds_PG: Array) -> Tested:
        """Test plans of a network with forks in a fixed order, the one that never leaves first."""
        outcomes = self._routed(trace, thresholds_PG)
        cost_P = self._costs_of_routes(trace, thresholds_PG)
        passed = self._passing(trace, outcomes)
        return Tested(thresholds_PG, outcomes, cost_P, passed, self._ends_early(trace))

    def _costs_of_routes(self, trace: Trace, thresholds_PG: Array) -> Array:
        """Mean cost per row of every plan, as `Trace.price` gives it."""
        cost_P = np.empty(len(thresholds_PG))
        for number, thresholds_G in enumerate(thresholds_PG):
            plan = Plan(
                thresholds=thresholds_of(trace.topology, thresholds_G), max_exit=self.max_exit
            )
            cost_P[number] = trace.price(plan, self.unit, self.batch).mean
        return cost_P

    def _from_list(self, trace: Trace, thresholds_PG: Array) -> Tested:
        """Test plans in a fixed order, after the one that never leaves."""
        if not trace.topology.is_chain:
            return self._from_routes(trace, _after_never(thresholds_PG))
        plans = self._listed(trace, _after_never(thresholds_PG))
        cost_P = self._costs(trace, plans)
        passed = self._passing(trace, plans)
        return Tested(plans.thresholds_PG, plans, cost_P, passed, self._ends_early(trace))

    def _found_on(self, searched: Trace) -> Array:
        """Thresholds [P, G] that are worth a test, the safest first.

        They are the best trade-offs on the search rows, ordered by their p-value there.
        """
        if not searched.topology.is_chain:
            return self._found_on_routes(searched)
        problem = problem_of(
            searched, self.risk, self.reference, self.unit, self.batch, self.max_exit
        )
        thresholds_PG = trade_offs(problem, POINTS)
        plans = self._listed(searched, thresholds_PG)
        p_P = self._p_values(searched, plans)
        ordered: Array = thresholds_PG[in_order(p_P, self._costs(searched, plans))]
        return ordered

    def _found_on_routes(self, searched: Trace) -> Array:
        """`_found_on` in a network with forks."""
        losses_NL = self._losses(searched).astype(float)
        gap = 2 * searched.header.origin.band
        kinds = [losses_NL]
        # see `trade_offs`: plans whose gains and losses cancel come late in a test
        if losses_NL.min() < 0:
            kinds.append(np.abs(losses_NL))
        candidates = list[Array]()
        for losses in kinds:
            plans_found = trade_offs_of_routes(
                searched, losses, unit=self.unit, batch=self.batch, max_exit=self.max_exit, gap=gap
            )
            candidates.append(plans_found.thresholds_PG)
        thresholds_PG = np.unique(np.concatenate(candidates), axis=0)
        thresholds_PG = thresholds_PG[np.isfinite(thresholds_PG).any(axis=1)][:ROUTED]
        if not len(thresholds_PG):
            return np.zeros((0, thresholds_PG.shape[1]), np.float32)
        plans = self._routed(searched, thresholds_PG)
        cost_P = self._costs_of_routes(searched, thresholds_PG)
        ordered: Array = thresholds_PG[in_order(self._p_values(searched, plans), cost_P)]
        return ordered

    def _passing(self, trace: Trace, outcomes: Sweep | Listed | RoutedOutcomes | Dialled) -> int:
        """How many leading plans pass.

        Plan 0 never leaves, and may not need a test; every other plan needs one, also if it loses
        nothing on these rows. Bets are evaluated only until a plan fails. From plan 2 on, a plan
        that changes no loss has the p-value of the one before.
        """
        never_is_safe = self._never_is_safe(trace)
        if self.bound is not betting:
            p_P = self._from_sums(outcomes.loss_P, len(trace), self.at_most)
            if never_is_safe:
                p_P[0] = 0.0
            return fixed_sequence(p_P, self.delta)
        for plans_C, sums_CB in outcomes.group_sums(self._chunk(trace)):
            p_C = self._from_bets(sums_CB, len(trace), self.at_most)
            if plans_C[0] == 0 and never_is_safe:
                p_C[0] = 0.0
            passing = fixed_sequence(p_C, self.delta)
            if passing < len(p_C):
                return int(plans_C[passing])
        return len(outcomes.loss_P)

    def _p_values(self, trace: Trace, plans: Listed | RoutedOutcomes) -> Array:
        """p-values of listed plans at the level of the promise."""
        if self.bound is not betting:
            return self._from_sums(plans.loss_P, len(trace), self.at_most)
        parts = [np.zeros(0)]
        for _, sums_CB in plans.group_sums(self._chunk(trace)):
            parts.append(self._from_bets(sums_CB, len(trace), self.at_most))
        return np.concatenate(parts)

    def _p_by_level(self, sums_CB: Array, rows: int) -> Any:
        """The p-value of a single plan as a function of the level."""
        return lambda level: float(self._from_bets(sums_CB, rows, level)[0])

    def _from_sums(self, sums_P: Array, rows: int, level: float) -> Array:
        """p-values [P] of summed losses, for bounds that do not bet."""
        return from_sums(self.bound, sums_P, rows, level, low=self.risk.low, high=self.risk.high)

    def _from_bets(self, sums_PB: Array, rows: int, level: float) -> Array:
        """p-values [P] of the summed losses of each bet."""
        return from_bets(
            sums_PB, rows, level, low=self.risk.low, high=self.risk.high, delta=self.delta
        )

    @property
    def _limits(self) -> dict[str, float]:
        return {"low": self.risk.low, "high": self.risk.high, "delta": self.delta}

    def _routed(self, trace: Trace, thresholds_PG: Array) -> RoutedOutcomes:
        return RoutedOutcomes(
            thresholds_PG, trace, self._losses(trace), self.max_exit, self._groups(trace)
        )

    def _listed(self, trace: Trace, thresholds_PG: Array) -> Listed:
        band = trace.header.origin.band
        return Listed(
            thresholds_PG, self._scores(trace), self._losses(trace), band, self._groups(trace)
        )

    def _scores(self, trace: Trace) -> Array:
        """Scores [N, G] of the gates before the last exit that the plan uses."""
        return trace.scores[:, : self._width(trace) - 1]

    def _losses(self, trace: Trace) -> Array:
        """Losses [N, E] up to the last exit that the plan uses, whose sums are exact in float64.

        Losses other than -1, 0 and 1 are rounded up to multiples of a power of two, about 1e-9.
        Then a running sum along a path equals the sum of each plan alone. Rounding up is on the
        safe side.
        """
        if trace.topology.is_chain:
            width = self._width(trace)
        else:
            width = len(trace.topology.exit_labels)
        losses = losses_up_to(trace, self.risk, self.reference, width)
        if losses.dtype == np.int8:
            return losses
        # the largest possible sum must be a multiple of the unit that fits into a float64
        largest = max(abs(self.risk.low), abs(self.risk.high)) * max(len(losses), 1)
        unit = 2.0 ** (math.ceil(math.log2(largest)) - EXACT_BITS)
        return np.minimum(np.ceil(losses / unit) * unit, self.risk.high)

    def _groups(self, trace: Trace) -> Array | None:
        """The bet [N] that every row belongs to, by its position in the order of the rows. None for
        bounds that do not bet.
        """
        if self.bound is not betting:
            return None
        order = order_of(trace.columns)
        # uint16 is enough: there are at most 32,768 bets
        groups = np.empty(len(trace), np.uint16)
        groups[order] = np.arange(len(trace)) // rows_per_bet(len(trace))
        return groups

    def _chunk(self, trace: Trace) -> int:
        """How many plans are bet on at a time."""
        return max(1, CELLS * rows_per_bet(len(trace)) // len(trace))

    def _costs(self, trace: Trace, plans: Listed) -> Array:
        """Mean cost per row of every plan, as `Trace.price` gives it."""
        cost_P = np.empty(len(plans.thresholds_PG))
        for plan, thresholds_G in enumerate(plans.thresholds_PG):
            cost_P[plan] = self._cost(trace, thresholds_G, plans.reach_PE[plan])
        return cost_P

    def _cost(
        self, trace: Trace, thresholds_G: Sequence[float], reach_E: Array | None = None
    ) -> float:
        """Mean cost per row of one plan. Without `reach_E` all rows arrive at every exit."""
        total = 0.0
        for stage in self._schedule(trace, thresholds_G):
            index = trace.topology.exit_index(stage.name)
            per_call, per_row = trace.prices.per_call_and_row(stage, self.unit)
            reach = 1.0  # the share of rows that arrive
            if reach_E is not None:
                reach = float(reach_E[index]) / len(trace)
            total += per_call * called(reach, self.batch)
            if per_row.ndim and reach_E is not None:
                total += float((per_row * self._arrives(trace, thresholds_G, index)).mean())
            else:
                total += float(per_row.mean()) * reach
        return total

    def _schedule(self, trace: Trace, thresholds_G: Sequence[float]) -> Schedule:
        """The stages that a plan of a chain runs."""
        gates = trace.topology.exits[: len(thresholds_G)]
        thresholds = {}
        for gate, threshold in zip(gates, thresholds_G, strict=True):
            thresholds[gate] = (float(threshold),)
        return compiled(trace.topology, thresholds, self.max_exit)

    def _arrives(self, trace: Trace, thresholds_G: Sequence[float], index: int) -> Array:
        """Which rows [N] arrive at an exit."""
        going_N = np.ones(len(trace), bool)
        for gate, threshold in zip(trace.topology.exits[:index], thresholds_G, strict=False):
            if threshold < np.inf:
                going_N &= ~(trace.columns[f"score/{gate}"] >= threshold)
        return going_N

    def _ends_early(self, trace: Trace) -> bool:
        """Whether never leaving ends elsewhere than at the end of the most expensive path."""
        if not trace.topology.is_chain:
            last = trace.topology.exits[-1]
            return self._closed_path(trace) != trace.topology.reference_path(last)
        return self.max_exit not in (None, trace.topology.exits[-1])

    def _never_is_safe(self, trace: Trace) -> bool:
        """Whether the loss of never leaving is 0 on every row by construction, and needs no test.

        Then never leaving answers as the reference does.
        """
        if not self.risk.zero_at_reference or self.at_most < 0:
            return False
        if trace.header.settings:
            return True  # the reference is the first setting, which closes all gates
        if not trace.topology.is_chain:
            # The last ways of all forks need not lead to the reference: an arm may answer itself.
            name = trace.reference(self.reference)
            return self._closed_path(trace) == trace.topology.reference_path(name)
        last = self.max_exit
        if last is None:
            last = trace.topology.exits[-1]
        return trace.reference(self.reference) == last

    def _closed_path(self, trace: Trace) -> tuple[str, ...]:
        """The nodes that a row passes in a network with forks whose gates are all closed."""
        schedule = compiled(trace.topology, {}, self.max_exit)
        stage = schedule.stages[0]
        path = [*schedule.skipped, stage.name]
        while stage.edges[-1].to != LEAVE:
            edge = stage.edges[-1]
            path += [*edge.via, edge.to]
            stage = schedule.stages[schedule.index[edge.to]]
        return tuple(path)

    def _width(self, trace: Trace) -> int:
        """The number of exits up to the last one that the plan uses."""
        if self.max_exit is None:
            return len(trace.topology.exits)
        return trace.topology.exit_index(self.max_exit) + 1


def _after_never(thresholds_PG: Array) -> Array:
    """The plans after the one that never leaves."""
    never = np.full((1, thresholds_PG.shape[1]), np.inf, np.float32)
    return np.concatenate([never, thresholds_PG])
