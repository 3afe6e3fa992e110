"""`run` equals `trace.replay`, over many random plans and batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import offramp as off
from offramp.building.cutting import cut, ladder
from offramp.networks.nodes import Gate
from offramp.plans.plan import BAND, Plan
from offramp.plans.replay import WHY
from offramp.plans.trace import Trace
from small import INF_MARK, NAN_MARK, dense, ladder_of, moved, rows_of, spoiled, whole_numbers

BATCHES = 4
POOL = 96


class Reader(Gate):
    """The own margin plus the sum of an earlier exit's logits: a gate with history."""

    def __init__(self, before):
        super().__init__()
        self.reads = (before,)

    def score(self, seen):
        two = seen.own.topk(2, dim=-1).values
        return two[:, 0] - two[:, 1] + seen.logits[self.reads[0]].sum(-1)

    def config(self):
        return {"name": "Reader", "before": self.reads[0]}


CASES = {
    "two, whole numbers": lambda: (ladder_of(2, make=whole_numbers, seed=1), True),
    "four, whole numbers": lambda: (ladder_of(4, make=whole_numbers, seed=2), True),
    "three, spoiled": lambda: (ladder_of(3, make=spoiled, seed=3), True),
    "three, a gate that reads": lambda: (
        ladder_of(
            3, make=whole_numbers, seed=4, gate={"small": "margin", "middle": Reader("small")}
        ),
        True,
    ),
    "three, floats": lambda: (ladder_of(3, seed=5), False),
    "three, mean": lambda: (ladder_of(3, seed=6, answer="mean"), False),
    "three, entropy": lambda: (ladder_of(3, seed=7, gate="neg_entropy"), False),
    "one model, cut": lambda: (
        moved(cut(dense(2), rows_of(4), at=["0", "1"], exits="linear")),
        False,
    ),
    "a cut member": lambda: (
        ladder({"small": moved(cut(dense(1), rows_of(4), at="1")), "large": dense(3)}),
        False,
    ),
}


def pool_of(whole: bool, seed: int) -> torch.Tensor:
    x = rows_of(POOL, whole=whole, seed=seed)
    if whole:
        x[5], x[17, 0], x[30, 0], x[31, 0] = x[6], NAN_MARK, INF_MARK, NAN_MARK
    return x


def threshold(rng, scores) -> float:
    """+-inf, a score, the middle of two, or anything."""
    finite = scores[np.isfinite(scores)]
    kind = rng.integers(0, 6)
    if kind == 0:
        return math.inf
    if kind == 1 and rng.random() < 0.5:
        return -math.inf
    a, b = rng.choice(finite, 2)
    return float(a if kind < 4 else (a + b) / 2)


def plan_for(rng, trace: Trace) -> Plan:
    gates = [gate for gate in trace.topology.gates if rng.random() < 0.9]
    chosen = {gate: threshold(rng, trace.columns[f"score/{gate}"]) for gate in gates}
    return Plan.by_hand(
        chosen, max_exit=rng.choice([None, *trace.topology.exits]) if rng.random() < 0.4 else None
    )


def off_band(trace: Trace, plan: Plan) -> np.ndarray:
    """Rows no score of which lies within the float band of a threshold."""
    far = np.ones(len(trace), bool)
    for gate in plan.open_gates():
        far &= ~(
            np.abs(trace.columns[f"score/{gate}"].astype(float) - plan.thresholds[gate][0]) <= BAND
        )
    return far


# 9 networks with 80 plans and 4 batches are 2,880 comparisons; the slow tests make 14,400.
@pytest.mark.parametrize("plans", [80, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_run_equals_replay(case, plans):
    net, exact = CASES[case]()
    x = pool_of(exact, seed=len(case))
    trace = off.record(net, x.numpy(), timed=False, batch_size=POOL)
    rng = np.random.default_rng(len(case))
    left = 0
    compared = 0
    reasons = set()
    for number in range(plans):
        plan = plan_for(rng, trace)
        runner = off.open(net, plan)
        whole = trace.replay(plan)
        sure = np.ones(POOL, bool) if exact else off_band(trace, plan)
        for _ in range(BATCHES):
            rows = rng.permutation(POOL)[: rng.integers(0, 65)]
            y = runner(x[rows])
            assert len(y.exit) == len(y.logits) == len(y.flagged) == len(rows)
            at = sure[rows]
            assert (y.exit.numpy()[at] == whole.exit[rows][at]).all(), (number, plan)
            assert (y.why.numpy()[at] == whole.why[rows][at]).all(), (number, plan)
            if len(rows):
                answers = y.logits.numpy().argmax(1)
                assert (answers[at] == whole.answer[rows][at]).all(), (number, plan)
            left += int((y.why == 0).sum())
            compared += int(at.sum())
            reasons |= set(y.why.tolist())
    assert compared > 0.5 * plans * BATCHES * 30
    assert left > 0.1 * compared
    assert reasons == {WHY.index("gate"), WHY.index("end"), WHY.index("deepest")}


def test_whole_numbers_tie_and_are_spoiled():
    """The networks of the property do reach the cases that it is about."""
    net, _ = CASES["three, spoiled"]()
    trace = off.record(net, pool_of(True, 0).numpy(), timed=False)
    scores = trace.columns["score/small"]
    assert np.isnan(scores).sum() == 3
    assert len(np.unique(scores[np.isfinite(scores)])) < 0.5 * POOL
    assert not np.isfinite(trace.columns["logits/small"][30]).all()


def test_the_trace_does_not_depend_on_the_batch_size(three):
    x = rows_of(50)
    one, many = (off.record(three, x.numpy(), timed=False, batch_size=size) for size in (1, 50))
    assert one.columns.keys() == many.columns.keys()
    for name, column in one.columns.items():
        np.testing.assert_allclose(column, many.columns[name], atol=1e-5)
