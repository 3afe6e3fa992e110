"""The figures of a trained network under one gate.

Thresholds come from calibration rows, everything else from test rows. Costs are MACs per row; the
page divides them by the MACs of the plain network that is its unit. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from offramp.calibration.calibrating import calibrate, dearest_share, problem_of
from offramp.calibration.search import frontier, powers
from offramp.comparing.settings import Settings
from offramp.errors import InvalidArgument, NoSafePlan, OutOfBudget, OverlappingRows
from offramp.guarantees.risks import find_risk
from offramp.plans.columns import Array
from offramp.plans.plan import FLOAT32_MAX, Plan
from offramp.plans.trace import Trace

POINTS = 60  # plans on a frontier
STEPS = 40  # of the curve of shares that leave at the first exit
SEED = 21  # of random splits


@dataclass(frozen=True)
class Point:
    """A plan on test rows.

    Attributes:
        cost: mean MACs per row.
        worst: MACs of the most expensive row.
        accuracy: share of right answers.
        shares: share of the rows that leave at each exit [E].
    """

    cost: float
    worst: float
    accuracy: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """The best plan within a budget.

    Attributes:
        budget: share of the unit that a row may cost in the mean.
        point: the plan on test rows; None if no plan is within the budget.
        over_splits: accuracy over random splits at 5 %, the median and 95 %; empty without splits.
    """

    budget: float
    point: Point | None
    over_splits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Figures:
    """All figures of one network under one gate.

    Attributes:
        exits: names, shallow to deep.
        rows: number of test rows.
        plain: MACs per row of its own plain network.
        alone: the accuracy of each exit on all rows [E].
        anytime: a point per exit, where every row is answered there and all earlier exits are
            computed.
        powers: plans of the rule p^k from MSDNet.
        frontier: plans of the exact search.
        budgets: the best plan within each budget.
        leaving: triples of a threshold of the first gate, the share of rows that leave there, and
            the share of those that are right.
        certified: the plan that keeps the requested promise; None if there is none.
        certified_said: that plan in words, or the reason why there is none.
    """

    exits: tuple[str, ...]
    rows: int
    plain: float
    alone: tuple[float, ...]
    anytime: tuple[Point, ...]
    powers: tuple[Point, ...]
    frontier: tuple[Point, ...]
    budgets: tuple[Budget, ...]
    leaving: tuple[tuple[float, float, float], ...]
    certified: Point | None
    certified_said: str

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data, for a JSON file."""
        return asdict(self)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Figures:
        """Read the output of `to_json`."""
        values = dict(body)
        for name in ("exits", "alone"):
            values[name] = tuple(body[name])
        for name in ("anytime", "powers", "frontier"):
            values[name] = tuple(_point(point) for point in body[name])
        budgets = []
        for budget in body["budgets"]:
            point = budget["point"] and _point(budget["point"])
            budgets.append(Budget(budget["budget"], point, tuple(budget["over_splits"])))
        values["budgets"] = tuple(budgets)
        leaving = []
        for threshold, share, accuracy in body["leaving"]:
            leaving.append((float(threshold), float(share), float(accuracy)))
        values["leaving"] = tuple(leaving)
        values["certified"] = body["certified"] and _point(body["certified"])
        return Figures(**values)


def figures_of(
    calibration: Trace, test: Trace, settings: Settings, unit: float, *, splits: int = 0
) -> Figures:
    """All figures of a network that is cut, or of a cascade of models (a *ladder*).

    Args:
        calibration: outputs on the rows from which thresholds come.
        test: outputs of the same network on test rows.
        settings: of the comparison.
        unit: MACs per row; the budgets are shares of it.
        splits: number of random splits of all rows; 0 for none.
    """
    budgets = budgets_of(calibration, test, settings, unit, splits, _along)
    labels = labels_of(test)
    alone = []  # the accuracy of each exit
    for name in test.topology.exits:
        alone.append(float((test.columns[f"answer/{name}"] == labels).mean()))
    problem = problem_of(calibration, find_risk("error"))
    certified, words = certified_on(calibration, settings)
    certified_point = None
    if certified is not None:
        certified_point = point_of(test, certified)
    return Figures(
        exits=test.topology.exits,
        rows=len(test),
        plain=plain_of(test),
        alone=tuple(alone),
        anytime=tuple([point_of(test, plan) for plan in _anytime(test)]),
        powers=_points(test, powers(problem)),
        frontier=_points(test, frontier(problem, points=POINTS).thresholds_PG),
        budgets=tuple(budgets),
        leaving=_leaving(test),
        certified=certified_point,
        certified_said=words,
    )


