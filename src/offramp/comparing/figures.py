"""What a trained network does under one gate, in figures: thresholds from calibration rows, the
rest from test rows.

No torch. Costs are MACs per row; the page divides them by those of the plain network that is its
unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from offramp.calibration.calibrating import calibrate, dearest_share, problem_of
from offramp.calibration.search import frontier, powers
from offramp.comparing.settings import Settings
from offramp.errors import InvalidArgument, NoSafePlan, OutOfBudget, OverlappingRows
from offramp.guarantees.risks import find_risk
from offramp.plans.plan import FLOAT32_MAX, Plan
from offramp.plans.trace import Array, Trace

POINTS = 60  # plans on a frontier
STEPS = 40  # of the curve of shares that leave at the first exit
SEED = 21  # of random splits


@dataclass(frozen=True)
class Point:
    """A plan on test rows: mean and worst cost per row, accuracy, and the share of rows that leaves
    at each exit.
    """

    cost: float
    worst: float
    accuracy: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """The best plan within a budget (None where none fits), and its accuracy over random splits: 5
    %, median, 95 %.
    """

    budget: float
    point: Point | None
    over_splits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Figures:
    """Everything that is told of one network under one gate.

    plain: MACs of its own plain network. alone: the accuracy of each exit on all rows. anytime:
    every row answered at exit 1, 2, ..., all exits before it computed. powers: MSDNet's p^k.
    frontier: the exact search. leaving: thresholds of the first gate, the share of rows that leaves
    there, and how many of those are right. certified: the plan that keeps the promise asked for, or
    in words why there is none.
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
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Figures:
        """What `to_json` gave."""
        curves = {
            name: tuple(_point(each) for each in body[name])
            for name in ("anytime", "powers", "frontier")
        }
        budgets = tuple(
            Budget(
                each["budget"], each["point"] and _point(each["point"]), tuple(each["over_splits"])
            )
            for each in body["budgets"]
        )
        leaving = tuple((float(a), float(b), float(c)) for a, b, c in body["leaving"])
        lists = {
            "exits": tuple(body["exits"]),
            "alone": tuple(body["alone"]),
            "leaving": leaving,
            "budgets": budgets,
        }
        return Figures(
            **{
                **body,
                **curves,
                **lists,
                "certified": body["certified"] and _point(body["certified"]),
            }
        )


def figures_of(
    calibration: Trace, test: Trace, settings: Settings, unit: float, *, splits: int = 0
) -> Figures:
    """All figures of a network that is cut, or of a ladder. unit: MACs of which the budgets are
    shares.
    """
    plain = plain_of(test)
    shares = [budget * unit / plain for budget in settings.budgets]
    spread = _over_splits(calibration, test, shares, splits)
    found = frontier(problem_of(calibration, find_risk("error")), points=POINTS)
    certified, said = _certified(calibration, settings)
    return Figures(
        exits=test.topology.exits,
        rows=len(test),
        plain=plain,
        alone=tuple(
            float((test.columns[f"answer/{name}"] == _labels(test)).mean())
            for name in test.topology.exits
        ),
        anytime=tuple(_point_of(test, plan) for plan in _anytime(test)),
        powers=_points(test, powers(problem_of(calibration, find_risk("error")))),
        frontier=_points(test, found.thresholds_PG),
        budgets=tuple(
            Budget(budget, _within(calibration, test, share), over)
            for budget, share, over in zip(settings.budgets, shares, spread, strict=True)
        ),
        leaving=_leaving(test),
        certified=None if certified is None else _point_of(test, certified),
        certified_said=said,
    )


def figures_of_plain(test: Trace) -> Figures:
    """Those of a network that is not cut: one place on the plane."""
    point = _point_of(test, Plan.never_leave(test.topology))
    return Figures(
        test.topology.exits,
        len(test),
        point.cost,
        (point.accuracy,),
        (point,),
        (),
        (),
        (),
        (),
        None,
        "",
    )


def plain_of(trace: Trace) -> float:
    """MACs per row of the plain network of a trace."""
    return trace.price(Plan.never_leave(trace.topology)).plain


def best_within(calibration: Trace, share: float) -> Plan | None:
    """The best plan within a share of its own plain cost on these rows; None where not even the
    cheapest fits.
    """
    try:
        return calibrate(calibration, risk="error", budget=min(share, dearest_share(calibration)))
    except OutOfBudget:
        return None


def _within(calibration: Trace, test: Trace, share: float) -> Point | None:
    plan = best_within(calibration, share)
    return None if plan is None else _point_of(test, plan)


