"""A plan as one graph answers as the stages, the replay and `choose` do; where it cannot be had,
print says why.
"""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from compiled import CASES, middling
from offramp.errors import BadNetwork, MissingExtra
from offramp.networks.inputs import as_inputs
from offramp.networks.nodes import Gate
from offramp.plans.plan import Plan, choose
from offramp.plans.provenance import BAND
from offramp.plans.replay import WHY
from offramp.runtime.engine import engine_of
from offramp.runtime.one_graph import NAN_CODE, Coded, OneGraph, farthest
from small import INF_MARK, NAN_MARK, ladder_of, rows_of, spoiled, whole_numbers

VALUES = (-math.inf, -2.0, -0.0, 0.0, 1e-45, 1.0, float(np.float32(0.1)), 3e38, math.inf, math.nan)
PLANS = 30
POOL = 96


@pytest.fixture(autouse=True)
def installed():
    """These tests need ONNX Runtime and what writes graphs."""
    pytest.importorskip("onnxscript")
    try:
        engine_of("onnxruntime")
    except MissingExtra as problem:
        pytest.skip(str(problem))


class First(Gate):
    """The first number of a row is its score."""

    def score(self, seen):
        return seen.features[:, 0]

    def config(self):
        return {"name": "tests:First"}


class Once(nn.Module):
    """Rows times one: their values, whatever these are."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.one


class Passing(nn.Module):
    """Gives its rows on, and finite logits whatever they hold."""

    def __init__(self):
        super().__init__()
        self.body = Once()
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x).nan_to_num(0, 0, 0))


class Steady(off.Exit):
    """Logits that no row changes."""

    def forward(self, seen):
        return torch.zeros_like(seen.features).nan_to_num(0, 0, 0) + torch.tensor([0.0, 2.0, 1.0])

    def config(self):
        return {"name": "tests:Steady"}


@pytest.mark.parametrize("limit", VALUES[:-2])
def test_every_score_is_decided_as_choose_decides_it(limit):
    """Ties, NaN, both infinities and both zeros, alone and together."""
    scores = np.float32(VALUES)
    x = np.zeros((len(scores), 3), np.float32)
    x[:, 0] = scores
    net = scored()
    runner = off.open(net, Plan.by_hand({"body": limit}), engine="onnxruntime", example=x)
    wanted = choose(scores[:, None], np.float32([limit]))
    for rows in (np.arange(len(x)), *np.arange(len(x))[:, None]):
        y = runner(x[rows])
        assert isinstance(y, Coded)
        assert y.exit.tolist() == wanted[rows].tolist()
        assert y.flagged.tolist() == np.isnan(scores[rows]).tolist()
        assert [WHY[code] for code in y.why] == [
            "gate" if one == 0 else "end" for one in wanted[rows]
        ]


def scored():
    """One network for all thresholds: its graphs are written once."""
    if not SCORED:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            SCORED.append(
                off.cut(
                    Passing().eval(),
                    rows_of(4)[:, :3],
                    at=["body"],
                    exits=lambda *_: Steady(),
                    gate=First(),
                )
            )
    return SCORED[0]


SCORED: list[off.Network] = []


def threshold(rng, scores) -> float:
    """+-inf, a score itself, or the middle of two."""
    finite = scores[np.isfinite(scores)]
    kind = rng.integers(0, 6)
    if kind == 0:
        return float(rng.choice([math.inf, -math.inf]))
    a, b = rng.choice(finite, 2)
    return float(a if kind < 3 else (a + b) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("make", [whole_numbers, spoiled])
def test_it_equals_the_replay(make):
    net = ladder_of(3, make=make, seed=3)
    x = rows_of(POOL, whole=True, seed=7)
    x[5], x[17, 0], x[30, 0], x[31, 0] = x[6], NAN_MARK, INF_MARK, NAN_MARK
    trace = off.record(net, x.numpy(), timed=False, batch_size=POOL)
    rng = np.random.default_rng(1)
    graphs = 0
    for _ in range(PLANS):
        chosen = {
            gate: threshold(rng, trace.columns[f"score/{gate}"]) for gate in trace.topology.gates
        }
        if rng.random() < 0.3:
            max_exit = rng.choice([None, *trace.topology.exits])
        else:
            max_exit = None
        plan = Plan.by_hand(chosen, max_exit=max_exit)
        runner = off.open(net, plan, engine="onnxruntime", example=x)
        eager = off.open(net, plan)
        whole = trace.replay(plan)
        for size in (1, 2, 64):
            rows = rng.permutation(POOL)[:size]
            y = runner(x[rows])
            want = eager(x[rows])
            graphs += isinstance(y, Coded)
            assert y.exit.tolist() == want.exit.tolist() == whole.exit[rows].tolist()
            assert y.why.tolist() == want.why.tolist() == whole.why[rows].tolist()
            assert y.flagged.tolist() == want.flagged.tolist()
            torch.testing.assert_close(y.logits, want.logits, atol=BAND, rtol=0, equal_nan=True)
    assert graphs > PLANS


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_network_runs_in_one(case):
    make, rows = CASES[case]
    net = make()
    plan = middling(net, rows(64))
    runner = off.open(net, plan, engine="onnxruntime", example=rows(64))
    assert "in one graph on onnxruntime" in repr(runner)
    assert "compared with the stages one by one on 64 rows" in repr(runner)
    eager = off.open(net, plan)
    for size in (0, 1, 7, 64):
        got = runner(rows(size))
        want = eager(rows(size))
        assert isinstance(got, Coded) == bool(size)
        assert got.exit.tolist() == want.exit.tolist()
        torch.testing.assert_close(got.logits, want.logits, atol=BAND, rtol=1e-5, equal_nan=True)


def test_without_an_open_gate_it_runs_stage_by_stage_and_says_so():
    net = ladder_of(2)
    x = rows_of(6)
    runner = off.open(net, Plan.by_hand({}), engine="onnxruntime", example=x)
    assert "one after the other on onnxruntime" in repr(runner)
    assert "the plan has no open gate" in repr(runner)
    assert "one after the other on torch" in repr(off.open(net, Plan.by_hand({})))


def test_a_deadline_runs_stage_by_stage():
    net = ladder_of(2)
    x = rows_of(6)
    plan = Plan.by_hand({"small": 0.5})
    runner = off.open(net, plan, engine="onnxruntime", example=x, timing_rows=x)
    assert isinstance(runner(x), Coded)
    timely = runner(x, deadline_ms=1e6)
    assert not isinstance(timely, Coded)
    assert timely.exit.tolist() == runner(x).exit.tolist()
    assert runner(x, deadline_ms=0.0).exit.tolist() == [0] * 6


def test_an_operator_that_one_graph_lacks_is_named_and_stages_run_instead(monkeypatch):
    net = ladder_of(2)
    x = rows_of(6)
    kind = type(engine_of("onnxruntime")[0])

    def refused(*_):
        raise BadNetwork("it has no implementation of the operator Conv (opset 11) for these types")

    monkeypatch.setattr(kind, "in_one", refused)
    runner = off.open(net, Plan.by_hand({"small": 0.5}), engine="onnxruntime", example=x)
    assert "one after the other on onnxruntime" in repr(runner)
    assert "operator Conv" in repr(runner)
    assert runner(x).exit.tolist() == off.run(net, runner.plan, x).exit.tolist()


def test_an_operator_that_the_runtime_lacks_in_one_graph_is_named_by_itself(monkeypatch):
    """The runtime refuses a real graph here; stages run instead, and answer the same."""
    from onnx import TensorProto, helper

    engine = import_module("offramp.engines.onnxruntime")
    whole = engine.lowered

    def with_cosh(*args):
        graph = whole(*args)
        graph.model.graph.initializer.append(
            helper.make_tensor("doubles", TensorProto.DOUBLE, [1], [1.0])
        )
        graph.model.graph.node.append(helper.make_node("Cosh", ["doubles"], ["cosh"]))
        graph.model.graph.output.append(
            helper.make_tensor_value_info("cosh", TensorProto.DOUBLE, [1])
        )
        return graph

    monkeypatch.setattr(engine, "lowered", with_cosh)
    net = ladder_of(2)
    x = rows_of(6)
    runner = off.open(net, Plan.by_hand({"small": 0.5}), engine="onnxruntime", example=x)
    assert "one after the other on onnxruntime" in repr(runner)
    assert "one graph cannot run: it has no implementation of the operator Cosh" in repr(runner)
    assert runner(x).exit.tolist() == off.run(net, runner.plan, x).exit.tolist()


@pytest.mark.parametrize("spoilt", ["logits", "way", "flag"])
def test_a_graph_that_answers_otherwise_is_refused(spoilt):
    """Beyond the float band of the stages, on any row at hand."""
    net = ladder_of(2)
    x = rows_of(20)
    plan = middling(net, x)
    runner = off.open(net, plan, engine="onnxruntime", example=x)
    graph = runner._quick
    lean = runner._lean
    parts = runner._engine_stages
    assert farthest(graph, lean, parts, as_inputs(x), BAND) <= BAND

    def run(given):
        logits, codes = (value.copy() for value in graph._run(given))
        if spoilt == "logits":
            logits[3] += 1
        elif spoilt == "way":
            codes[3] = 1 - codes[3]
        else:
            codes[3] += NAN_CODE
        return [logits, codes]

    other = OneGraph(run, lean, parts)
    with pytest.raises(BadNetwork, match=r"from those of the stages|leave elsewhere|flags other"):
        farthest(other, lean, parts, as_inputs(x), BAND)
