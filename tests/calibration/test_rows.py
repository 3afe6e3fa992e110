"""Rows that repeat: what is refused, what the caller may say, and that promises are kept all the
same.
"""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

import offramp as off
from drawing import (
    COPIES,
    DRAWS,
    at_the_edge,
    broken,
    copies,
    few_contents,
    population,
    renumbered,
    true_risk,
    with_columns,
)
from offramp.calibration.calibrating import calibrate
from offramp.errors import InvalidArgument, NoSafePlan, OverlappingRows
from offramp.plans.plan import Plan, Promise
from offramp.plans.trace import Trace
from small import ladder_of, rows_of, trace_of

THINNED = DRAWS // 4  # in the fast suite
SOME_DRAWS = [THINNED // 3, pytest.param(DRAWS, marks=pytest.mark.slow)]
ALLOWED = stats.binom.ppf(0.9999, DRAWS, 0.05)
POPULATION = population()


def sample(seed: int, rows: int = 60) -> Trace:
    """Rows drawn from the population, none of them twice."""
    return POPULATION[np.random.default_rng(seed).choice(len(POPULATION), rows, replace=False)]


def copied(seed: int, times: int, rows: int = 60) -> Trace:
    return copies(sample(seed, rows), times, np.random.default_rng(seed))


def joined(first: Trace, second: Trace) -> Trace:
    """The rows of two traces behind each other."""
    columns = {}
    for name, column in first.columns.items():
        columns[name] = (
            column if name.startswith("cost/") else np.concatenate([column, second.columns[name]])
        )
    return Trace(columns, first.header)


# What a promise is worth. Each test draws DRAWS calibration sets from a population whose true risks
# are known.


@pytest.mark.parametrize("times", COPIES)
@pytest.mark.parametrize("testing", ["path", "pareto"])
def test_copies_within_a_trace(times, testing):
    """Refused; counted once they are as good as the rows without copies."""
    asked = {"at_most": 0.08, "testing": testing}
    for seed in range(5):
        with pytest.raises(
            OverlappingRows, match=f"{60 * (times - 1):,} of the {60 * times:,} calibration rows"
        ):
            calibrate(copied(seed, times), **asked)
    draws = THINNED if times == 3 else THINNED // 2
    plans = [lambda s=s: calibrate(copied(s, times), repeats="once", **asked) for s in range(draws)]
    bad, made = broken(POPULATION, plans, "disagreement", 0.08)
    assert bad <= stats.binom.ppf(0.9999, draws, 0.05)
    assert made > draws / 4


def test_copies_that_counted_would_break_the_promise():
    """So that the test above can fail: whoever says that copies are draws gets what the first
    edition gave.
    """
    plans = [
        lambda s=s: calibrate(copied(s, 10), at_most=0.05, repeats="independent")
        for s in range(THINNED)
    ]
    bad, _ = broken(POPULATION, plans, "disagreement", 0.05)
    assert bad > 1.5 * stats.binom.ppf(0.9999, THINNED, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("times", COPIES)
@pytest.mark.parametrize(
    ("risk", "at_most"), [("disagreement", 0.05), ("disagreement", 0.08), ("accuracy_gap", 0.08)]
)
@pytest.mark.parametrize("testing", ["path", "pareto"])
def test_copies_within_a_trace_in_full(times, risk, at_most, testing):
    asked = {"risk": risk, "at_most": at_most, "testing": testing}
    refused = 0
    for seed in range(DRAWS):
        try:
            calibrate(copied(seed, times), **asked)
        except OverlappingRows:
            refused += 1
    assert refused == DRAWS
    plans = [lambda s=s: calibrate(copied(s, times), repeats="once", **asked) for s in range(DRAWS)]
    assert broken(POPULATION, plans, risk, at_most)[0] <= ALLOWED


@pytest.mark.parametrize("repeats", [None, "independent", "once"])
@pytest.mark.parametrize("times", COPIES)
def test_a_trace_indexed_with_repetitions_is_always_refused(times, repeats):
    for seed in range(10):
        rows = np.random.default_rng(seed).permutation(np.repeat(np.arange(50), times))
        for testing in ("path", "pareto"):
            with pytest.raises(
                OverlappingRows, match=rf"{50 * (times - 1):,} of the .* have the number of another"
            ):
                calibrate(POPULATION[rows], at_most=0.002, testing=testing, repeats=repeats)


@pytest.mark.parametrize("draws", SOME_DRAWS)
@pytest.mark.parametrize("times", COPIES)
def test_copies_across_search_and_test_rows(times, draws):
    """Every test row also stands among the search rows, under another number."""

    def plan_of(seed: int, repeats: str | None) -> Plan:
        rows = sample(seed, 120)
        search = renumbered(
            joined(copies(rows[:60], times, np.random.default_rng(seed)), rows[60:]), 10_000
        )
        return calibrate(rows[:60], at_most=0.08, search=search, repeats=repeats)

    for seed in range(5):
        with pytest.raises(
            OverlappingRows,
            match=r"60 of the 60 calibration rows .* have the content of search rows",
        ):
            plan_of(seed, None)
    bad, made = broken(
        POPULATION, [lambda s=s: plan_of(s, "once") for s in range(draws)], "disagreement", 0.08
    )
    assert bad <= stats.binom.ppf(0.9999, draws, 0.05)
    assert made > draws / 4


def test_search_rows_that_are_the_test_rows_are_always_refused():
    rows = sample(0)
    for repeats in (None, "independent", "once"):
        with pytest.raises(
            OverlappingRows,
            match=r"20 of the 60 calibration rows .* one row of a source is one draw",
        ):
            calibrate(rows, at_most=0.2, search=rows[40:], repeats=repeats)
    with pytest.raises(InvalidArgument, match="none is left"):
        calibrate(rows, at_most=0.2, search=renumbered(rows, 10_000), repeats="once")


def test_row_5_of_one_array_is_not_row_5_of_another():
    rows = renumbered(sample(0))
    search = renumbered(sample(1, 200)[100:])
    assert calibrate(rows, at_most=0.2, search=search).promise.searched == 100
    named = []
    for k, one in enumerate((rows, search)):
        named.append(
            Trace(one.columns, dataclasses.replace(one.header, data=f"npz:all.npz[{k}:999]"))
        )
    with pytest.raises(OverlappingRows, match="60 of the 60 calibration rows"):
        calibrate(named[0], at_most=0.2, search=named[1], repeats="independent")


@pytest.mark.parametrize("testing", ["path", "pareto"])
@pytest.mark.parametrize(
    ("risk", "bound"), [("disagreement", None), ("disagreement", "betting"), ("error", "betting")]
)
@pytest.mark.parametrize("draws", SOME_DRAWS)
@pytest.mark.parametrize("contents", [12, 60])
def test_discrete_data_whose_rows_are_independent(contents, risk, bound, testing, draws):
    """Contents repeat because there are few of them, and their labels are noisy."""
    rows = few_contents(contents)
    level = {"disagreement": 0.1, "error": 0.25}[risk]

    def plan_of(seed: int) -> Plan:
        drawn = renumbered(rows[np.random.default_rng(seed).integers(0, len(rows), 300)])
        asked = {"risk": risk, "at_most": level, "bound": bound, "testing": testing}
        return calibrate(drawn, repeats="independent", **asked)

    bad, _ = broken(rows, [lambda s=s: plan_of(s) for s in range(draws)], risk, level)
    assert bad <= stats.binom.ppf(0.9999, draws, 0.05)


def edge_plans(rows: Trace, level: float, draws: int):
    def plan_of(seed: int) -> Plan:
        drawn = renumbered(rows[np.random.default_rng(seed).integers(0, len(rows), 300)])
        return calibrate(drawn, at_most=level, bound="betting", repeats="independent")

    return [lambda s=s: plan_of(s) for s in range(draws)]


def test_the_betting_order_scatters_copies():
    """At the edge, with a bound that depends on the order."""
    rows, risk = at_the_edge()
    bad, made = broken(
        rows, edge_plans(rows, 0.999 * risk, 2 * THINNED), "disagreement", 0.999 * risk
    )
    assert bad == made  # every certificate would be false
    assert 0 < bad <= stats.binom.ppf(0.9999, 2 * THINNED, 0.05)


def test_an_order_by_content_would_break_the_promise(monkeypatch):
    """The same rows sorted by a hash of their content: all copies of one content follow each
    other.
    """

    def sorted_by_content(columns):
        keys = columns["digest"] * np.uint64(0x9E3779B97F4A7C15)
        return np.argsort(keys, kind="stable")

    monkeypatch.setattr("offramp.calibration.certifying.order_of", sorted_by_content)
    rows, risk = at_the_edge()
    bad, _ = broken(
        rows, edge_plans(rows, 0.999 * risk, THINNED // 4), "disagreement", 0.999 * risk
    )
    assert bad > THINNED // 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"testing": "pareto"},
        {"testing": "pareto", "bound": "hoeffding_bentkus", "at_most": 0.25},
    ],
)
def test_the_order_of_rows_is_nobodys_choice(options):
    rows = sample(3, 300)
    rng = np.random.default_rng(0)
    asked = {"risk": "accuracy_gap", "at_most": 0.1, **options}
    plan = calibrate(rows, **asked)
    assert plan.open_gates()
    for _ in range(20):
        other = calibrate(rows[rng.permutation(300)], **asked)
        assert (other.thresholds, other.promise) == (plan.thresholds, plan.promise)


@pytest.mark.parametrize("repeats", ["independent", "once"])
def test_neither_is_it_where_contents_repeat_under_different_labels(repeats):
    rng = np.random.default_rng(4)
    rows = few_contents(40)[rng.permutation(8000)[:400]]
    asked = {
        "risk": "error",
        "at_most": 0.8,
        "bound": "betting",
        "repeats": repeats,
        "testing": "pareto",
    }
    plan = calibrate(rows, **asked)
    for _ in range(20):
        other = calibrate(rows[rng.permutation(400)], **asked)
        assert (other.thresholds, other.promise) == (plan.thresholds, plan.promise)


def best_of_orders(seed: int, orders: int) -> Plan:
    """What somebody gets who tries some orders of the same rows and keeps the cheapest plan."""
    rows = sample(seed, 150)
    rng = np.random.default_rng(seed)
    plans = []
    for _ in range(orders - 1):
        with contextlib.suppress(NoSafePlan):
            plans.append(calibrate(rows[rng.permutation(150)], risk="accuracy_gap", at_most=0.05))
    return min(
        plans or [calibrate(rows, risk="accuracy_gap", at_most=0.05)],
        key=lambda plan: plan.price.mean,
    )


def test_the_best_of_some_orders():
    plans = [lambda s=s: best_of_orders(s, 3) for s in range(THINNED // 4)]
    bad, _ = broken(POPULATION, plans, "accuracy_gap", 0.05)
    assert bad <= stats.binom.ppf(0.9999, THINNED // 4, 0.05)


@pytest.mark.slow
def test_the_best_of_twenty_orders_in_full():
    plans = [lambda s=s: best_of_orders(s, 20) for s in range(DRAWS)]
    assert broken(POPULATION, plans, "accuracy_gap", 0.05)[0] <= ALLOWED


def test_copies_of_another_type():
    """The same values as float64 and float32 have one digest; their scores differ in the last
    bits.
    """

    def twice(seed: int) -> Trace:
        rows = copied(seed, 2)
        noise = 1e-6 * np.random.default_rng(seed).standard_normal(len(rows))
        return with_columns(
            rows, **{"score/small": (rows.columns["score/small"] + noise).astype(np.float32)}
        )

    for seed in range(5):
        with pytest.raises(
            OverlappingRows, match="60 of the 120 calibration rows have the same content"
        ):
            calibrate(twice(seed), at_most=0.08)
    plans = [lambda s=s: calibrate(twice(s), at_most=0.08, repeats="once") for s in range(THINNED)]
    assert broken(POPULATION, plans, "disagreement", 0.08)[0] <= stats.binom.ppf(
        0.9999, THINNED, 0.05
    )


# What is told, and what is refused.


def test_what_the_promise_says_of_copies():
    plan = calibrate(copied(0, 3), at_most=0.2, repeats="once")
    assert (plan.promise.repeats, plan.promise.repeated, plan.promise.rows) == ("once", 120, 60)
    assert "copies count once: 120 left out, so it is about distinct rows" in str(plan)
    plan = calibrate(copied(0, 3), at_most=0.2, repeats="independent")
    assert (plan.promise.repeats, plan.promise.repeated, plan.promise.rows) == (
        "independent",
        120,
        180,
    )
    assert "120 rows repeat the content of others and count as independent draws" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    plain = calibrate(sample(0), at_most=0.2)
    assert (plain.promise.repeats, plain.promise.repeated, plain.promise.dropped) == ("", 0, 0)
    assert "repeat" not in str(plain)
    assert "copies" not in str(plain)


def test_a_promise_without_these_fields_is_read():
    old = Promise("error", 0.05, 0.95, "c", "binomial", "path", 400, 0, "covers")
    assert (old.repeats, old.repeated, old.dropped) == ("", 0, 0)


def test_all_that_repeat_are_counted_and_named():
    rows = sample(0, 40)
    doubled = renumbered(joined(rows, rows[3:15]))
    with pytest.raises(
        OverlappingRows, match=r"12 of the 52 .*\(rows 40, 41, .*, 49 and 2 more\)"
    ) as caught:
        calibrate(doubled, at_most=0.2)
    assert caught.value.rows == tuple(range(40, 52))
    for way in ("repeats='once'", "repeats='independent'"):
        assert way in str(caught.value)
    with pytest.raises(OverlappingRows, match=r"1 of the 41 calibration rows .* \(row 40\)"):
        calibrate(renumbered(joined(rows, rows[3:4])), at_most=0.2)


def test_traces_that_were_joined_are_told_apart_by_numbers_of_their_own():
    first = renumbered(sample(0))
    second = renumbered(sample(1, 200)[100:])
    with pytest.raises(OverlappingRows, match="number of its own"):
        calibrate(joined(first, second), at_most=0.2)
    assert calibrate(joined(first, renumbered(second, 60)), at_most=0.2).promise.rows == 160


def test_under_a_budget_repeats_do_no_harm():
    rows = sample(0)
    plan = calibrate(rows[np.repeat(np.arange(60), 3)], budget=0.5)
    assert plan.thresholds == calibrate(rows, budget=0.5).thresholds
    assert calibrate(copied(0, 3), budget=0.5).promise is None


def with_training_rows(rows: Trace, learned: np.ndarray) -> Trace:
    return with_columns(rows, learned=learned)


@pytest.mark.parametrize(
    "options", [{"at_most": 0.2}, {"at_most": 0.2, "testing": "pareto"}, {"budget": 0.5}]
)
def test_training_rows_are_refused_or_left_out(options):
    rows = sample(0, 80)
    trained = np.arange(80) % 10 == 3
    with pytest.raises(
        OverlappingRows, match=r"8 of the 80 calibration rows .* also trained .*drop_seen=True"
    ) as caught:
        calibrate(with_training_rows(rows, trained), **options)
    assert caught.value.rows == tuple(rows.columns["row"][trained])
    plan = calibrate(with_training_rows(rows, trained), drop_seen=True, **options)
    assert plan.thresholds == calibrate(rows[~trained], **options).thresholds
    assert plan.rows.digests.size == 72
    assert "72 rows" in plan.rows.data
    if plan.promise:
        assert plan.promise.dropped == 8
        assert "8 rows that trained the network left out" in str(plan)
    with pytest.raises(InvalidArgument, match=r"all 80 calibration rows .* none is left"):
        calibrate(with_training_rows(rows, np.ones(80, bool)), drop_seen=True, **options)


def test_copies_of_training_rows_are_training_rows():
    """Neither way to count copies lets them in; leaving them out comes first."""
    rows = with_training_rows(copied(0, 2), np.zeros(120, bool))
    trained = rows.columns["digest"] == rows.columns["digest"][0]
    rows = with_training_rows(rows, trained)
    for repeats in (None, "once", "independent"):
        with pytest.raises(OverlappingRows, match=r"2 of the 120 calibration rows .* also trained"):
            calibrate(rows, at_most=0.2, repeats=repeats)
    plan = calibrate(rows, at_most=0.2, repeats="once", drop_seen=True)
    assert (plan.promise.rows, plan.promise.repeated, plan.promise.dropped) == (59, 59, 2)


# The same from data, as `record` sees it.


def recorded(data: object) -> Trace:
    return off.record(ladder_of(2), data, timed=False, progress=False)


@pytest.mark.parametrize("times", COPIES)
def test_a_dataset_that_holds_copies(times):
    data = TensorDataset(rows_of(50).repeat(times, 1))
    with pytest.raises(
        OverlappingRows,
        match=f"{50 * (times - 1):,} of the {50 * times:,} calibration rows have the s",
    ):
        calibrate(recorded(data), at_most=0.9)
    picked = Subset(TensorDataset(rows_of(50)), np.repeat(np.arange(50), times).tolist())
    with pytest.raises(OverlappingRows, match="have the same content"):
        calibrate(recorded(picked), at_most=0.9)
    assert calibrate(recorded(data), at_most=0.9, repeats="once").promise.rows == 50


def test_a_loader_that_draws_with_replacement():
    data = TensorDataset(rows_of(60))
    draw = torch.Generator().manual_seed(0)
    batches = list(
        DataLoader(
            data, 32, sampler=RandomSampler(data, replacement=True, num_samples=200, generator=draw)
        )
    )
    trace = recorded(batches)
    with pytest.raises(OverlappingRows, match="of the 200 calibration rows have the same content"):
        calibrate(trace, at_most=0.9)
    once = calibrate(trace, at_most=0.9, repeats="once").promise
    assert once.rows == len(np.unique(trace.columns["digest"])) < 60
    assert calibrate(trace, at_most=0.9, repeats="independent").promise.rows == 200


def test_risks_of_the_population_are_known():
    """The tests above look up what is true: the plan that never leaves loses nothing, all others
    something.
    """
    assert true_risk(POPULATION, Plan.never_leave(POPULATION.topology), "disagreement") == 0
    assert true_risk(POPULATION, Plan.by_hand({"small": -np.inf}), "disagreement") > 0.1


def test_no_copy_is_chosen_for_its_label():
    """One content under two labels: over many contents the label that counts is as often the one as
    the other.
    """
    rows = trace_of(4000, seed=6)
    label = np.concatenate([np.zeros(4000, int), np.ones(4000, int)])
    doubled = with_columns(renumbered(joined(rows, rows)), label=label)
    from offramp.plans.draws import one_of_each

    counted = label[one_of_each(doubled.columns)]
    assert abs(counted.mean() - 0.5) < 0.04
