"""Networks with more paths than can be recorded: settings of one dial."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from forked import CLASSES, WIDTH, Columns, WholeNumbers, three
from offramp.errors import BadNetwork, InvalidArgument, Notice, OutOfBudget
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from routes import Answer

SETTINGS = [2.5, 1.5, 0.5, -0.5, -1.5]


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (count, WIDTH), generator=draw).float()


def many() -> off.Network:
    """Six units that can be skipped: 64 paths."""
    steps = [("stem", WholeNumbers(WIDTH, 0).eval())]
    for number in range(6):
        arms = {f"none{number}": [], f"unit{number}": WholeNumbers(WIDTH, number + 1).eval()}
        steps.append(off.Fork(f"skip{number}", arms, Columns(number % WIDTH)))
    return off.route([*steps, ("head", Answer(9).eval())], example=torch.zeros(2, WIDTH))


def recorded(net, x, **options) -> Trace:
    y = torch.arange(len(x)) % CLASSES
    return off.record(net, (x, y), timed=False, progress=False, **options)


@pytest.fixture(scope="module")
def traced():
    net = many()
    x = rows_of(3000)
    return net, x, recorded(net, x, settings=SETTINGS)


def plan_at(net, value: float) -> Plan:
    return Plan.by_hand(dict.fromkeys(net.topology.gates, value))


def test_too_many_paths_are_refused_without_settings():
    with pytest.raises(BadNetwork, match=r"more than sixteen paths.*Use settings="):
        recorded(many(), rows_of(10))


def test_run_is_replay_at_every_setting(traced):
    net, x, trace = traced
    for value in SETTINGS:
        plan = plan_at(net, value)
        done = trace.replay(plan)
        answers = off.run(net, plan, x[:999])  # another batch
        assert answers.exit.tolist() == done.exit[:999].tolist()
        assert answers.logits.argmax(1).tolist() == done.answer[:999].tolist()
    never = trace.replay(Plan.never_leave(net.topology))
    assert never.answer.tolist() == off.run(net, Plan.by_hand({}), x).logits.argmax(1).tolist()


def test_the_price_is_the_sum_of_what_each_row_ran(traced):
    net, _, trace = traced
    plan = plan_at(net, 0.5)
    done = trace.replay(plan)
    skipped = 1 - np.mean(
        [done.ran[:, done.schedule.index[f"unit{number}"]].mean() for number in range(6)]
    )
    assert 0.2 < skipped < 0.9
    unit = trace.columns["cost/segment/unit0"][0]
    price = trace.price(plan)
    assert price.mean == pytest.approx(price.plain - 6 * skipped * unit)
    assert trace.evaluate(plan).accuracy == (done.answer == trace.labels).mean()


def test_settings_are_the_same_as_all_paths_where_both_can_be_recorded():
    net = three()
    x = rows_of(2000, 1)
    every = recorded(net, x)
    dial = recorded(net, x, settings=SETTINGS)
    for value in SETTINGS:
        plan = Plan.by_hand({"size": (value, value), "middle": value})
        one = every.replay(plan)
        other = dial.replay(plan)
        assert one.exit.tolist() == other.exit.tolist()
        assert one.answer.tolist() == other.answer.tolist()
        assert (one.ran == other.ran).all()
        assert every.price(plan) == dial.price(plan)
        assert every.evaluate(plan).in_band == dial.evaluate(plan).in_band


@pytest.mark.parametrize("bound", ["binomial", "betting"])
def test_a_setting_is_certified(traced, bound):
    net, _, trace = traced
    options = {"risk": "disagreement", "bound": bound, "repeats": "independent"}
    plan = off.calibrate(trace, at_most=0.9, **options)
    (value,) = {value for values in plan.thresholds.values() for value in values}
    assert value in SETTINGS
    never = trace.replay(Plan.never_leave(net.topology)).answer
    assert (trace.replay(plan).answer != never).mean() < 0.9
    assert plan.promise.rows == len(trace)
    with pytest.raises(off.errors.NoSafePlan, match="smallest level in sight is"):
        off.calibrate(trace, at_most=0.01, **options)


def test_a_row_near_a_threshold_counts_with_the_largest_loss():
    net = many()
    x = rows_of(500, 2)
    trace = recorded(net, x, settings=[1.0])  # scores are whole numbers
    plan = plan_at(net, 1.0)
    differs = trace.replay(plan).answer != trace.replay(Plan.never_leave(net.topology)).answer
    near = trace.columns["setting/near#1"]
    assert trace.evaluate(plan).in_band == near.mean() > 0.2
    counted = (near | differs).mean()
    assert counted > differs.mean() + 0.05
    options = {"risk": "disagreement", "repeats": "independent"}
    with pytest.raises(off.errors.NoSafePlan):
        off.calibrate(trace, at_most=counted - 0.01, **options)
    assert off.calibrate(trace, at_most=min(counted + 0.1, 1.0), **options).promise


def test_a_budget_takes_the_best_setting_within(traced):
    net, _, trace = traced
    plan = off.calibrate(trace, budget=0.7, risk="disagreement")
    assert trace.price(plan).mean <= 0.7 * trace.price(plan).plain
    never = trace.replay(Plan.never_leave(net.topology)).answer
    losses = {}
    for value in SETTINGS:
        other = plan_at(net, value)
        if trace.price(other).mean <= 0.7 * trace.price(other).plain:
            losses[value] = (trace.replay(other).answer != never).mean()
    assert (trace.replay(plan).answer != never).mean() == min(losses.values())
    with pytest.raises(OutOfBudget, match="cheapest recorded setting"):
        off.calibrate(trace, budget=0.01)


def test_it_comes_back_from_the_file(traced, tmp_path):
    net, _, trace = traced
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.header.settings == trace.header.settings
    plan = plan_at(net, 0.5)
    assert again.replay(plan).answer.tolist() == trace.replay(plan).answer.tolist()


def test_a_dial_that_is_not_monotone_in_cost_is_said():
    dear = torch.nn.Sequential(WholeNumbers(WIDTH, 1), WholeNumbers(WIDTH, 2)).eval()
    arms = {"dear": dear, "cheap": WholeNumbers(WIDTH, 3).eval()}
    fork = off.Fork("f", arms, Columns(0))
    steps = [("stem", WholeNumbers(WIDTH, 0).eval()), fork, ("head", Answer(9).eval())]
    net = off.route(steps, example=torch.zeros(2, WIDTH))
    trace = recorded(net, rows_of(500), settings=[1.5, -1.5])
    with pytest.warns(Notice, match="not monotone in cost"):
        off.calibrate(trace, budget=2.0)


def test_a_report_draws_the_ways_at_a_setting(traced, tmp_path):
    pytest.importorskip("plotly")
    from offramp.reporting.view import view_of
    from offramp.reporting.ways import ways_of

    net, _, trace = traced
    plan = off.calibrate(trace, budget=0.7, risk="disagreement")
    page = off.report(trace, plan, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The ways of the rows" in page
    shares = {(way.start, way.end): way.share for way in ways_of(view_of(trace, plan))}
    done = trace.replay(plan)
    assert shares["skip2", "unit2"] == done.ran[:, done.schedule.index["unit2"]].mean()
    for name in net.topology.names[1:]:
        arrived = sum(share for (_, end), share in shares.items() if end == name)
        left = sum(share for (start, _), share in shares.items() if start == name)
        assert arrived == pytest.approx(left)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ([], "1 to 200 finite"),
        ([1.0, 2.0], "must fall"),
        ([float("inf")], "finite"),
        (0.5, "must be a list"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(InvalidArgument, match=says):
        recorded(three(), rows_of(10), settings=settings)


def test_what_was_not_recorded_is_refused(traced):
    net, _, trace = traced
    with pytest.raises(InvalidArgument, match="the plan is none of them"):
        trace.replay(plan_at(net, 0.7))
    with pytest.raises(InvalidArgument, match="tested along the dial"):
        off.calibrate(trace, at_most=0.5, testing="pareto")
    with pytest.raises(InvalidArgument, match="leave out testing, search and max_exit"):
        off.calibrate(trace, budget=0.7, max_exit="head")
    with pytest.raises(InvalidArgument, match="must be None for a chain"):
        off.record(
            off.ladder({"a": Answer(1).eval(), "b": Answer(2).eval()}), rows_of(10), settings=[1.0]
        )


def test_anytime_takes_sixteen_paths_at_most():
    net = many()
    with pytest.raises(
        BadNetwork, match=r"at most sixteen, and this network has more\. Use a dead"
    ):
        next(off.open(net, plan_at(net, 0.5)).anytime(rows_of(4)))
