"""Thresholds for every gate of a network with forks, found on some rows: good trade-offs without a
promise.

Each threshold in turn is moved to its best position while all others stay. With the others fixed,
every row has two values at a gate: that of the way in question, and that of the ways after it. With
the rows sorted by score, cumulative sums of losses and costs give the exact result at every
position of the threshold. Rounds of this end when nothing improves.

The best position is defined in two ways: least loss + price * cost, for several prices, which gives
plans on the hull of all trade-offs; and least loss within a budget, for several budgets, which also
finds plans inside the hull. Plans that share one threshold are added.

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
BUDGETS = 24  # between the cheapest and the most expensive plan
STARTS = 3  # plans from which a budget is searched
ROUNDS = 4
SHARED = 40  # plans that share one threshold
MARGIN = 1e-3  # how far below the smallest score the last threshold is, relative

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Found:
    """Plans with their figures on the rows that they were found on.

    Attributes:
        thresholds_PG: of all gates, in the order of `thresholds_of`.
        loss_P: mean losses.
        cost_P: mean costs, as `Trace.price` gives them.
    """

    thresholds_PG: Array
    loss_P: Array
    cost_P: Array

    def better(self) -> Found:
        """The plans that no other one beats, cheapest first: each loses less than all before it."""
        order = np.lexsort((self.loss_P, self.cost_P))
        front = list[int]()
        least = np.inf
        for number in order.tolist():
            if self.loss_P[number] < least:
                front.append(number)
                least = self.loss_P[number]
        return Found(self.thresholds_PG[front], self.loss_P[front], self.cost_P[front])


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
    """Plans for a network with forks, cheapest first.

    Args:
        trace: the rows, recorded on every path.
        losses_NL: of each row at each exit on each path, as `Trace.losses` gives them.
        unit: of the cost, "macs" or "ms".
        batch: the rows that share a call's milliseconds.
        max_exit: an exit that answers every row that arrives there.
        gap: the least distance between two neighbouring scores with a threshold between them.
        budgets: mean costs for which a plan is needed.

    Returns:
        The plans that no other one beats.
    """
    search = _CoordinateSearch(trace, losses_NL, unit, batch, max_exit, gap)
    count = sum(trace.topology.routes(gate) for gate in trace.topology.gates)
    plans = [np.full(count, np.inf, np.float32), np.full(count, -np.inf, np.float32)]
    plans += search.shared(count)
    starts = [plans[0], plans[1]]
    for price in PRICES / max(search.plain, 1e-12):
        for start_G in starts:
            plans.append(search.descended(start_G, _Priced(float(price))))
    # Then within budgets, from the best plans so far and from the plan that never leaves.
    priced = search.measured(plans)
    limits = [*budgets]
    if len(priced.cost_P):
        most = max(priced.cost_P.max(), search.plain)
        limits += np.linspace(priced.cost_P.min(), most, BUDGETS).tolist()
    for budget in limits:
        loss_P = np.where(priced.cost_P <= budget, priced.loss_P, np.inf)
        order = np.argsort(loss_P, kind="stable")
        for number in order[:STARTS]:
            plans.append(search.descended(priced.thresholds_PG[number], _Within(budget)))
        plans.append(search.descended(starts[0], _Within(budget)))
    return search.measured(plans).better()


@dataclass(frozen=True)
class _Priced:
    """The position with the least loss + price * cost."""

    price: float

    def best(self, loss_K: Array, cost_K: Array) -> int:
        """The index of the best position, from mean loss and cost at each."""
        return int(np.argmin(loss_K + self.price * cost_K))


@dataclass(frozen=True)
class _Within:
    """The position with the least loss within a budget of mean cost; the cheapest if none fits."""

    budget: float

    def best(self, loss_K: Array, cost_K: Array) -> int:
        """The index of the best position, from mean loss and cost at each."""
        fits = cost_K <= self.budget * (1 + 1e-9)
        if not fits.any():
            return int(np.argmin(cost_K))
        return int(np.lexsort((cost_K, np.where(fits, loss_K, np.inf)))[0])


class _CoordinateSearch:
    """Coordinate descent over the thresholds of all gates."""

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
        # mean loss and mean cost of the plans measured so far
        self.known: dict[bytes, tuple[float, float]] = {}
        # the cost of every node with its exit and gate, [] or [N]
        self.cost: dict[str, Array] = {}
        for stage in full_schedule(trace.topology):
            self.cost[stage.name] = self._price(stage)
        # where the thresholds of a gate are among those of all gates
        self.places: dict[str, slice] = {}
        start = 0
        for gate in self.topology.gates:
            self.places[gate] = slice(start, start + self.topology.routes(gate))
            start = self.places[gate].stop

    def _price(self, stage: Stage) -> Array:
        per_call, per_row = self.trace.prices.per_call_and_row(stage, self.unit)
        return np.asarray(per_row + per_call / self.batch)

    def shared(self, count: int) -> list[Array]:
        """Plans whose gates share one threshold."""
        columns = list[Array]()
        for label in self.topology.gate_labels:
            for name in self._names(label):
                columns.append(self.trace.columns[name])
        scores = np.concatenate(columns)
        values = thinned(scores[np.isfinite(scores)].astype(np.float32), SHARED)
        return [np.full(count, value, np.float32) for value in values]

    def _names(self, label: str) -> tuple[str, ...]:
        return self.topology.score_columns(label)

    def exactly(self, thresholds_G: Array) -> tuple[float, float]:
        """Mean loss and mean cost of a plan, by replaying and pricing it."""
        plan = Plan(thresholds=thresholds_of(self.topology, thresholds_G), max_exit=self.max_exit)
        replay = self.trace.replay(plan)
        losses_N = self.losses_NL[np.arange(len(self.trace)), replay.output]  # [N, L] -> [N]
        cost = self.trace.prices.mean(replay.schedule, replay.ran, unit=self.unit, batch=self.batch)
        return float(losses_N.mean()), cost

    def measured(self, plans: Sequence[Array]) -> Found:
        """Plans with their mean loss and cost, each once."""
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
        """A plan that no move of a single threshold improves."""
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
            thresholds_R = closed_G[self.places[gate]]  # of this gate's routes
            for earlier in range(route):  # rows that an earlier way takes do not come to this one
                threshold = thresholds_R[earlier]
                taken_N = (columns[earlier] >= threshold) & (threshold < np.inf)
                rows_N = rows_N & ~taken_N
            node = self.topology.node(gate)
            # a row that takes this way gains the difference of loss and cost
            here_2N = self._after(closed_G, path, node.successors[route])
            rest_2N = self._from_route(closed_G, path, route + 1)
            scores.append(columns[route][rows_N])
            gains.append((here_2N - rest_2N)[:, rows_N])
        if not scores:
            return np.float32(now_G[self.places[gate].start + route])
        values_K, sums_2K = _places(np.concatenate(scores), np.concatenate(gains, axis=1), self.gap)
        first = self.topology.names[0]
        base = self.cost[first].mean()
        # the means at each position: those with the way closed, and the gains of the rows above it
        without_2N = self._from_route(closed_G, (first,), 0)
        loss_K = (without_2N[0].sum() + sums_2K[0]) / len(self.trace)
        cost_K = base + (without_2N[1].sum() + sums_2K[1]) / len(self.trace)
        return np.float32(values_K[aim.best(loss_K, cost_K)])

    def _arrivals(self, now_G: Array) -> dict[str, Array]:
        """The rows [N] that arrive at each gate, by its label."""
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
                thresholds_R = now_G[self.places[node.name]]
                for name, threshold in zip(self._names(label), thresholds_R, strict=True):
                    reaches_N = (self.trace.columns[name] >= threshold) & (threshold < np.inf)
                    ways.append(left_N & reaches_N)
                    left_N = left_N & ~reaches_N
            ways.append(left_N)  # the last way takes the rest
            for successor, way_N in zip(node.successors, ways, strict=True):
                if successor != LEAVE:
                    waiting.append(((*path, successor), way_N))
        return arrivals

    def _after(self, now_G: Array, path: tuple[str, ...], successor: str) -> Array:
        """Loss and further cost [2, N] of every row if it goes on to a successor."""
        if successor == LEAVE:
            losses_N = self.losses_NL[:, self.topology.exit_labels.index(self.topology.label(path))]
            return np.stack([losses_N.astype(float), np.zeros(len(losses_N))])
        path = (*path, successor)
        if successor == self.max_exit:
            value_2N = self._after(now_G, path, LEAVE).copy()
        else:
            value_2N = self._from_route(now_G, path, 0).copy()
        value_2N[1] += self.cost[successor]
        return value_2N

    def _from_route(self, now_G: Array, path: tuple[str, ...], route: int) -> Array:
        """The same at the end of a path, for rows that none of the ways before `route` takes."""
        node = self.topology.node(path[-1])
        value_2N = self._after(now_G, path, node.successors[-1])
        if len(node.successors) == 1:
            return value_2N
        thresholds_R = now_G[self.places[node.name]]
        names = self._names(self.topology.label(path))
        # from the last way to the first, because an earlier way takes its rows first
        for number in reversed(range(route, len(node.successors) - 1)):
            if np.isposinf(thresholds_R[number]):
                continue
            takes_N = self.trace.columns[names[number]] >= thresholds_R[number]
            way_2N = self._after(now_G, path, node.successors[number])
            value_2N = np.where(takes_N, way_2N, value_2N)
        return value_2N


def _places(scores_n: Array, gains_2n: Array, gap: float) -> tuple[Array, Array]:
    """The positions [K] of a threshold, closed first, and the gains [2, K] of the rows above each.

    >>> gains = np.array([[-1.0, 2.0, -0.5], [1.0, 1.0, 1.0]])
    >>> values, sums = _places(np.float32([3, 2, 1]), gains, 0.0)
    >>> values.tolist(), sums.tolist()
    ([inf, 2.5, 1.5, 0.9990000128746033], [[0.0, -1.0, 1.0, 0.5], [0.0, 1.0, 2.0, 3.0]])
    """
    can_leave = ~np.isnan(scores_n) & (scores_n > -np.inf)
    order = np.argsort(-scores_n[can_leave], kind="stable")
    upper = scores_n[can_leave][order].astype(np.float64)
    if not len(upper):
        return np.full(1, np.inf, np.float32), np.zeros((2, 1))
    sums_2n = np.cumsum(gains_2n[:, can_leave][:, order], axis=1)
    # a threshold is midway between two neighbouring scores, or below the last one
    lower = np.append(upper[1:], -np.inf)
    last = upper[-1]
    scale = 1.0
    if np.isfinite(last):
        scale = max(1.0, abs(last))
    with np.errstate(invalid="ignore"):
        middles = (upper + lower) / 2
        is_wide = upper - lower > gap
    middles[-1] = last - max(gap, MARGIN * scale)
    is_wide[-1] = True
    # rounded to float32 it must still be strictly between
    values = middles.astype(np.float32)
    fits = is_wide & np.isfinite(values) & (values < upper) & (values > lower)
    values_K = np.append(np.float32(np.inf), values[fits])
    sums_2K = np.column_stack([np.zeros(2), sums_2n[:, fits]])
    return values_K, sums_2K
