"""A gate of three ways whose paths re-join: run, replayed, priced, certified and exported."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

import offramp as off
from forked import CLASSES, THREE, WIDTH, three
from offramp.calibration.routed import RoutedOutcomes
from offramp.errors import BadNetwork
from offramp.plans.plan import Plan
from offramp.plans.replay import WHY
from offramp.plans.trace import Trace
from offramp.runtime import running

MANY = 100_000


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers: scores tie, and sums are exact in any batch."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (count, WIDTH), generator=draw).float()


def recorded(net, x, **options) -> Trace:
    labels = torch.arange(len(x)) % CLASSES
    return off.record(net, (x, labels), timed=False, progress=False, **options)


PLAN = Plan.by_hand({"size": (1.0, 0.0), "middle": 1.0})
PLANS = [
    PLAN,
    Plan.by_hand({"size": (1.0, 0.0)}),
    Plan.by_hand({"size": (math.inf, 0.0), "middle": -math.inf}),
    Plan.by_hand({"size": (-2.0, math.inf)}),
    Plan.by_hand({"size": (-math.inf, 0.0)}),
    Plan.by_hand({"size": (1.0, 0.0)}, max_exit="middle"),
    Plan.by_hand({}),
]


@pytest.fixture(scope="module")
def traced():
    net = three()
    x = rows_of(400)
    return net, x, recorded(net, x)


def by_row(net, plan: Plan, row: torch.Tensor) -> tuple[list[str], str, list[float]]:
    """The nodes that a single row passes, the exit that answers, and its logits: written out by
    hand.
    """
    values = {"x": row}
    model = {member.name: net.model_of(member) for member in net.members}
    closed = (math.inf, math.inf)
    size = plan.thresholds.get("size", closed)
    middle = plan.thresholds.get("middle", (math.inf,))
    stem = model["stem"](values["x"])
    at_size = model["size"](stem)
    way = "large"
    if at_size[0, 1] >= size[1] and size[1] < math.inf:
        way = "middle"
    if at_size[0, 0] >= size[0] and size[0] < math.inf:
        way = "small"
    passed = ["stem", "size", way]
    arm = model[way](at_size)
    own = torch.full((1, CLASSES), 0.5)
    if way == "middle":
        own = arm[:, :CLASSES]
        if plan.max_exit == "middle" or (arm[0, 2] >= middle[0] and middle[0] < math.inf):
            return passed, "middle", own[0].tolist()
    if way == "large":
        passed.append("more")
        arm = model["more"](arm)
    passed.append("head")
    return passed, "head", (model["head"](arm)[:, :CLASSES] + own)[0].tolist()


@pytest.mark.parametrize("plan", PLANS)
def test_run_and_replay_are_the_walk_of_each_row(traced, plan):
    net, x, trace = traced
    done = trace.replay(plan)
    answers = off.run(net, plan, x)
    stages = [stage.name for stage in done.schedule]
    for number in range(60):
        passed, exit_, logits = by_row(net, plan, x[number : number + 1])
        assert answers.exits[answers.exit[number]] == THREE.exits[done.exit[number]] == exit_
        assert answers.logits[number].tolist() == logits
        assert done.answer[number] == int(np.argmax(logits))
        assert [name for name, ran in zip(stages, done.ran[number], strict=True) if ran] == passed
    assert answers.exit.tolist() == done.exit.tolist()
    assert answers.why.tolist() == done.why.tolist()
    assert answers.logits.argmax(1).tolist() == done.answer.tolist()


def test_a_hundred_thousand_rows_run_as_they_replay():
    net = three()
    x = rows_of(MANY, seed=1)
    trace = recorded(net, x, batch_size=5000)
    done = trace.replay(PLAN)
    runner = off.open(net, PLAN)
    exits = []
    found = []
    why = []
    for start in range(0, MANY, 9999):  # other batches than those that were recorded
        answers = runner(x[start : start + 9999])
        exits.append(answers.exit.numpy())
        found.append(answers.logits.argmax(1).numpy())
        why.append(answers.why.numpy())
    assert (np.concatenate(exits) == done.exit).all()
    assert (np.concatenate(found) == done.answer).all()
    assert (np.concatenate(why) == done.why).all()
    assert set(done.exit) == {0, 1}
    assert done.ran.mean(0).min() > 0.05  # every arm is taken


@pytest.mark.parametrize("plan", PLANS)
def test_the_price_is_the_sum_of_what_each_row_ran(traced, plan):
    trace = traced[2]
    done = trace.replay(plan)
    per_stage = []
    for stage in done.schedule:
        parts = [f"cost/segment/{stage.name}"] + [f"cost/exit/{stage.name}"] * stage.exit
        parts += [f"cost/gate/{stage.name}"] * stage.gate
        per_stage.append(sum(trace.columns[part][0] for part in parts))
    cost_N = done.ran @ np.array(per_stage)
    price = trace.price(plan)
    assert price.mean == pytest.approx(cost_N.mean())
    assert price.worst >= cost_N.max() - 1e-9
    assert trace.evaluate(plan).rows == len(trace)
    if plan is PLAN:
        assert price.worst == cost_N.max() > cost_N.min()


def test_every_path_is_recorded_and_comes_back_from_the_file(traced, tmp_path):
    trace = traced[2]
    assert {
        "answer/head#0",
        "answer/head#1",
        "answer/head#2",
        "answer/middle",
        "score/size@0",
        "score/size@1",
    } <= set(trace.columns)
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.topology == THREE
    assert again.replay(PLAN).answer.tolist() == trace.replay(PLAN).answer.tolist()
    with pytest.raises(BadNetwork, match="forks"):
        _ = trace.scores
    short = {name: column for name, column in trace.columns.items() if name != "score/size@1"}
    with pytest.raises(off.errors.BadData, match="score/size@1"):
        Trace(short, trace.header)


def test_nan_and_infinite_rows_take_the_last_way_and_are_flagged():
    net = three()
    x = rows_of(12)
    x[3] = math.nan
    x[7] = math.inf
    answers = off.run(net, PLAN, x)
    assert answers.flagged.nonzero()[:, 0].tolist() == [3, 7]
    assert [answers.exits[index] for index in answers.exit[[3, 7]]] == ["head", "head"]
    sound = off.run(net, PLAN, rows_of(12))
    others = [index for index in range(12) if index not in (3, 7)]
    assert torch.equal(answers.logits[others], sound.logits[others])


def test_a_stage_without_rows_is_not_called_and_groups_are_merged_in_order(traced, monkeypatch):
    net, x, _ = traced
    runner = off.open(net, PLAN)
    seen = []
    calls = []
    merge = running.merged
    call = runner._call

    def counted(engine_stage, state, rows, **options):
        calls.append(engine_stage.name)
        call(engine_stage, state, rows, **options)

    monkeypatch.setattr(
        running, "merged", lambda groups, gather: seen.append(len(groups)) or merge(groups, gather)
    )
    monkeypatch.setattr(runner, "_call", counted)
    runner(x)
    assert seen == [3]
    assert calls == ["stem", "size", "small", "middle", "large", "more", "head"]
    calls.clear()
    one = next(row for row in x if by_row(net, PLAN, row[None])[0][2] == "small")
    runner(one[None])
    assert calls == ["stem", "size", "small", "head"]


def test_what_needs_a_chain_says_so(traced, tmp_path):
    net, x, _ = traced
    with pytest.raises(BadNetwork, match="the recipe sdn works along a chain"):
        off.fit(net, (x, torch.zeros(len(x), dtype=torch.long)), recipe="sdn", progress=False)


@pytest.mark.parametrize("bound", ["binomial", "betting"])
def test_pareto_testing_finds_plans_with_thresholds_of_their_own(bound):
    net = three()
    x = rows_of(3000, seed=3)
    trace = recorded(net, x)
    plan = off.calibrate(
        trace,
        risk="disagreement",
        at_most=0.6,
        bound=bound,
        testing="pareto",
        repeats="independent",
    )
    shared = off.calibrate(
        trace, risk="disagreement", at_most=0.6, bound=bound, repeats="independent"
    )
    assert plan.promise.testing == "pareto"
    assert plan.promise.searched + plan.promise.rows == 3000
    assert (trace.replay(plan).answer != trace.replay(Plan.never_leave(THREE)).answer).mean() < 0.6
    assert trace.price(plan).mean < trace.price(shared).mean


@pytest.mark.parametrize("bound", ["binomial", "betting"])
def test_a_plan_with_forks_is_certified(bound):
    """One threshold shared by all scores; what it promises is what `replay` finds, and `run`
    answers so.
    """
    net = three()
    x = rows_of(3000, seed=2)
    trace = recorded(net, x)
    plan = off.calibrate(
        trace, risk="disagreement", at_most=0.6, bound=bound, repeats="independent"
    )
    done = trace.replay(plan)
    never = trace.replay(Plan.never_leave(THREE))
    assert plan.promise.rows == 3000
    assert (done.answer != never.answer).mean() < 0.6
    assert len(set(plan.thresholds["size"] + plan.thresholds["middle"])) == 1
    assert plan.price.mean < trace.price(Plan.never_leave(THREE)).mean
    assert off.run(net, plan, x).exit.tolist() == done.exit.tolist()
    assert Plan.from_json(plan.to_json()) == plan
    assert trace.evaluate(plan).risk.value == (done.answer != never.answer).mean()


def test_a_row_near_a_threshold_counts_with_the_worst_of_its_ways(traced):
    """By hand: every combination of ways within the band."""
    trace = traced[2]
    losses = np.random.default_rng(0).random((len(trace), len(THREE.exit_labels)))
    # scores are whole numbers
    thresholds = np.float32([[1.0, 0.0, 1.0], [1.00005, 0.00005, 0.99995]])
    exact, near = (
        RoutedOutcomes(thresholds[[number]], trace, losses).worst(0) for number in (0, 1)
    )
    np.testing.assert_array_equal(exact, near)
    clear = RoutedOutcomes(np.float32([[0.5, 0.5, 0.5]]), trace, losses).worst(0)
    done = trace.replay(Plan.by_hand({"size": (0.5, 0.5), "middle": 0.5}))
    np.testing.assert_array_equal(clear, losses[np.arange(len(trace)), done.output])
    ways = {"small": ["head#0"], "middle": ["middle", "head#1"], "large": ["head#2"]}
    for row in range(100):
        first, second = (trace.columns[f"score/size@{route}"][row] for route in (0, 1))
        third = trace.columns["score/middle"][row]
        own = ["middle"] if third > 1.5 else ["head#1"] if third < 0.5 else ways["middle"]
        options = []
        if first > 0.5:
            options += ways["small"]
        if first < 1.5 and second > -0.5:
            options += own
        if first < 1.5 and second < 0.5:
            options += ways["large"]
        assert exact[row] == max(losses[row, THREE.exit_labels.index(label)] for label in options)


@pytest.mark.parametrize("timed", [False, True])
def test_a_compiled_engine_joins_what_leads_to_a_fork_and_records_every_node(traced, timed):
    """The stem is part of the stage behind it. Its work counts, and it has a share of the time."""
    pytest.importorskip("onnxruntime")
    net, x, trace = traced
    options = {"timed": timed, "progress": False, "engine": "onnxruntime"}
    found = off.record(net, (x[:64], torch.arange(64) % CLASSES), **options)
    costs = {name for name in trace.columns if name.startswith("cost/")}
    assert costs <= set(found.columns)
    for name in costs:
        assert found.columns[name][0] == trace.columns[name][0], name
    for plan in PLANS:
        answers = off.run(net, plan, x[:64], engine="onnxruntime")
        assert answers.exit.tolist() == found.replay(plan).exit.tolist()
    if timed:
        assert found.columns["cost/segment/stem"][1:].sum() > 0
        assert all(np.isfinite(found.columns[name]).all() for name in costs)


@pytest.mark.slow
@pytest.mark.parametrize("one_file", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_an_exported_folder_answers_the_same(traced, tmp_path, plan, one_file):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    net, x, _ = traced
    off.export(net, plan, tmp_path / "f", example=x[:4], one_file=one_file)
    assert (tmp_path / "f" / "network.onnx").exists() == one_file
    spec = importlib.util.spec_from_file_location("run_forked", tmp_path / "f" / "run.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for rows in (x, x[:1], x[5:12], x[:0]):
        found = program.run(rows.numpy(), threads=1)
        want = off.open(net, plan)(rows)
        assert found["exit"].tolist() == want.exit.tolist()
        assert found["why"].tolist() == want.why.tolist()
        assert found["flagged"].tolist() == want.flagged.tolist()
        if len(rows):
            np.testing.assert_array_equal(found["logits"], want.logits.numpy())
    assert WHY[0] == "gate"


def test_anytime_answers_along_every_path_the_cheap_ways_first(traced):
    net, x, trace = traced
    answers = [*off.open(net, PLAN).anytime(x)]
    # by the ways at "size" in order: small, middle (its exit, then the head), large
    labels = ["head#0", "middle", "head#1", "head#2"]
    assert len(answers) == len(labels) == len(THREE.exit_labels)
    for one, label in zip(answers, labels, strict=True):
        assert one.logits.argmax(1).tolist() == trace.columns[f"answer/{label}"].tolist()
        assert set(one.exit.tolist()) == {THREE.exit_index(label.partition("#")[0])}
        assert one.reasons() == ["end"] * len(x)
    few = off.open(net, PLAN).anytime(x[:7])
    assert torch.equal(next(few).logits, answers[0].logits[:7])
    classes = off.run(net, PLAN, x).logits.shape[1]
    empty = [one.logits.shape for one in off.open(net, PLAN).anytime(x[:0])]
    assert empty == [(0, classes)] * 4


def test_rows_take_the_quickest_way_when_time_is_short(traced):
    net, x, _ = traced
    runner = off.open(net, PLAN, timing_rows=x)
    assert torch.equal(runner(x, deadline_ms=60_000.0).exit, runner(x).exit)
    wanted = runner(x)
    late = runner(x, deadline_ms=0.0)
    assert set(late.reasons()) <= {"gate", "end", "deadline"}
    assert late.reasons().count("deadline") > 100
    # every row has the answer of some way, and rows in time have that of the plan
    in_time = late.why != WHY.index("deadline")
    assert torch.equal(late.logits[in_time], wanted.logits[in_time])
    ways = torch.stack([one.logits for one in runner.anytime(x)])  # [paths, B, C]
    assert (ways == late.logits).all(2).any(0).all()


def test_a_way_that_does_not_fit_is_replaced_by_the_quickest():
    net = three()
    x = rows_of(90, seed=4)
    runner = off.open(net, PLAN, timing_rows=x)
    # the arms "large" and "more" take a minute each, all other stages no time
    stages = [stage.name for stage in runner.stages]
    slow = running.Percentile((1,), (60_000.0,))
    fast = running.Percentile((1,), (0.0,))
    runner._percentiles = [slow if name in ("large", "more") else fast for name in stages]
    wanted = runner(x)
    got = runner(x, deadline_ms=10_000.0)
    late = np.array([reason == "deadline" for reason in got.reasons()])
    small = off.run(net, Plan.by_hand({"size": (-math.inf, 0.0)}), x)
    chosen = Plan.by_hand({"size": (math.inf, -math.inf), "middle": 1.0})
    middle = off.run(net, chosen, x)
    scores = recorded(net, x).columns
    large = (scores["score/size@0"] < 1) & (scores["score/size@1"] < 0)
    assert large.any()
    assert late.tolist() == large.tolist()
    assert torch.equal(got.logits[~large], wanted.logits[~large])
    quick = torch.stack([small.logits, middle.logits])
    assert (quick[:, large] == got.logits[large]).all(2).any(0).all()
