"""What the certifier chooses: never dearer than never leaving, whatever the price; the bets of many
rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offramp as off
from forked import CLASSES, WIDTH, Columns, FirstClasses, WholeNumbers
from offramp.calibration import sweep as sweep_module
from offramp.calibration.calibrating import calibrate
from offramp.calibration.search import exits_of
from offramp.errors import InvalidArgument, NoSafePlan, OutOfBudget
from offramp.guarantees import bounds
from offramp.guarantees.testing import order_from
from offramp.plans.plan import BAND, Plan
from offramp.plans.scores import ScoreRange
from offramp.plans.trace import Trace
from routes import Answer
from small import trace_of


def priced(trace: Trace, exits: float, *, call: float = 0.0, row: float = 0.0) -> Trace:
    """The trace with an exit cost at every gate, and milliseconds by the call and by the row at
    every part.
    """
    columns = dict(trace.columns)
    for name in trace.topology.exits:
        macs = columns[f"cost/segment/{name}"][0]
        columns[f"cost/segment/{name}"] = np.array([macs, call, row * macs])
        if name in trace.topology.gates:
            columns[f"cost/exit/{name}"] = np.array([exits, call, row * exits])
    return Trace(columns, trace.header)


def never(trace: Trace, plan: Plan) -> float:
    """The cost of the plan in which nobody leaves before the deepest exit."""
    assert plan.price is not None
    closed = Plan.by_hand({}, max_exit=plan.max_exit)
    return trace.price(closed, plan.price.unit, plan.price.batch).mean


AIMS = [
    {"at_most": 0.1},
    {"at_most": 0.1, "testing": "pareto"},
    {"at_most": 0.1, "risk": "accuracy_gap"},
    {"at_most": 0.1, "risk": "accuracy_gap", "testing": "pareto"},
    {"at_most": 0.3, "risk": "error"},
    {"at_most": 0.3, "max_exit": "middle"},
    {"budget": 1.0},
]


@pytest.mark.filterwarnings("ignore::offramp.errors.DearFirst")
@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize(
    "macs", [(1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (3.0, 2.0, 1.0), (0.1, 0.1, 9.0)]
)
@pytest.mark.parametrize("unit", ["macs", "ms"])
def test_a_plan_never_costs_more_than_never_leaving(aim, macs, unit):
    trace = priced(trace_of(600, macs=macs), 0.3, call=2.0, row=1.0)
    try:
        plan = calibrate(trace, **aim, unit=unit, batch=4)
    except (NoSafePlan, OutOfBudget):
        return
    assert plan.price.unit == unit
    assert plan.price.mean <= never(trace, plan) * (1 + 1e-9)
    if "testing" not in aim:  # those are priced on the rows that tested them
        assert plan.price.mean == pytest.approx(trace.price(plan, unit, 4).mean)
    if "budget" in aim:
        assert plan.price.mean <= plan.price.plain * (1 + 1e-9)


def test_where_leaving_costs_more_nobody_leaves_and_the_promise_holds():
    """Three equal models: whoever is asked first and goes on has paid for nothing."""
    trace = trace_of(600, macs=(1.0, 1.0, 1.0), skill=(0.55, 0.7, 0.95))
    for testing in ("path", "pareto"):
        plan = calibrate(trace, at_most=0.05, testing=testing)
        if not plan.open_gates():
            assert plan.price.mean == plan.price.plain
            assert plan.promise is not None
            assert str(plan).startswith("Nothing leaves early")


def test_the_cheapest_along_the_path_is_what_trying_each_plan_gives():
    trace = priced(trace_of(500), 0.05)
    plan = calibrate(trace, at_most=0.08)
    (t,) = {t for (t,) in plan.thresholds.values()}
    dearer = [
        Plan.by_hand(dict.fromkeys(trace.topology.gates, float(t + step)))
        for step in (0.05, 0.2, 0.5)
    ]
    assert all(trace.price(each).mean >= plan.price.mean for each in dearer)


def saturated(share: float, *, declared: bool = True, rows: int = 2000) -> Trace:
    """A trace by max_prob of which a share of the rows scores exactly 1 at both gates, and a few of
    those are wrong.
    """
    trace = trace_of(rows, skill=(0.8, 0.9, 0.97), seed=3)
    columns = dict(trace.columns)
    rng = np.random.default_rng(0)
    for name in trace.topology.gates:
        logits = columns[f"logits/{name}"].astype(np.float64)
        top = np.sort(logits, axis=1)
        margin = top[:, -1] - top[:, -2]
        tied = margin >= np.quantile(margin, 1 - share)
        score = np.where(tied, 1.0, 1 - 1 / (1 + np.exp(margin))).astype(np.float32)
        columns[f"score/{name}"] = score
        wrong = tied & (rng.random(rows) < 0.012)
        columns[f"answer/{name}"] = np.where(
            tied & ~wrong, columns["answer/large"], columns[f"answer/{name}"]
        )
        columns[f"answer/{name}"] = np.where(
            wrong, (columns["answer/large"] + 1) % 5, columns[f"answer/{name}"]
        )
    if declared:
        scores = dict.fromkeys(trace.topology.gates, ScoreRange(0.0, 1.0, saturates=(1.0,)))
    else:
        scores = {}
    return Trace(columns, dataclasses.replace(trace.header, scores=scores))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_rows_that_saturate_are_certified(share, declared):
    """Within the band of 1.0 the wrong of both exits would count together, and break the level of 2
    %.
    """
    trace = saturated(share, declared=declared)
    tied = (trace.columns["score/small"] == 1).mean()
    plan = calibrate(trace, at_most=0.02)
    assert (trace.replay(plan).exit == 0).mean() >= tied
    for (t,) in plan.thresholds.values():
        assert abs(t - 1) >= 2 * BAND
    at_one = exits_of(trace.scores, np.full((1, 2), 1 - BAND / 2, np.float32))[0] < 2
    assert at_one.any()  # there are rows that a threshold beside 1.0 would have counted twice


def test_patience_leaves_between_its_numbers():
    trace = trace_of(800, skill=(0.9, 0.95, 0.97), macs=(1, 1, 8))
    columns = dict(trace.columns)
    columns["score/small"] = np.zeros(800, np.float32)
    columns["score/middle"] = (columns["answer/small"] == columns["answer/middle"]).astype(
        np.float32
    )
    ranges = {"small": ScoreRange(0, 1, whole=True), "middle": ScoreRange(0, 1, whole=True)}
    plan = calibrate(Trace(columns, dataclasses.replace(trace.header, scores=ranges)), at_most=0.1)
    assert set(plan.thresholds.values()) == {(0.5,)}


def test_scores_beyond_any_fixed_grid_are_reached():
    """The path of the first edition ended at 16,384."""
    trace = trace_of(600)
    for factor, shift in ((1e30, 0.0), (1e3, -5e6)):
        columns = dict(trace.columns)
        for gate in trace.topology.gates:
            columns[f"score/{gate}"] = (columns[f"score/{gate}"] * factor + shift).astype(
                np.float32
            )
        assert calibrate(Trace(columns, trace.header), at_most=0.08).open_gates()


def uncounted(trace: Trace, name: str, macs: float, timed: bool) -> Trace:
    columns = dict(trace.columns)
    for number, exit_ in enumerate(trace.topology.exits):
        ms = 1.0 + 3 * number if timed else np.nan
        columns[f"cost/segment/{exit_}"] = np.array([columns[f"cost/segment/{exit_}"][0], ms, ms])
    columns[f"cost/segment/{name}"] = np.array([macs, *columns[f"cost/segment/{name}"][1:]])
    return Trace(columns, trace.header)


@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize("macs", [0.0, np.nan])
@pytest.mark.parametrize("name", ["small", "large"])
def test_without_macs_the_price_is_in_milliseconds(aim, macs, name):
    trace = uncounted(trace_of(600), name, macs, timed=True)
    plan = calibrate(trace, **aim)
    assert plan.price.unit == "ms"
    assert np.isfinite(plan.price.mean)
    assert "in milliseconds" in str(plan)
    prices = trace.evaluate(plan).prices
    assert [price.unit for price in prices] == ["ms", "ms"]
    with pytest.raises(
        InvalidArgument,
        match=f"the MACs of '{name}' are not known and milliseconds were not measured",
    ):
        calibrate(uncounted(trace_of(600), name, macs, timed=False), **aim)


def test_costs_by_the_row():
    """Rows of different sizes: each is charged what it costs itself."""
    trace = trace_of(600)
    columns = dict(trace.columns)
    size = np.random.default_rng(0).uniform(0.5, 2, 600)
    for name in trace.topology.exits:
        macs = columns[f"cost/segment/{name}"][0]
        columns[f"cost/segment/{name}"] = np.stack(
            [macs * size, np.full(600, np.nan), np.full(600, np.nan)], 1
        )
    sized = Trace(columns, trace.header)
    for aim in ({"at_most": 0.08}, {"at_most": 0.08, "testing": "pareto"}):
        plan = calibrate(sized, **aim)
        assert plan.open_gates()
        assert plan.price.mean < plan.price.plain


@settings(max_examples=20)
@given(st.integers(40, 300), st.integers(0, 1000), st.sampled_from([0.02, 0.1, 0.3]))
def test_bets_on_several_rows_at_a_time(rows, seed, level):
    """The sweep's sums by bet give the p-values that the bound gives for the losses themselves."""
    rng = np.random.default_rng(seed)
    scores = rng.random((rows, 2)).astype(np.float32)
    losses = rng.integers(-1, 2, (rows, 3)).astype(np.int8)
    losses[rng.random(rows) < 0.7] = 0
    path = np.sort(rng.random(5).astype(np.float32))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MOST_BETS", 16)
        size = bounds.rows_per_bet(rows)
        assert size > 1
        order = order_from("a", rows)
        groups = np.empty(rows, np.uint16)
        groups[order] = np.arange(rows) // size
        found = sweep_module.sweep(path, scores, losses, 0.0, groups=groups)
        exits = exits_of(scores, np.repeat(np.append(np.float32(np.inf), path)[:, None], 2, 1))
        plain = losses[np.arange(rows), exits]
        want = bounds.betting(plain, level, low=-1.0, high=1.0, delta=0.05, order=order)
        for plans, sums in found.group_sums(2):
            got = bounds.from_bets(sums, rows, level, low=-1.0, high=1.0, delta=0.05)
            np.testing.assert_allclose(got, want[plans], rtol=1e-9)


