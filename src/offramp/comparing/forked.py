"""The figures of a network with forks, recorded on every path or at several settings of one dial.

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
    """Compute all figures of a network with forks.

    The exits of the figures are the paths, or the settings of a dial, from the cheapest to the most
    expensive. Plans by MSDNet's rule, and shares that leave at the first exit, exist only for
    chains and are left out.

    Args:
        calibration: outputs on the rows that set the thresholds.
        test: outputs of the same network on test rows.
        settings: of the comparison.
        unit: MACs per row; the budgets are shares of it.
        splits: number of random splits of all rows; 0 for none.
    """
    labels_of(test)  # raises for rows without labels, before anything is computed
    budgets = budgets_of(calibration, test, settings, unit, splits, _best_of_each)
    certified, words = certified_on(calibration, settings)
    certified_point: Point | None = None
    if certified is not None:
        certified_point = point_of(test, certified)
    # every path or setting as if all rows took it
    paths = exits_alone(test)
    if test.header.settings:
        paths = paths[::-1]  # a dial begins with all gates closed, which is the most expensive
    names = [path.exit for path in paths]
    accuracies = [path.accuracy or 0.0 for path in paths]
    return Figures(
        exits=tuple(names),
        rows=len(test),
        plain=plain_of(test),
        alone=tuple(accuracies),
        anytime=_alone_points(test),
        powers=(),
        frontier=_frontier(calibration, test),
        budgets=tuple(budgets),
        leaving=(),
        certified=certified_point,
        certified_said=words,
    )


def _alone_points(test: Trace) -> tuple[Point, ...]:
    """The point of every path, or of every setting, if all rows took it."""
    points = []
    exits = len(test.topology.exits)
    equal_shares = (1 / exits,) * exits
    for path in exits_alone(test):
        assert path.macs is not None
        assert path.accuracy is not None
        points.append(Point(path.macs, path.macs, path.accuracy, equal_shares))
    return tuple(sorted(points, key=lambda point: point.cost))


def _plans(calibration: Trace) -> list[Plan]:
    """The plans to try, from the calibration rows: one per setting of a dial, otherwise those that
    trade accuracy for cost.
    """
    topology = calibration.topology
    if calibration.header.settings:
        return [plan_at(topology, value) for value in calibration.header.settings]
    losses_NL = calibration.losses(find_risk("error"))
    gap = 2 * calibration.header.origin.band
    thresholds_PG = trade_offs_of_routes(calibration, losses_NL, gap=gap).thresholds_PG
    return [Plan(thresholds=thresholds_of(topology, row)) for row in thresholds_PG]


def _frontier(calibration: Trace, test: Trace) -> tuple[Point, ...]:
    """The Pareto front of plans on the calibration rows, measured on test rows."""
    front = []
    highest = -np.inf
    by_cost = sorted(_plans(calibration), key=lambda plan: calibration.price(plan).mean)
    for plan in by_cost:
        # all plans so far are cheaper, so this one has to be more accurate
        accuracy = point_of(calibration, plan).accuracy
        if accuracy > highest:
            highest = accuracy
            front.append(point_of(test, plan))
    return tuple(sorted(front, key=lambda point: point.cost))


def _best_of_each(rows: Trace, test: Trace, shares: Sequence[float]) -> list[float]:
    """The accuracy on test rows of the best plan within each budget; NaN without such a plan."""
    accuracies = []
    for share in shares:
        accuracy = np.nan
        plan = best_within(rows, share)
        if plan is not None:
            accuracy = point_of(test, plan).accuracy
        accuracies.append(accuracy)
    return accuracies
