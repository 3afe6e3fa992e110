"""Whether a promise holds on other rows, and which rows may say so."""

from __future__ import annotations

import json

import numpy as np
import pytest

import offramp as off
from drawing import at_the_edge, copies, few_contents, population, renumbered, with_columns
from offramp.calibration.calibrating import calibrate
from offramp.calibration.checking import check, told
from offramp.errors import InvalidArgument, OverlappingRows
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace

POPULATION = population()


@pytest.fixture(scope="module")
def plan() -> Plan:
    return calibrate(POPULATION[:600], at_most=0.1)


def doubled(rows: Trace, times: int = 2) -> Trace:
    return copies(rows, times, np.random.default_rng(0))


def test_fresh_rows_tell(plan):
    found = check(plan, POPULATION[600:])
    assert found.word == "holds"
    assert (found.level, found.dropped, found.repeated) == (0.1, 0, 0)
    assert found.evaluation == POPULATION[600:].evaluate(plan)
    assert found.sentence in str(found)
    assert check(plan, POPULATION[600:], at_most=0.001).word == "broken"
    assert check(plan, POPULATION[600:640]).word == "undecided"
    assert check(Plan.by_hand({}), POPULATION[600:]).word == "no promise"
    assert json.loads(json.dumps(told(found)))["verdict"] == "holds"
    assert off.check is check


def test_copies_are_refused_or_counted_as_the_caller_says(plan):
    rows = POPULATION[600:700]
    with pytest.raises(OverlappingRows, match="100 of the 200 test rows have the same content"):
        check(plan, doubled(rows))
    once = check(plan, doubled(rows), repeats="once")
    assert (once.evaluation.rows, once.repeated) == (100, 100)
    assert once.evaluation.risk == check(plan, rows).evaluation.risk
    every = check(plan, doubled(rows), repeats="independent")
    assert (every.evaluation.rows, every.repeated) == (200, 100)
    assert every.evaluation.risk.high < once.evaluation.risk.high
    for repeats in (None, "once", "independent"):
        with pytest.raises(OverlappingRows, match="have the number of another"):
            check(plan, rows[np.repeat(np.arange(100), 2)], repeats=repeats)


def test_rows_of_the_plan_are_refused_or_left_out(plan):
    mixed = POPULATION[550:700]
    with pytest.raises(
        OverlappingRows, match=r"50 of the 150 test rows .*drop_seen=True.*repeats='independent'"
    ) as caught:
        check(plan, mixed)
    assert caught.value.rows == tuple(range(550, 600))
    for options in ({"drop_seen": True}, {"repeats": "once"}):
        found = check(plan, mixed, **options)
        assert (found.evaluation.rows, found.dropped) == (100, 50)
    few = POPULATION[np.append(np.arange(599, 600), np.arange(600, 700))]
    assert check(plan, renumbered(few, 9000), repeats="independent").evaluation.rows == 101
    assert check(plan, mixed, same_rows=True).evaluation.rows == 150
    with pytest.raises(InvalidArgument, match="none is left"):
        check(plan, POPULATION[:600], drop_seen=True)
    shuffled = POPULATION[np.random.default_rng(0).permutation(600)]
    with pytest.raises(OverlappingRows, match="600 of the 600"):
        check(plan, shuffled, repeats="independent")
    for rows in (mixed, POPULATION[1:600], POPULATION[:600:2], POPULATION[300:900]):
        with pytest.raises(
            OverlappingRows, match="too many, or too similar, for rows that were each drawn"
        ):
            check(plan, renumbered(rows, 9000), repeats="independent")


@pytest.mark.parametrize("contents", [2, 12, 60, 1000])
def test_discrete_data_is_checked_unless_it_is_the_same_again(contents):
    rows = few_contents(contents)
    drawn = [
        renumbered(rows[np.random.default_rng(seed).integers(0, 8000, 400)], 400 * seed)
        for seed in range(60)
    ]
    of_them = calibrate(drawn[0], at_most=0.5, repeats="independent")
    for each in drawn[1:]:  # none of 59 is refused
        assert check(of_them, each, repeats="independent").evaluation.rows == 400
    if contents > 2:  # with two contents half of all draws look like that
        for same in (drawn[0], drawn[0][1:], drawn[0][:-3]):
            with pytest.raises(OverlappingRows, match="too similar"):
                check(of_them, renumbered(same, 90_000), repeats="independent")


