"""The Runner: order, what is run and what is not, rows of NaN, threads, anytime, deadlines."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import ladder
from offramp.errors import InvalidArgument, StaleRunner
from offramp.networks.network import LOGITS, SCORE
from offramp.plans.plan import Plan, choose
from offramp.plans.replay import WHY
from offramp.runtime import running
from offramp.runtime import session as opening
from offramp.runtime.engine import kind_of
from offramp.runtime.outputs import END, GATE
from offramp.runtime.running import STAGE_SAMPLES, Runner
from small import INF_MARK, NAN_MARK, Counting, conv, dense, ladder_of, rows_of, spoiled


@pytest.mark.parametrize("answer", ["own", "mean"])
def test_a_row_does_not_depend_on_its_batch_mates(answer):
    net = ladder_of(3, answer=answer)
    x = rows_of(40)
    runner = off.open(net, Plan.by_hand({"small": 0.5, "middle": 0.5}))
    whole = runner(x)
    assert len(set(whole.exit.tolist())) == 3
    for rows in (
        torch.tensor([3]),
        torch.arange(0, 40, 2),
        torch.randperm(40, generator=torch.Generator()),
    ):
        part = runner(x[rows])
        torch.testing.assert_close(part.logits, whole.logits[rows], atol=1e-5, rtol=0)
        assert part.exit.tolist() == whole.exit[rows].tolist()


def test_answers_are_in_the_order_of_x(three):
    x = rows_of(33)
    y = off.run(three, Plan.by_hand({"small": 0.4, "middle": 0.4}), x)
    every = three(x)
    for row, (index, logits) in enumerate(zip(y.exit.tolist(), y.logits, strict=True)):
        torch.testing.assert_close(logits, every[index][row], atol=1e-5, rtol=0)
    assert y.exits == three.topology.exits
    assert y.reasons() == [WHY[code] for code in y.why]


def test_images_and_batch_norm():
    net = ladder_of(3, make=conv)
    x = torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    trace = off.record(net, x.numpy(), timed=False)
    plan = Plan.by_hand(
        {gate: float(np.median(trace.columns[f"score/{gate}"])) for gate in net.topology.gates}
    )
    assert off.run(net, plan, x).exit.tolist() == trace.replay(plan).exit.tolist()


def counting(members: int = 3):
    models = {
        name: Counting(dense(index))
        for index, name in enumerate(("small", "middle", "large")[:members])
    }
    return ladder(models).eval(), list(models.values())


def test_an_empty_batch_calls_no_segment():
    net, models = counting()
    trace = off.record(net, rows_of(30).numpy(), timed=False)
    runner = off.open(net, Plan(thresholds={"small": (0.4,)}, origin=trace.header.origin))
    for model in models:
        model.calls.clear()
    y = runner(torch.zeros(0, 4))
    steps = list(runner.anytime(torch.zeros(0, 4)))
    assert [model.calls for model in models] == [[], [], []]
    assert len(y.logits) == len(y.exit) == len(y.why) == len(y.flagged) == 0
    assert [len(step.logits) for step in steps] == [0, 0, 0]


def test_an_empty_batch_has_as_many_classes_as_the_others(two):
    trace = off.record(two, rows_of(30).numpy(), timed=False)
    runner = off.open(two, Plan(thresholds={"small": (0.5,)}, origin=trace.header.origin))
    assert runner(torch.zeros(0, 4)).logits.shape == (0, 3)


def test_a_plan_by_hand_learns_the_number_of_classes_from_one_row():
    net, models = counting(2)
    runner = off.open(net, Plan.by_hand({"small": 0.4}))
    for _ in range(2):
        y = runner(torch.zeros(0, 4))
        assert y.logits.shape == (0, 3)
        assert len(y.exit) == len(y.why) == len(y.flagged) == 0
    assert models[0].calls == [1]
    assert [step.logits.shape for step in runner.anytime(torch.zeros(0, 4))] == [(0, 3)] * 2


def test_so_it_does_on_a_compiled_engine():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    runner = off.open(
        ladder_of(2), Plan.by_hand({"small": 0.4}), engine="onnxruntime", example=rows_of(4)
    )
    assert runner(torch.zeros(0, 4)).logits.shape == (0, 3)


def test_no_segment_is_called_when_all_have_left():
    net, models = counting()
    off.open(net, Plan.by_hand({"small": -math.inf}))(rows_of(7))
    assert [model.calls for model in models] == [[7], [], []]


def test_each_member_sees_only_the_rows_that_are_left():
    net, models = counting()
    plan = Plan.by_hand({"small": 0.4, "middle": 0.4})
    trace = off.record(net, rows_of(40).numpy(), timed=False)
    exits = trace.replay(plan).exit
    for model in models:
        model.calls.clear()
    off.open(net, plan)(rows_of(40))
    assert [model.calls for model in models] == [[40], [(exits > 0).sum()], [(exits > 1).sum()]]


@pytest.mark.parametrize(
    ("thresholds", "max_exit", "called"),
    [
        ({"middle": 0.4}, None, {"middle", "large"}),
        ({"small": 0.4}, None, {"small", "large"}),
        ({"small": 0.4, "middle": math.inf}, None, {"small", "large"}),
        ({}, None, {"large"}),
        ({"small": 0.4}, "middle", {"small", "middle"}),
        ({"small": 0.4, "middle": 0.4}, "small", {"small"}),
    ],
)
def test_a_closed_member_is_neither_run_nor_charged(thresholds, max_exit, called):
    net, models = counting()
    trace = off.record(net, rows_of(40).numpy(), timed=False)
    for model in models:
        model.calls.clear()
    plan = Plan.by_hand(thresholds, max_exit=max_exit)
    off.open(net, plan)(rows_of(40))
    ran = {name for name, model in zip(net.topology.exits, models, strict=True) if model.calls}
    assert ran == called
    macs = {name: trace.columns[f"cost/segment/{name}"][0] for name in net.topology.exits}
    assert trace.price(plan).worst == sum(macs[name] for name in called)


def test_a_mean_reads_the_closed_members_before_it():
    models = {
        name: Counting(dense(index)) for index, name in enumerate(("small", "middle", "large"))
    }
    net = ladder(models, answer="mean").eval()
    y = off.open(net, Plan.by_hand({}))(rows_of(5))
    assert [model.calls for model in models.values()] == [[5], [5], [5]]
    torch.testing.assert_close(y.logits, net(rows_of(5))[-1], atol=1e-6, rtol=0)


def test_rows_of_nan_go_to_the_end_and_are_flagged(three):
    x = rows_of(12)
    x[3], x[7, 1] = math.nan, math.inf
    clean = off.run(three, Plan.by_hand({"small": -math.inf}), rows_of(12))
    y = off.run(three, Plan.by_hand({"small": -math.inf}), x)
    assert y.flagged.nonzero().flatten().tolist() == [3, 7]
    assert y.exit.tolist() == [2 if row in (3, 7) else 0 for row in range(12)]
    others = [row for row in range(12) if row not in (3, 7)]
    torch.testing.assert_close(y.logits[others], clean.logits[others], atol=1e-5, rtol=0)
    assert not clean.flagged.any()


def test_a_row_that_one_exit_spoils_is_flagged_and_answered():
    net = ladder_of(3, make=spoiled, seed=3)
    x = rows_of(6, whole=True)
    x[2, 0], x[4, 0] = NAN_MARK, INF_MARK
    y = off.run(net, Plan.by_hand({"small": -math.inf, "middle": -math.inf}), x)
    assert y.exit.tolist() == [0, 0, 1, 0, 1, 0]
    assert y.flagged.nonzero().flatten().tolist() == [2, 4]
    assert y.logits.isfinite().all()


def test_an_answer_that_is_not_finite_is_flagged_where_no_gate_looked(three):
    x = rows_of(4)
    x[1] = math.nan
    for plan in (Plan.by_hand({}), Plan.by_hand({}, max_exit="small")):
        assert off.run(three, plan, x).flagged.tolist() == [False, True, False, False]


def test_only_rows_of_nan(two):
    y = off.run(two, Plan.by_hand({"small": 0.4}), torch.full((3, 4), math.nan))
    assert y.flagged.all()
    assert y.exit.tolist() == [1, 1, 1]


def test_four_threads_share_a_runner(three):
    runner = off.open(three, Plan.by_hand({"small": 0.4, "middle": 0.6}))
    x = rows_of(64)
    want = runner(x)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            rows = torch.from_numpy(rng.permutation(64)[: rng.integers(1, 65)])
            y = runner(x[rows])
            if (
                y.exit.tolist() != want.exit[rows].tolist()
                or (y.logits - want.logits[rows]).abs().max() > 1e-5
            ):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_anytime_is_forward(three):
    x = rows_of(11)
    runner = off.open(three, Plan.by_hand({"small": 0.0}))
    steps = list(runner.anytime(x))
    for index, (step, logits) in enumerate(zip(steps, three(x), strict=True)):
        torch.testing.assert_close(step.logits, logits)
        assert step.exit.tolist() == [index] * 11


def test_anytime_does_no_more_than_is_asked_for():
    net, models = counting()
    next(off.open(net, Plan.by_hand({})).anytime(rows_of(3)))
    assert [model.calls for model in models] == [[3], [], []]


class Clock:
    """A `time.perf_counter` that jumps by `step` seconds at every look."""

    def __init__(self, step):
        self.now = 0.0
        self.step = step

    def __call__(self):
        self.now += self.step
        return self.now


def timed_runner(net, plan, ms, monkeypatch):
    """A runner whose parts all have a 95th percentile of `ms` at any size."""
    from offramp.runtime.measuring import Percentile

    monkeypatch.setattr(
        opening, "percentiles", lambda parts, rows: tuple(Percentile((1,), (ms,)) for _ in parts)
    )
    monkeypatch.setattr(Percentile, "__call__", lambda self, count: self.ms[0])
    return off.open(net, plan, timing_rows=rows_of(4))


@pytest.mark.parametrize(
    ("deadline", "last"),
    [(0.0, 0), (-5.0, 0), (2.0, 0), (10.5, 0), (11.5, 1), (12.5, 2), (1000.0, 2)],
)
def test_deadlines(three, monkeypatch, deadline, last):
    """One look at the clock costs 1 ms and a part needs 10: from 0, member 2 could end at 11,
    member 3 at 12.
    """
    plan = Plan.by_hand({"small": 0.4, "middle": 0.4})
    runner = timed_runner(three, plan, 10.0, monkeypatch)
    x = rows_of(40)
    free = runner(x)
    monkeypatch.setattr(running.time, "perf_counter", Clock(1e-3))
    y = runner(x, deadline_ms=deadline)
    assert y.exit.tolist() == [min(index, last) for index in free.exit.tolist()]
    late = [code == WHY.index("deadline") for code in y.why.tolist()]
    assert late == [index > last for index in free.exit.tolist()]
    every = three(x)
    for row, index in enumerate(y.exit.tolist()):
        torch.testing.assert_close(y.logits[row], every[index][row], atol=1e-5, rtol=0)


def test_a_deadline_with_closed_exits_still_answers(three, monkeypatch):
    runner = timed_runner(three, Plan.by_hand({"middle": math.inf}), 10.0, monkeypatch)
    monkeypatch.setattr(running.time, "perf_counter", Clock(1.0))
    y = runner(rows_of(6), deadline_ms=0.0)
    assert y.exit.tolist() == [2] * 6


def test_a_deadline_flags_rows_that_are_not_finite(three, monkeypatch):
    runner = timed_runner(three, Plan.by_hand({"small": 99.0}), 10.0, monkeypatch)
    monkeypatch.setattr(running.time, "perf_counter", Clock(1.0))
    x = rows_of(4)
    x[1] = math.nan
    y = runner(x, deadline_ms=0.0)
    assert y.flagged.tolist() == [False, True, False, False]
    assert y.reasons() == ["deadline"] * 4


def test_a_deadline_needs_measured_segments(two):
    with pytest.raises(InvalidArgument, match="timing_rows"):
        off.open(two, Plan.by_hand({}))(rows_of(3), deadline_ms=5)


def test_open_with_time_on_measures(two):
    runner = off.open(two, Plan.by_hand({"small": 0.4}), timing_rows=rows_of(4))
    y = runner(rows_of(9), deadline_ms=1e6)
    assert "deadline" not in y.reasons()


def test_arrays_are_taken(two):
    plan = Plan.by_hand({"small": 0.4})
    assert (
        off.run(two, plan, rows_of(6).numpy()).exit.tolist()
        == off.run(two, plan, rows_of(6)).exit.tolist()
    )


def test_gradients_are_left_alone(two):
    off.run(two, Plan.by_hand({"small": 0.4}), rows_of(6).requires_grad_())
    assert all(p.requires_grad and p.grad is None for p in two.parameters())
    assert torch.is_grad_enabled()


class Spoiling(nn.Module):
    """Works in place on what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        x -= x.mean(1, keepdim=True)
        return self.model(x)