def budgets_of(
    calibration: Trace,
    test: Trace,
    settings: Settings,
    unit: float,
    splits: int,
    along: Callable[[Trace, Trace, Sequence[float]], list[float]],
) -> list[Budget]:
    """The best plan within each budget of a comparison, with its spread over random splits.

    Args:
        calibration: outputs on the rows from which thresholds come.
        test: outputs of the same network on test rows.
        settings: of the comparison.
        unit: MACs per row; the budgets are shares of it.
        splits: number of random splits of all rows; 0 for none.
        along: accuracies on other rows of the best plan on some rows within each budget.
    """
    plain = plain_of(test)
    # budgets are shares of the common unit; plans want shares of the network's own plain cost
    shares = [budget * unit / plain for budget in settings.budgets]
    spreads = over_splits(calibration, test, shares, splits, along)
    budgets = []
    for budget, share, quantiles in zip(settings.budgets, shares, spreads, strict=True):
        budgets.append(Budget(budget, within(calibration, test, share), quantiles))
    return budgets


def figures_of_plain(test: Trace) -> Figures:
    """The figures of a network without exits, which is a single point of cost and accuracy."""
    point = point_of(test, Plan.never_leave(test.topology))
    return Figures(
        exits=test.topology.exits,
        rows=len(test),
        plain=point.cost,
        alone=(point.accuracy,),
        anytime=(point,),
        powers=(),
        frontier=(),
        budgets=(),
        leaving=(),
        certified=None,
        certified_said="",
    )


def plain_of(trace: Trace) -> float:
    """MACs per row of the plain network of a trace."""
    return trace.price(Plan.never_leave(trace.topology)).plain


def best_within(calibration: Trace, share: float) -> Plan | None:
    """The best plan on these rows within a budget.

    Args:
        calibration: outputs on the rows from which the thresholds come.
        share: of the plain cost of the network itself.

    Returns:
        The plan; None if even the cheapest one costs more.
    """
    try:
        return calibrate(calibration, risk="error", budget=min(share, dearest_share(calibration)))
    except OutOfBudget:
        return None


def within(calibration: Trace, test: Trace, share: float) -> Point | None:
    """The best plan within a share of the plain cost, measured on test rows."""
    plan = best_within(calibration, share)
    if plan is None:
        return None
    return point_of(test, plan)


def labels_of(trace: Trace) -> Array:
    """The labels of a trace [N]. Raises InvalidArgument if it has none."""
    if trace.labels is None:
        raise InvalidArgument(
            f"{trace.header.data} has no labels, but a comparison needs them. Give (x, y)"
        )
    return trace.labels


def point_of(test: Trace, plan: Plan) -> Point:
    """A plan measured on test rows."""
    replay = test.replay(plan)
    price = test.price(plan)
    shares = np.bincount(replay.exit, minlength=len(test.topology.exits)) / len(test)  # [E]
    accuracy = float((replay.answer == labels_of(test)).mean())
    return Point(price.mean, price.worst, accuracy, tuple(map(float, shares)))


def _points(test: Trace, thresholds_PG: Array) -> tuple[Point, ...]:
    """Plans measured on test rows, from the cheapest."""
    points = []
    # p^k gives the same plan for neighbouring p, so repeats are dropped
    for thresholds_G in np.unique(thresholds_PG, axis=0):
        points.append(point_of(test, _by_hand(test, thresholds_G)))
    return tuple(sorted(points, key=lambda point: point.cost))


def _by_hand(trace: Trace, thresholds_G: Iterable[float]) -> Plan:
    """A plan from one threshold per gate."""
    by_gate = {}
    for gate, threshold in zip(trace.topology.gates, thresholds_G, strict=True):
        by_gate[gate] = float(threshold)
    return Plan.by_hand(by_gate)


def _anytime(trace: Trace) -> list[Plan]:
    """A plan per exit that answers every row there.

    The gates before it run, so that their cost counts, but no score reaches their threshold.
    """
    names = trace.topology.exits
    plans = []
    for index, name in enumerate(names):
        shut = dict.fromkeys(names[:index], FLOAT32_MAX)
        plans.append(Plan.by_hand(shut, max_exit=name))
    return plans