def rejecting() -> Trace:
    """Rows of a fork whose last arm answers by itself, otherwise than the head does."""
    arms = {"go": [], "reject": [off.Leave("no", FirstClasses(CLASSES), None)]}
    fork = off.Fork("work", arms, Columns(0))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, WIDTH, generator=draw)
    steps = [("stem", WholeNumbers(WIDTH, 1).eval()), fork, ("head", Answer(3).eval())]
    net = off.route(steps, example=x[:2])
    return off.record(net, x, timed=False, progress=False)


@pytest.mark.parametrize("testing", ["path", "pareto"])
def test_closed_gates_are_tested_where_they_do_not_lead_to_the_reference(testing):
    trace = rejecting()
    closed = trace.replay(Plan.never_leave(trace.topology)).answer
    assert (closed != trace.answers_at("head")).mean() > 0.3
    with pytest.raises(NoSafePlan):
        calibrate(trace, risk="disagreement", at_most=0.2, testing=testing)
    plan = calibrate(trace, risk="disagreement", at_most=0.2, testing=testing, reference="no")
    assert plan.promise is not None


def test_an_exit_off_the_closed_path_is_not_safe_because_it_is_the_deepest():
    trace = rejecting()
    # closed gates lead to "no", so that no row arrives at the head that is to answer
    with pytest.raises(NoSafePlan):
        calibrate(trace, risk="disagreement", at_most=0.2, max_exit="head", reference="head")
