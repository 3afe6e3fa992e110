"""Figures of a trace against plans that are tried one by one with `trace.evaluate`."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from made_up import MACS, method_of, settings_of, traces
from offramp.calibration.baselines import POWERS
from offramp.comparing.cells import plain_of
from offramp.comparing.figures import Figures, Point, best_within, figures_of, figures_of_plain
from offramp.errors import InvalidArgument
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from small import trace_of

BUDGETS = (0.05, 0.4, 0.75, 1.0)


@pytest.fixture(scope="module")
def pair() -> tuple[Trace, Trace]:
    return traces(3, rows=120)


@pytest.fixture(scope="module")
def few() -> Trace:
    """Rows few enough to try every plan."""
    return traces(5, rows=25)[0]


@pytest.fixture(scope="module")
def found(pair: tuple[Trace, Trace]) -> Figures:
    settings = settings_of(method_of("one"), budgets=BUDGETS, at_most=0.3)
    return figures_of(*pair, settings, plain_of(pair[1]), splits=4)


def every(trace: Trace) -> list[Plan]:
    """One plan for each pair of thresholds between scores, and for closed gates."""
    cuts = []
    for gate in trace.topology.gates:
        scores = np.unique(trace.columns[f"score/{gate}"])
        cuts.append([-1.0, *((scores[1:] + scores[:-1]) / 2).tolist(), np.inf])
    return [
        Plan.by_hand(dict(zip(trace.topology.gates, each, strict=True)))
        for each in itertools.product(*cuts)
    ]


def places(trace: Trace, plan: Plan) -> tuple[float, float]:
    """Accuracy and cost."""
    done = trace.evaluate(plan, batches=())
    assert done.accuracy is not None
    return done.accuracy, done.prices[0].mean


def test_no_plan_is_better_within_a_budget_on_the_rows_it_was_chosen_on(few: Trace) -> None:
    tried = np.array([_quick(few, plan) for plan in every(few)])
    for budget in BUDGETS[1:]:
        plan = best_within(few, budget)
        most = budget * plain_of(few) + 1e-9
        assert plan is not None
        accuracy, cost = places(few, plan)
        assert cost <= most
        assert accuracy == pytest.approx(tried[tried[:, 1] <= most, 0].max())


def _quick(trace: Trace, plan: Plan) -> tuple[float, float]:
    """The same as `places`, without intervals: thousands of plans are tried."""
    return float((trace.replay(plan).answer == trace.labels).mean()), trace.price(plan).mean


def test_a_budget_is_told_on_test_rows(pair: tuple[Trace, Trace], found: Figures) -> None:
    calibration, test = pair
    assert found.budgets[0].point is None  # less than the first exit costs
    for budget in found.budgets[1:]:
        plan = best_within(calibration, budget.budget)
        assert plan is not None
        assert budget.point is not None
        done = test.evaluate(plan, batches=())
        assert budget.point == Point(
            done.prices[0].mean, done.prices[0].worst, done.accuracy or 0.0, done.shares
        )


def test_a_budget_is_a_share_of_the_common_unit(pair: tuple[Trace, Trace]) -> None:
    """A network twice as dear as the unit has half the share of its own."""
    settings = settings_of(method_of("one"), budgets=(0.8,), at_most=None)
    (budget,) = figures_of(*pair, settings, plain_of(pair[1]) / 2).budgets
    plan = best_within(pair[0], 0.4)
    assert plan is not None
    assert budget.point is not None
    assert budget.point.cost == pair[1].price(plan).mean


def test_the_frontier_is_of_plans_that_are_not_dominated_where_they_were_found(few: Trace) -> None:
    settings = settings_of(method_of("one"), budgets=(1.0,), at_most=None)
    found = figures_of(few, few, settings, plain_of(few))  # told on the same rows
    tried = [_quick(few, plan) for plan in every(few)]
    for point in found.frontier[:-1]:  # the last is the plan that never leaves
        assert not [
            1
            for accuracy, cost in tried
            if accuracy > point.accuracy + 1e-9 and cost <= point.cost + 1e-9
        ]
    never = _quick(few, Plan.never_leave(few.topology))
    assert (found.frontier[-1].accuracy, found.frontier[-1].cost) == pytest.approx(never)
    costs = [point.cost for point in found.frontier]
    assert costs == sorted(costs)


def test_p_to_the_k_is_msdnets_share_of_rows_per_exit(pair: tuple[Trace, Trace]) -> None:
    """Exit k answers a share of rows in proportion to p^k: thresholds are quantiles of the rows
    that are left.
    """
    calibration = pair[0]
    settings = settings_of(method_of("one"), budgets=(1.0,), at_most=None)
    found = figures_of(calibration, calibration, settings, plain_of(calibration))
    rows = len(calibration)
    exits = len(calibration.topology.exits)
    for p in (float(POWERS[len(POWERS) // 3]), float(POWERS[len(POWERS) // 2]), float(POWERS[-5])):
        wanted = p ** np.arange(1, exits + 1)
        wanted /= wanted.sum()
        near = min(found.powers, key=lambda point: np.abs(np.array(point.shares) - wanted).max())
        # both ends of a share are whole rows
        assert np.abs(np.array(near.shares) - wanted).max() <= 2 / rows


def test_anytime_answers_every_row_at_one_exit_after_all_before_it(
    pair: tuple[Trace, Trace], found: Figures
) -> None:
    test = pair[1]
    costs = np.cumsum(MACS)
    for index, (name, point) in enumerate(zip(test.topology.exits, found.anytime, strict=True)):
        right = float((test.columns[f"answer/{name}"] == test.labels).mean())
        assert point.shares == tuple(float(each == index) for each in range(len(MACS)))
        assert (point.accuracy, point.cost, point.worst) == pytest.approx(
            (right, costs[index], costs[index])
        )
        assert found.alone[index] == right


def test_leaving_tells_the_share_at_or_above_a_threshold(
    pair: tuple[Trace, Trace], found: Figures
) -> None:
    test = pair[1]
    first = test.topology.gates[0]
    for threshold, share, right in found.leaving:
        leaving = test.columns[f"score/{first}"] >= threshold
        assert share == leaving.mean()
        assert right == (test.columns[f"answer/{first}"] == test.labels)[leaving].mean()


def test_the_certified_plan_is_that_of_calibrate(pair: tuple[Trace, Trace], found: Figures) -> None:
    from offramp.calibration.calibrating import calibrate

    plan = calibrate(pair[0], risk="accuracy_gap", at_most=0.3)
    assert found.certified is not None
    assert (found.certified.accuracy, found.certified.cost) == places(pair[1], plan)
    strict = figures_of(
        *pair, settings_of(method_of("one"), budgets=(1.0,), at_most=1e-6), plain_of(pair[1])
    )
    assert strict.certified is None or strict.certified.cost >= plain_of(pair[1])


def test_rows_that_repeat_leave_all_figures_but_the_promise(pair: tuple[Trace, Trace]) -> None:
    calibration, test = pair
    twice = calibration[np.tile(np.arange(len(calibration)), 2)]
    twice = Trace({**twice.columns, "row": np.arange(len(twice))}, twice.header)
    asked = {"budgets": (1.0,), "at_most": 0.3, "risk": "accuracy_gap"}
    found = figures_of(twice, test, settings_of(method_of("one"), **asked), plain_of(test))
    assert found.certified is None
    assert "have the same content" in found.certified_said
    assert "repeated-rows = 'once'" in found.certified_said
    once = figures_of(
        twice, test, settings_of(method_of("one"), repeated_rows="once", **asked), plain_of(test)
    )
    assert once.certified is not None
    assert "copies count once" in once.certified_said


def test_spread_over_splits(found: Figures, pair: tuple[Trace, Trace]) -> None:
    assert found.budgets[0].over_splits == ()
    for budget in found.budgets[1:]:
        low, median, high = budget.over_splits
        assert 0.5 < low <= median <= high < 1
    settings = settings_of(method_of("one"), budgets=(0.4,), at_most=None)
    again = figures_of(*pair, settings, plain_of(pair[1]), splits=4).budgets[0].over_splits
    assert again == found.budgets[1].over_splits
    assert figures_of(*pair, settings, plain_of(pair[1])).budgets[0].over_splits == ()


def test_a_static_network_is_one_place(pair: tuple[Trace, Trace]) -> None:
    test = trace_of(200, skill=(0.8,), macs=(4.0,))
    found = figures_of_plain(test)
    assert (found.plain, found.budgets, found.frontier) == (4.0, (), ())
    assert found.anytime == (Point(4.0, 4.0, found.alone[0], (1.0,)),)


def test_figures_are_the_same_from_their_file(found: Figures) -> None:
    assert Figures.from_json(json.loads(json.dumps(found.to_json()))) == found
    plain = figures_of_plain(trace_of(50, skill=(0.8,), macs=(4.0,)))
    assert Figures.from_json(json.loads(json.dumps(plain.to_json()))) == plain


def test_rows_without_labels_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no labels"):
        figures_of_plain(trace_of(50, skill=(0.8,), macs=(4.0,), labelled=False))