def _leaving(test: Trace) -> tuple[tuple[float, float, float], ...]:
    """Triples of a threshold of the first gate, the share of rows that reach it, their accuracy."""
    first = test.topology.gates[0]
    score = test.columns[f"score/{first}"]
    right = test.columns[f"answer/{first}"] == labels_of(test)
    known = np.isfinite(score)  # rows that the gate scored
    if not known.any():
        return ()
    thresholds = np.unique(np.quantile(score[known], np.linspace(0, 1, STEPS)))
    steps = []
    for threshold in thresholds:
        leaves = score >= threshold
        steps.append((float(threshold), float(leaves.mean()), float(right[leaves].mean())))
    return tuple(steps)


def certified_on(calibration: Trace, settings: Settings) -> tuple[Plan | None, str]:
    """The plan with the requested promise, and its words; None and the reason if there is none."""
    if settings.at_most is None:
        return None, ""
    try:
        plan = calibrate(
            calibration,
            risk=settings.risk,
            at_most=settings.at_most,
            confidence=settings.confidence,
            repeats=settings.repeated_rows,
        )
    except NoSafePlan as problem:
        return None, str(problem)
    # repeated rows are found only here, and the other figures are still good
    except OverlappingRows as problem:
        return None, f"no promise: {problem}".replace("repeats=", "repeated-rows = ")
    return plan, str(plan)


def over_splits(
    calibration: Trace,
    test: Trace,
    shares: Sequence[float],
    count: int,
    along: Callable[[Trace, Trace, Sequence[float]], list[float]],
) -> list[tuple[float, ...]]:
    """Accuracy within each budget over random splits: 5 %, median, 95 %.

    All rows are split again into calibration and test rows of the same sizes. A budget within which
    some split has no plan gets an empty tuple.

    Args:
        calibration: outputs on the rows from which thresholds come.
        test: outputs of the same network on test rows.
        shares: the budgets, as shares of the network's own plain cost.
        count: number of splits; 0 for none.
        along: accuracies on other rows of the best plan on some rows within each budget.
    """
    if not count:
        return [()] * len(shares)
    rows = _joined(calibration, test)
    rng = np.random.default_rng(SEED)
    by_split = []
    for _ in range(count):
        order = rng.permutation(len(rows))
        calibration_part = rows[order[: len(calibration)]]
        test_part = rows[order[len(calibration) :]]
        by_split.append(along(calibration_part, test_part, shares))
    quantiles: list[tuple[float, ...]] = []
    # [splits, budgets] -> one column of accuracies per budget
    for column in np.array(by_split).T:
        if np.isnan(column).any():
            quantiles.append(())
        else:
            quantiles.append(_quantiles(column))
    return quantiles


def _quantiles(column: Array) -> tuple[float, ...]:
    """5 %, median and 95 % of a column."""
    return tuple(map(float, np.quantile(column, [0.05, 0.5, 0.95])))


def _along(rows: Trace, test: Trace, shares: Sequence[float]) -> list[float]:
    """Accuracy on `test` of the best plan within each budget; NaN where none fits.

    One search on `rows` serves all budgets: its frontier is dense, and each budget takes the plan
    with the smallest loss among the plans that are cheap enough.
    """
    plain = plain_of(rows)
    front = frontier(problem_of(rows, find_risk("error")), points=4 * POINTS)
    accuracies = []
    for share in shares:
        affordable = np.flatnonzero(front.cost_P <= share * plain * (1 + 1e-9))
        if not len(affordable):
            accuracies.append(math.nan)
            continue
        best = affordable[np.argmin(front.loss_P[affordable])]
        plan = _by_hand(rows, front.thresholds_PG[best])
        accuracies.append(float((test.replay(plan).answer == labels_of(test)).mean()))
    return accuracies


def _joined(first: Trace, second: Trace) -> Trace:
    """The rows of two traces of one network, one after the other."""
    columns = {}
    for name, column in first.columns.items():
        # a cost with one dimension belongs to the network; all other columns have a row each
        if name.startswith("cost/") and column.ndim != 2:
            columns[name] = column
        else:
            columns[name] = np.concatenate([column, second.columns[name]])
    return replace(first, columns=columns)


def _point(body: Mapping[str, Any]) -> Point:
    """A point from plain data."""
    return Point(body["cost"], body["worst"], body["accuracy"], tuple(body["shares"]))
