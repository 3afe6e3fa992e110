"""The loop on arrays gives what the walk and the replay give, for any plan and batch, and leaves
the rest to them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import offramp as off
from offramp.networks.network import LOGITS, SCORE
from offramp.plans.plan import Plan, choose
from offramp.plans.replay import WHY
from offramp.plans.schedule import full_schedule
from offramp.runtime.engine import kind_of
from offramp.runtime.lean import (
    LeanChain,
    OnArrays,
    Wanted,
    lean_chain,
    leaves,
    leaving,
    staying,
)
from offramp.runtime.outputs import END, GATE, Unpacked
from offramp.runtime.programs import read_by
from offramp.runtime.running import Runner
from small import INF_MARK, NAN_MARK, ladder_of, rows_of, spoiled, whole_numbers

PLANS = 150
BATCHES = 6
POOL = 96
VALUES = (-math.inf, -2.0, -0.0, 0.0, 1e-45, 1.0, float(np.float32(0.1)), 3e38, math.inf, math.nan)


class Arrays:
    """A piece that runs a part of torch on arrays: what an engine with arrays gives, without the
    engine.
    """

    def __init__(self, part, x):
        self.part = part
        self.reads = read_by(part, x)
        self.inputs = {
            name: Wanted(x[name].dtype, tuple(x[name].shape[1:]))
            for name in self.reads
            if name in x
        }

    def __call__(self, state):
        given = {name: state[name] for name in self.reads}
        with torch.inference_mode():
            self.part.call(given)
        return {name: given[name] for name in self.part.writes}

    def on_arrays(self):
        return OnArrays(self.reads, self.part.writes, self.run, self.inputs)

    def run(self, given):
        assert set(given) == set(self.reads)
        found = self({name: torch.from_numpy(value) for name, value in given.items()})
        return [found[name].clone().numpy() for name in self.part.writes]


def opened(net, plan, x) -> Runner:
    """A Runner on arrays. x: named inputs."""
    engine = kind_of("torch")()
    every = engine.open(net, full_schedule(net.topology), net.device())
    parts = engine.open(net, plan.schedule(net.topology), net.device())
    on_arrays = [replace(part, functions={"segment": Arrays(part, x)}) for part in parts]
    return Runner(net, plan, on_arrays, every, None, own_threads=True)


def threshold(rng, scores) -> float:
    """+-inf, a score itself, or the middle of two."""
    finite = scores[np.isfinite(scores)]
    kind = rng.integers(0, 5)
    if kind == 0:
        return float(rng.choice([math.inf, -math.inf]))
    a, b = rng.choice(finite, 2)
    return float(a if kind < 3 else (a + b) / 2)


@pytest.mark.parametrize("limit", VALUES[:-2])
def test_rows_stay_as_choose_says(limit):
    """Ties, NaN, both infinities and both zeros."""
    scores = np.float32(VALUES)
    successors = choose(scores[:, None], np.float32([limit]))
    threshold = float(np.float32(limit))
    assert staying(scores, threshold).tolist() == np.flatnonzero(successors).tolist()
    assert leaving(scores, threshold).tolist() == np.flatnonzero(successors == 0).tolist()
    for score, successor in zip(scores.tolist(), successors, strict=True):
        assert leaves(score, threshold) == (successor == 0)


@pytest.mark.parametrize("make", [whole_numbers, spoiled])
def test_it_equals_the_replay(make):
    net = ladder_of(3, make=make, seed=3)
    x = rows_of(POOL, whole=True, seed=7)
    x[5], x[17, 0], x[30, 0], x[31, 0] = x[6], NAN_MARK, INF_MARK, NAN_MARK
    trace = off.record(net, x.numpy(), timed=False, batch_size=POOL)
    rng = np.random.default_rng(0)
    reasons = set()
    for _ in range(PLANS):
        gates = [gate for gate in trace.topology.gates if rng.random() < 0.9]
        chosen = {gate: threshold(rng, trace.columns[f"score/{gate}"]) for gate in gates}
        if rng.random() < 0.3:
            max_exit = rng.choice([None, *trace.topology.exits])
        else:
            max_exit = None
        plan = Plan.by_hand(chosen, max_exit=max_exit)
        runner = opened(net, plan, {"x": x})
        assert runner._lean is not None
        eager = off.open(net, plan)
        whole = trace.replay(plan)
        sizes = [1, 2, *rng.integers(1, 65, BATCHES - 2)]
        for size in sizes:
            rows = rng.permutation(POOL)[:size]
            y = runner._lean(x[rows])
            want = eager(x[rows])
            assert isinstance(y, Unpacked)
            assert y.exit.tolist() == want.exit.tolist() == whole.exit[rows].tolist()
            assert y.why.tolist() == want.why.tolist() == whole.why[rows].tolist()
            assert y.flagged.tolist() == want.flagged.tolist()
            torch.testing.assert_close(y.logits, want.logits, atol=0, rtol=0, equal_nan=True)
            reasons |= set(y.why.tolist())
    assert reasons == {WHY.index("gate"), WHY.index("end"), WHY.index("deepest")}


def test_a_loop_by_hand_takes_every_value_as_choose_does():
    """One gate, one row: every score against every threshold, at batch 1 and among others."""
    for score, limit in itertools.product(VALUES, VALUES[:-1]):
        gate = float(np.float32(limit))
        if gate == math.inf:
            continue  # such a gate is closed, and no stage has it
        for count in (1, 3):
            scores = np.full(count, score, np.float32)
            steps = chain_of(scores, gate)
            answers = steps(torch.zeros(count, 2))
            want = choose(scores[:, None], np.float32([gate]))
            assert answers.exit.tolist() == want.tolist()
            assert answers.flagged.tolist() == np.isnan(scores).tolist()
            assert answers.why.tolist() == [GATE if left == 0 else END for left in want]


def chain_of(scores, limit) -> LeanChain:
    """Two stages that give fixed scores and logits."""
    net = ladder_of(2)
    plan = Plan.by_hand({"small": limit})
    first, last = kind_of("torch")().open(net, plan.schedule(net.topology), net.device())
    inputs = {"x": Wanted(torch.float32, (2,))}

    class Fixed:
        def __init__(self, part, found):
            self.part = part
            self.found = found

        def __call__(self, state):
            raise AssertionError("the loop runs on arrays")

        def on_arrays(self):
            reads = ("x",)
            writes = tuple(self.found)
            return OnArrays(
                reads,
                writes,
                lambda given: [value[: len(given["x"])].copy() for value in self.found.values()],
                inputs,
            )

    logits = np.zeros((len(scores), 3), np.float32)
    one = {first.name + LOGITS: logits, first.name + SCORE: scores}
    two = {last.name + LOGITS: logits + 1}
    parts = [
        replace(first, functions={"segment": Fixed(first, one)}),
        replace(last, functions={"segment": Fixed(last, two)}),
    ]
    found = lean_chain(net.topology, parts)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 4),
        torch.zeros(4),
        torch.zeros(3, 5),
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(3, 4, requires_grad=True),
        torch.zeros(3, 4).to_sparse(),
        {"x": torch.zeros(3, 4)},
        (torch.zeros(3, 4),),
        [[0.0] * 4],
        None,
    ],
)
def test_what_was_not_compiled_for_is_left_to_the_walk(x):
    runner = opened(ladder_of(2), Plan.by_hand({"small": 0.5}), {"x": rows_of(4)})
    assert runner._lean is not None
    assert runner._lean(x) is None


def test_arrays_and_tensors_give_the_same():
    net = ladder_of(2)
    x = rows_of(20)
    runner = opened(net, Plan.by_hand({"small": 0.5}), {"x": x})
    one = runner(x)
    other = runner(x.numpy())
    assert torch.equal(one.logits, other.logits)
    assert one.exit.tolist() == other.exit.tolist() == off.run(net, runner.plan, x).exit.tolist()


def test_answers_do_not_share_memory_with_the_next_ones():
    net = ladder_of(2)
    x = rows_of(20)
    runner = opened(net, Plan.by_hand({"small": 0.5}), {"x": x})
    first = runner(x)
    kept = first.logits.clone()
    runner(rows_of(20, seed=5))
    assert torch.equal(first.logits, kept)


def test_a_stage_that_fails_is_told_by_the_walk():
    net = ladder_of(2)
    x = rows_of(4)
    runner = opened(net, Plan.by_hand({"small": 0.5}), {"x": x})
    want = off.open(net, runner.plan)(x)

    def broken(_):
        raise RuntimeError("a runtime's own words")

    runner._lean._steps = tuple(replace(step, run=broken) for step in runner._lean._steps)
    torch.testing.assert_close(runner(x).logits, want.logits)
