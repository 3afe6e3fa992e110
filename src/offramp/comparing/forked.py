"""The figures of a network with forks: one recorded on every path, or at settings of one dial.

Thresholds come from calibration rows, everything else from test rows, as in figures.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.calibration.descending import trade_offs_of_routes
from offramp.calibration.dial import plan_at
from offramp.calibration.routed import thresholds_of
from offramp.comparing.figures import (
    Figures,
    Point,
    best_within,
    budgets_of,
    certified_on,
    labels_of,
    plain_of,
    point_of,
)
from offramp.comparing.settings import Settings
from offramp.guarantees.risks import find_risk
from offramp.plans.evaluation import exits_alone
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace


def figures_of_forks(
    calibration: Trace, test: Trace, settings: Settings, unit: float, *, splits: int = 0
) -> Figures:
    """All figures of a network with forks.

    In the place of exits stand the paths, or the settings of a dial, from the cheapest on. Plans by
    the rule of MSDNet and shares that leave at the first exit belong to chains, and are left out.

    Args:
        calibration: outputs on the rows from which thresholds come.
        test: outputs of the same network on test rows.
        settings: of the comparison.
        unit: MACs per row; the budgets are shares of it.
        splits: number of random splits of all rows; 0 for none.
    """
    labels_of(test)  # without labels a comparison is refused before it is computed
    budgets = budgets_of(calibration, test, settings, unit, splits, _best_of_each)
    certified, words = certified_on(calibration, settings)
    alone = exits_alone(test)
    if test.header.settings:
        alone = alone[::-1]  # a dial begins with all gates closed, which costs most
    return Figures(
        exits=tuple(one.exit for one in alone),
        rows=len(test),
        plain=plain_of(test),
        alone=tuple(one.accuracy or 0.0 for one in alone),
        anytime=_alone_points(test),
        powers=(),
        frontier=_frontier(calibration, test),
        budgets=tuple(budgets),
        leaving=(),
        certified=None if certified is None else point_of(test, certified),
        certified_said=words,
    )


def _alone_points(test: Trace) -> tuple[Point, ...]:
    """Every path, or every setting, as a network that answers all rows that way."""
    points = []
    exits = len(test.topology.exits)
    for one in exits_alone(test):
        assert one.macs is not None
        assert one.accuracy is not None
        points.append(Point(one.macs, one.macs, one.accuracy, (1 / exits,) * exits))
    return tuple(sorted(points, key=lambda point: point.cost))


def _plans(calibration: Trace) -> list[Plan]:
    """The plans worth trying, as the calibration rows have them."""
    topology = calibration.topology
    if calibration.header.settings:
        return [plan_at(topology, value) for value in calibration.header.settings]
    losses_NL = calibration.losses(find_risk("error"))
    gap = 2 * calibration.header.origin.band
    thresholds_PG = trade_offs_of_routes(calibration, losses_NL, gap=gap).thresholds_PG
    return [Plan(thresholds=thresholds_of(topology, row)) for row in thresholds_PG]


def _frontier(calibration: Trace, test: Trace) -> tuple[Point, ...]:
    """The plans that no other one beats on the calibration rows, measured on test rows."""
    front = []
    highest = -np.inf
    for plan in sorted(_plans(calibration), key=lambda plan: calibration.price(plan).mean):
        accuracy = point_of(calibration, plan).accuracy
        if accuracy > highest:
            highest = accuracy
            front.append(point_of(test, plan))
    return tuple(sorted(front, key=lambda point: point.cost))


def _best_of_each(rows: Trace, test: Trace, shares: Sequence[float]) -> list[float]:
    """Accuracy on `test` of the best plan within each budget; NaN where none fits."""
    accuracies = []
    for share in shares:
        plan = best_within(rows, share)
        accuracies.append(np.nan if plan is None else point_of(test, plan).accuracy)
    return accuracies