def test_a_model_that_works_in_place_on_its_input_spoils_nothing():
    net = ladder({"small": Spoiling(dense(0)), "large": dense(1)}).eval()
    x = rows_of(9)
    kept = x.clone()
    plan = Plan.by_hand({"small": 1e9})
    expected = net.backbone["large"](kept.clone())
    for got in (off.run(net, plan, x).logits, net(x)[-1]):
        torch.testing.assert_close(got, expected)
    trace = off.record(net, x.numpy(), timed=False, progress=False)
    np.testing.assert_allclose(trace.columns["logits/large"], expected.detach(), atol=1e-6)
    assert torch.equal(x, kept)


def test_cutting_a_model_that_works_in_place_leaves_the_example():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    x = rows_of(5)
    kept = x.clone()
    net = off.cut(model, x, at=["2"])
    net(x)
    assert torch.equal(x, kept)


def test_finite_logits_whose_sum_is_not_are_neither_flagged_nor_kept_from_leaving():
    class Masked(nn.Module):
        def forward(self, x):
            low = torch.full((len(x), 2), torch.finfo(torch.float32).min)
            return torch.cat([x, low], 1)

    net = ladder({"small": Masked(), "large": Masked()}).eval()
    x = rows_of(7)
    for plan, index in ((Plan.by_hand({"small": -1e9}), 0), (Plan.by_hand({}), 1)):
        y = off.run(net, plan, x)
        assert y.exit.tolist() == [index] * 7
        assert not y.flagged.any()