def _labels(trace: Trace) -> Array:
    if trace.labels is None:
        raise InvalidArgument(
            f"{trace.header.data} has no labels, and a comparison reports accuracies. Give (x, y)"
        )
    return trace.labels


def _point_of(test: Trace, plan: Plan) -> Point:
    done = test.replay(plan)
    price = test.price(plan)
    shares = np.bincount(done.exit, minlength=len(test.topology.exits)) / len(test)
    accuracy = float((done.answer == _labels(test)).mean())
    return Point(price.mean, price.worst, accuracy, tuple(map(float, shares)))


def _points(test: Trace, thresholds_PG: Array) -> tuple[Point, ...]:
    """Plans on test rows, from the cheapest; p^k gives the same plan for neighbouring p."""
    plans = (_by_hand(test, row) for row in np.unique(thresholds_PG, axis=0))
    return tuple(sorted((_point_of(test, plan) for plan in plans), key=lambda point: point.cost))


def _by_hand(trace: Trace, thresholds_G: Iterable[float]) -> Plan:
    return Plan.by_hand(
        {gate: float(t) for gate, t in zip(trace.topology.gates, thresholds_G, strict=True)}
    )


def _anytime(trace: Trace) -> list[Plan]:
    """Every row answered at exit 1, at exit 2, ...: gates whose threshold no score reaches, but
    which are run.
    """
    shut = dict.fromkeys(trace.topology.gates, FLOAT32_MAX)
    names = trace.topology.exits
    return [
        Plan.by_hand({gate: shut[gate] for gate in names[:index]}, max_exit=name)
        for index, name in enumerate(names)
    ]


def _leaving(test: Trace) -> tuple[tuple[float, float, float], ...]:
    """Threshold of the first gate, share of rows at or above it, accuracy of these."""
    first = test.topology.gates[0]
    score = test.columns[f"score/{first}"]
    right = test.columns[f"answer/{first}"] == _labels(test)
    known = np.isfinite(score)
    if not known.any():
        return ()
    cuts = np.unique(np.quantile(score[known], np.linspace(0, 1, STEPS)))
    return tuple(
        (float(t), float((score >= t).mean()), float(right[score >= t].mean())) for t in cuts
    )


def _certified(calibration: Trace, settings: Settings) -> tuple[Plan | None, str]:
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
    # rows that repeat: known only now, and no reason to lose the other figures
    except OverlappingRows as problem:
        return None, f"no promise: {problem}".replace("repeats=", "repeated-rows = ")
    return plan, str(plan)


def _over_splits(
    calibration: Trace, test: Trace, shares: Sequence[float], count: int
) -> list[tuple[float, ...]]:
    """Accuracy within each budget, 5 %, median and 95 % over random splits of all rows in parts of
    the same sizes.

    Nothing for a budget within which some split has no plan.
    """
    if not count:
        return [()] * len(shares)
    every = _joined(calibration, test)
    rng = np.random.default_rng(SEED)
    drawn = []
    for _ in range(count):
        order = rng.permutation(len(every))
        drawn.append(
            _along(every[order[: len(calibration)]], every[order[len(calibration) :]], shares)
        )
    return [() if np.isnan(column).any() else _quantiles(column) for column in np.array(drawn).T]


def _quantiles(column: Array) -> tuple[float, ...]:
    return tuple(map(float, np.quantile(column, [0.05, 0.5, 0.95])))


def _along(rows: Trace, test: Trace, shares: Sequence[float]) -> list[float]:
    """Accuracy on `test` of the best plans of one search within the budgets; NaN where none
    fits.
    """
    plain = plain_of(rows)
    front = frontier(problem_of(rows, find_risk("error")), points=4 * POINTS)
    found = []
    for share in shares:
        fits = np.flatnonzero(front.cost_P <= share * plain * (1 + 1e-9))
        if not len(fits):
            found.append(math.nan)
            continue
        plan = _by_hand(rows, front.thresholds_PG[fits[np.argmin(front.loss_P[fits])]])
        found.append(float((test.replay(plan).answer == _labels(test)).mean()))
    return found


def _joined(first: Trace, second: Trace) -> Trace:
    """The rows of two traces of one network behind each other."""
    per_row = {
        name
        for name, column in first.columns.items()
        if not name.startswith("cost/") or column.ndim == 2
    }
    columns = {
        name: np.concatenate([column, second.columns[name]]) if name in per_row else column
        for name, column in first.columns.items()
    }
    return replace(first, columns=columns)


def _point(body: Mapping[str, Any]) -> Point:
    return Point(body["cost"], body["worst"], body["accuracy"], tuple(body["shares"]))
