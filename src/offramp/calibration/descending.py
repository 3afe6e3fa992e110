"""Thresholds of their own for every gate of a network with forks, found on some rows: no promise,
but good trade-offs.

Each threshold in turn is moved to its best place while all others stay. With the others fixed,
every row has two values at a gate: that of the way in question, and that of what comes behind it.
Rows sorted by their score, sums of losses and costs along them tell what every place of the
threshold gives, exactly. Rounds of this end where nothing improves.

What is best is asked in two ways: least loss + price * cost, for several prices, from which plans
on the hull of all trade-offs come; and least loss within a budget, for several budgets, which also
finds plans inside of it. Plans that share one threshold stand beside those.

Shapes: N rows, G thresholds of all gates, P plans. Values are [2, N]: loss and cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.calibration.routed import thresholds_of
from offramp.calibration.threshold_table import thinned
from offramp.plans.plan import Plan
from offramp.plans.schedule import Stage, full_schedule
from offramp.plans.topology import LEAVE, Path, Topology
from offramp.plans.trace import Trace

PRICES = np.geomspace(1e-3, 1e2, 16)  # of a cost of the plain network, in losses
BUDGETS = 24  # between the cheapest plan and the dearest
STARTS = 3  # plans from which a budget is searched
ROUNDS = 4
SHARED = 40  # plans that share one threshold
MARGIN = 1e-3

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Found:
    """Plans and what they do on the rows that they were found on.

    Attributes:
        thresholds_PG: of all gates, in the order of `thresholds_of`.
        loss_P: mean losses.
        cost_P: mean costs, as `Trace.price` gives them.
    """

    thresholds_PG: Array
    loss_P: Array
    cost_P: Array

    def better(self) -> Found:
        """Those that no other plan beats, from the cheapest: each loses less than all before it."""
        order = np.lexsort((self.loss_P, self.cost_P))
        kept = list[int]()
        least = np.inf
        for number in order.tolist():
            if self.loss_P[number] < least:
                kept.append(number)
                least = self.loss_P[number]
        return Found(self.thresholds_PG[kept], self.loss_P[kept], self.cost_P[kept])


def trade_offs_of_routes(
    trace: Trace,
    losses_NL: Array,
    *,
    unit: str = "macs",
    batch: int = 64,
    max_exit: str | None = None,
    gap: float = 0.0,
    budgets: Sequence[float] = (),
) -> Found:
    """Plans for a network with forks, from cheap to dear.

    Args:
        trace: the rows, every path of them recorded.
        losses_NL: of each row at each exit on each path, as `Trace.losses` gives them.
        unit: of the cost, "macs" or "ms".
        batch: rows that share a call's milliseconds.
        deepest: an exit that answers whatever arrives there.
        gap: how far two neighbouring scores must lie apart for a threshold to stand between them.
        budgets: mean costs for which a plan is wanted above all.
    """
    search = _CoordinateSearch(trace, losses_NL, unit, batch, max_exit, gap)
    count = sum(trace.topology.routes(gate) for gate in trace.topology.gates)
    plans = [np.full(count, np.inf, np.float32), np.full(count, -np.inf, np.float32)]
    plans += search.shared(count)
    starts = [plans[0], plans[1]]
    for price in PRICES / max(search.plain, 1e-12):
        for start_G in starts:
            plans.append(search.descended(start_G, _Priced(float(price))))
    found = search.measured(plans)
    within = [*budgets]
    if len(found.cost_P):
        within += np.linspace(
            found.cost_P.min(), max(found.cost_P.max(), search.plain), BUDGETS
        ).tolist()
    for budget in within:
        order = np.argsort(np.where(found.cost_P <= budget, found.loss_P, np.inf), kind="stable")
        for number in order[:STARTS]:
            plans.append(search.descended(found.thresholds_PG[number], _Within(budget)))
        plans.append(search.descended(starts[0], _Within(budget)))
    return search.measured(plans).better()


@dataclass(frozen=True)
class _Priced:
    """The place with the least loss + price * cost."""

    price: float

    def best(self, loss_K: Array, cost_K: Array) -> int:
        """Of sums by place the number of the best."""
        return int(np.argmin(loss_K + self.price * cost_K))


@dataclass(frozen=True)
class _Within:
    """The place with the least loss among those whose mean cost keeps a budget; else the
    cheapest.
    """

    budget: float

    def best(self, loss_K: Array, cost_K: Array) -> int:
        """Of sums by place the number of the best."""
        fits = cost_K <= self.budget * (1 + 1e-9)
        if not fits.any():
            return int(np.argmin(cost_K))
        return int(np.lexsort((cost_K, np.where(fits, loss_K, np.inf)))[0])


class _CoordinateSearch:
    """What coordinate descent looks at."""

    def __init__(
        self,
        trace: Trace,
        losses_NL: Array,
        unit: str,
        batch: int,
        max_exit: str | None,
        gap: float,
    ) -> None:
        self.trace = trace
        self.topology: Topology = trace.topology
        self.losses_NL = losses_NL
        self.unit = unit
        self.batch = batch
        self.max_exit = max_exit
        self.gap = gap
        self.plain = trace.price(Plan.never_leave(trace.topology), unit, batch).plain
        # loss and cost of plans that were measured
        self.known: dict[bytes, tuple[float, float]] = {}
        self.cost: dict[str, Array] = {}  # of every node, its exit and its gate, [] or [N]
        for stage in full_schedule(trace.topology):
            self.cost[stage.name] = self._price(stage)
        self.places: dict[str, slice] = {}  # of every gate's thresholds among all
        start = 0
        for gate in self.topology.gates:
            self.places[gate] = slice(start, start + self.topology.routes(gate))
            start = self.places[gate].stop

    def _price(self, stage: Stage) -> Array:
        per_call, per_row = self.trace.prices.per_call_and_row(stage, self.unit)
        return np.asarray(per_row + per_call / self.batch)

    def shared(self, count: int) -> list[Array]:
        """Plans whose gates share one threshold."""
        columns = [
            self.trace.columns[name]
            for label in self.topology.gate_labels
            for name in self._names(label)
        ]
        every = np.concatenate(columns)
        values = thinned(every[np.isfinite(every)].astype(np.float32), SHARED)
        return [np.full(count, value, np.float32) for value in values]

    def _names(self, label: str) -> tuple[str, ...]:
        return self.topology.score_columns(label)

    def exactly(self, thresholds_G: Array) -> tuple[float, float]:
        """Mean loss and mean cost of a plan, as replay and price have them."""
        plan = Plan(thresholds=thresholds_of(self.topology, thresholds_G), max_exit=self.max_exit)
        done = self.trace.replay(plan)
        losses_N = self.losses_NL[np.arange(len(self.trace)), done.output]
        cost = self.trace.prices.mean(done.schedule, done.ran, unit=self.unit, batch=self.batch)
        return float(losses_N.mean()), cost

    def measured(self, plans: Sequence[Array]) -> Found:
        """Plans with what they do."""
        thresholds_PG = np.unique(np.stack(plans), axis=0)
        loss_P = np.empty(len(thresholds_PG))
        cost_P = np.empty(len(thresholds_PG))
        for number, thresholds_G in enumerate(thresholds_PG):
            key = thresholds_G.tobytes()
            if key not in self.known:
                self.known[key] = self.exactly(thresholds_G)
            loss_P[number], cost_P[number] = self.known[key]
        return Found(thresholds_PG, loss_P, cost_P)

    def descended(self, start_G: Array, aim: _Priced | _Within) -> Array:
        """A plan that no move of a single threshold makes better."""
        now_G = start_G.copy()
        for _ in range(ROUNDS):
            before_G = now_G.copy()
            for gate in reversed(self.topology.gates):
                if gate == self.max_exit:
                    continue
                for route in reversed(range(self.topology.routes(gate))):
                    now_G[self.places[gate].start + route] = self._best(now_G, gate, route, aim)
            if (now_G == before_G).all():
                break
        return now_G

    def _best(self, now_G: Array, gate: str, route: int, aim: _Priced | _Within) -> np.float32:
        """The best threshold of one way while all others stay."""
        closed_G = now_G.copy()
        closed_G[self.places[gate].start + route] = np.inf
        arrived = self._arrivals(closed_G)
        scores = list[Array]()
        gains = list[Array]()
        for path in self.topology.paths[gate]:
            label = self.topology.label(path)
            rows_N = arrived.get(label)
            if rows_N is None:
                continue
            columns = [self.trace.columns[name] for name in self._names(label)]
            own_G = closed_G[self.places[gate]]
            for earlier in range(route):  # rows that an earlier way takes do not come to this one
                rows_N = rows_N & ~(
                    (columns[earlier] >= own_G[earlier]) & (own_G[earlier] < np.inf)
                )
            node = self.topology.node(gate)
            here_2N = self._after(closed_G, path, node.successors[route])
            rest_2N = self._from_route(closed_G, path, route + 1)
            scores.append(columns[route][rows_N])
            gains.append((here_2N - rest_2N)[:, rows_N])
        if not scores:
            return np.float32(now_G[self.places[gate].start + route])
        values_K, sums_2K = _places(np.concatenate(scores), np.concatenate(gains, axis=1), self.gap)
        first = self.topology.names[0]
        base = self.cost[first].mean() if self.cost[first].ndim else self.cost[first]
        without_2N = self._from_route(closed_G, (first,), 0)
        loss_K = (without_2N[0].sum() + sums_2K[0]) / len(self.trace)
        cost_K = base + (without_2N[1].sum() + sums_2K[1]) / len(self.trace)
        return np.float32(values_K[aim.best(loss_K, cost_K)])

    def _arrivals(self, now_G: Array) -> dict[str, Array]:
        """By label of a gate the rows [N] that arrive there."""
        arrivals: dict[str, Array] = {}
        start: tuple[Path, Array] = ((self.topology.names[0],), np.ones(len(self.trace), bool))
        waiting = [start]
        while waiting:
            path, rows_N = waiting.pop()
            node = self.topology.node(path[-1])
            if node.name == self.max_exit or not rows_N.any():
                continue
            left_N = rows_N
            ways = list[Array]()  # the rows that take each way
            if len(node.successors) > 1:
                label = self.topology.label(path)
                arrivals[label] = rows_N
                own_G = now_G[self.places[node.name]]
                for name, threshold in zip(self._names(label), own_G, strict=True):
                    taken_N = (
                        left_N & (self.trace.columns[name] >= threshold) & (threshold < np.inf)
                    )
                    ways.append(taken_N)
                    left_N = left_N & ~taken_N
            ways.append(left_N)
            for successor, some_N in zip(node.successors, ways, strict=True):
                if successor != LEAVE:
                    waiting.append(((*path, successor), some_N))
        return arrivals

    def _after(self, now_G: Array, path: tuple[str, ...], successor: str) -> Array:
        """Loss and cost [2, N] of what comes when a row goes on to a successor."""
        if successor == LEAVE:
            losses_N = self.losses_NL[:, self.topology.exit_labels.index(self.topology.label(path))]
            return np.stack([losses_N.astype(float), np.zeros(len(losses_N))])
        path = (*path, successor)
        found_2N: Array = (
            self._after(now_G, path, LEAVE)
            if successor == self.max_exit
            else self._from_route(now_G, path, 0)
        ).copy()
        found_2N[1] += self.cost[successor]
        return found_2N

    def _from_route(self, now_G: Array, path: tuple[str, ...], route: int) -> Array:
        """The same at the end of a path, of rows that none of the ways before `route` took."""
        node = self.topology.node(path[-1])
        value_2N = self._after(now_G, path, node.successors[-1])
        if len(node.successors) == 1:
            return value_2N
        own_G = now_G[self.places[node.name]]
        names = self._names(self.topology.label(path))
        for number in reversed(range(route, len(node.successors) - 1)):
            if np.isposinf(own_G[number]):
                continue
            taken_N = self.trace.columns[names[number]] >= own_G[number]
            value_2N = np.where(
                taken_N, self._after(now_G, path, node.successors[number]), value_2N
            )
        return value_2N


def _places(scores_n: Array, gains_2n: Array, gap: float) -> tuple[Array, Array]:
    """Where a threshold may stand [K], closed first, and what the rows at and above it gain there
    [2, K].

    >>> gains = np.array([[-1.0, 2.0, -0.5], [1.0, 1.0, 1.0]])
    >>> values, sums = _places(np.float32([3, 2, 1]), gains, 0.0)
    >>> values.tolist(), sums.tolist()
    ([inf, 2.5, 1.5, 0.9990000128746033], [[0.0, -1.0, 1.0, 0.5], [0.0, 1.0, 2.0, 3.0]])
    """
    known = ~np.isnan(scores_n) & (scores_n > -np.inf)
    order = np.argsort(-scores_n[known], kind="stable")
    upper = scores_n[known][order].astype(np.float64)
    if not len(upper):
        return np.full(1, np.inf, np.float32), np.zeros((2, 1))
    sums_2n = np.cumsum(gains_2n[:, known][:, order], axis=1)
    lower = np.append(upper[1:], -np.inf)
    last = upper[-1]
    with np.errstate(invalid="ignore"):
        middles = (upper + lower) / 2
        wide = upper - lower > gap
    middles[-1] = last - max(gap, MARGIN * max(1.0, abs(last) if np.isfinite(last) else 1.0))
    wide[-1] = True
    values = middles.astype(np.float32)
    fits = wide & np.isfinite(values) & (values < upper) & (values > lower)
    return np.append(np.float32(np.inf), values[fits]), np.column_stack(
        [np.zeros(2), sums_2n[:, fits]]
    )