class Double(nn.Module):
    """Preprocessing."""

    def forward(self, x):
        return x.double()


def test_members_of_different_precision_answer_in_the_wider():
    net = ladder({"small": dense(0), "large": (dense(1).double(), Double())}).eval()
    x = rows_of(20)
    scores = next(net.walk(x))[2]
    y = off.run(net, Plan.by_hand({"small": scores.median().item()}), x)
    assert y.logits.dtype == torch.float64
    assert set(y.exit.tolist()) == {0, 1}


def test_a_deadline_of_nan_is_refused(two):
    with pytest.raises(
        InvalidArgument, match="deadline_ms must be a number of milliseconds, got nan"
    ):
        off.open(two, Plan.by_hand({}), timing_rows=rows_of(4))(rows_of(2), deadline_ms=math.nan)


SCORES = (-math.inf, -2.0, -0.0, 0.0, 1e-45, 1.0, float(np.float32(0.1)), 3e38, math.inf, math.nan)


def with_fixed_scores(scores, limit) -> Runner:
    """A Runner of two stages whose gate gives these scores [n] for any n rows."""
    net = ladder_of(2)
    plan = Plan.by_hand({"small": limit})
    first, last = kind_of("torch")().open(net, plan.schedule(net.topology), net.device())
    logits = torch.zeros(len(scores), 3)
    one = {first.name + LOGITS: logits, first.name + SCORE: torch.from_numpy(scores)}
    two = {last.name + LOGITS: logits + 1}
    stages = [
        replace(first, functions={"segment": lambda state: one}),
        replace(last, functions={"segment": lambda state: first_rows(two, len(state["x"]))}),
    ]
    return Runner(net, plan, stages, stages, None)