def test_the_level_of_another_risk_is_asked_for(plan):
    rows = POPULATION[600:]
    assert check(plan, rows, risk="disagreement").level == 0.1
    with pytest.raises(
        InvalidArgument,
        match=r"at_most must be given .* the level 0\.1 is of disagreement, not of error",
    ):
        check(plan, rows, risk="error")
    assert check(plan, rows, risk="error", at_most=0.3).level == 0.3
    assert check(Plan.by_hand({}), rows, risk="error").word == "no promise"


def test_training_rows_are_refused_or_left_out(plan):
    trained = np.arange(200) < 30
    rows = with_columns(POPULATION[600:800], learned=trained)
    for repeats in (None, "once", "independent"):
        with pytest.raises(OverlappingRows, match="30 of the 200 test rows"):
            check(plan, rows, repeats=repeats)
    found = check(plan, rows, drop_seen=True)
    assert (found.evaluation.rows, found.dropped) == (170, 30)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"at_most": 1.5}, "at least 0 and below 1, got 1.5"),
        ({"at_most": True}, "got True"),
        ({"at_most": "5%"}, r"5 % is 0\.05"),
        ({"confidence": 95}, r"confidence must be .* got 95 \(95 % is 0\.95\)"),
        ({"confidence": 0}, "confidence must be"),
        ({"repeats": "never"}, "repeats must be"),
    ],
)
def test_what_is_refused(plan, options, says):
    with pytest.raises(InvalidArgument, match=says):
        check(plan, POPULATION[600:], **options)


def test_the_interval_of_evaluate_counts_copies_once(plan):
    """Sure of forty copies is as sure as of one."""
    rows = POPULATION[600:700]
    plain = rows.evaluate(plan)
    for many in (doubled(rows, 40), rows[np.repeat(np.arange(100), 40)]):
        found = many.evaluate(plan)
        assert (found.rows, found.repeated) == (4000, 3900)
        assert found.risk.value == pytest.approx(plain.risk.value)
        assert (found.risk.low, found.risk.high) == pytest.approx((plain.risk.low, plain.risk.high))
        assert "3,900 rows repeat others, which the interval counts once" in str(found)
        narrow = many.evaluate(plan, repeats="independent")
        assert narrow.repeated == 0
        assert narrow.risk.high - narrow.risk.low < (found.risk.high - found.risk.low) / 3
        assert many.evaluate(plan, repeats="once").rows == 100
    assert (plain.repeated, "repeat" in str(plain)) == (0, False)
    with pytest.raises(InvalidArgument, match="repeats must be"):
        rows.evaluate(plan, repeats="maybe")
    with pytest.raises(InvalidArgument, match="confidence must be"):
        rows.evaluate(plan, confidence=95)


def test_the_interval_does_not_depend_on_the_order_of_the_rows(plan):
    rows = POPULATION[600:1000]
    rng = np.random.default_rng(0)
    risk = rows.evaluate(plan, risk="accuracy_gap").risk
    for _ in range(10):
        assert rows[rng.permutation(400)].evaluate(plan, risk="accuracy_gap").risk == risk


def test_the_interval_holds_the_mean_where_copies_are_uneven():
    """Ten contents, one of them nine times in ten: the figure is the mean over all rows."""
    rows, _ = at_the_edge()
    everything = Plan.by_hand({"small": 0.0})
    wrong = rows.columns["answer/small"] != rows.columns["answer/middle"]
    some = rows[np.append(np.flatnonzero(wrong)[:90], np.flatnonzero(~wrong)[:10])]
    risk = some.evaluate(everything, risk="disagreement").risk
    assert risk.value == pytest.approx(0.9)
    assert risk.low <= risk.value <= risk.high