def first_rows(tensors, count):
    return {name: value[:count] for name, value in tensors.items()}


def test_the_walk_takes_every_score_as_choose_does():
    """Every score against every threshold, alone and in a batch with all others."""
    for limit in SCORES[:-2]:
        batches = [np.float32([score]) for score in SCORES]
        batches.append(np.float32(SCORES))
        for scores in batches:
            answers = with_fixed_scores(scores, limit)(torch.zeros(len(scores), 4))
            want = choose(scores[:, None], np.float32([limit]))
            assert answers.exit.tolist() == want.tolist()
            assert answers.logits[:, 0].tolist() == want.tolist()
            assert answers.flagged.tolist() == np.isnan(scores).tolist()
            assert answers.why.tolist() == [GATE if left == 0 else END for left in want]


def test_a_write_through_numpy_is_noticed_within_some_batches():
    """Two tensors of each stage are compared by content after each batch."""
    net = ladder_of(2)
    x = rows_of(3)
    runner = off.open(net, Plan.by_hand({"small": 1e9}))
    tensors = len(list(net.backbone["middle"].parameters()))
    runner(x)
    last = list(net.backbone["middle"].parameters())[-1]
    last.detach().numpy()[...] = 7
    refused = 0
    for _ in range(math.ceil(tensors / STAGE_SAMPLES)):
        try:
            runner(x)
        except StaleRunner:
            refused += 1
    assert refused == 1
