"""Engines that compile run every network like the eager engine: same logits, same exits, for any
batch.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from compiled import CASES, SIZES, middling
from offramp.building.factories import make_gate
from offramp.errors import BadData, BadNetwork, InvalidArgument, Mismatch, MissingExtra, StaleRunner
from offramp.gates.tempered import Tempered
from offramp.networks.nodes import Gate
from offramp.plans.plan import BAND, Plan
from offramp.runtime import graphs
from offramp.runtime.engine import engine_of, kind_of
from small import cut_of, dense, images_of, ladder_of, rows_of, seeded
from texts import encoder, texts

ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(params=ENGINES)
def engine(request):
    pytest.importorskip("onnxscript")
    try:
        engine_of(request.param)
    except MissingExtra as problem:
        pytest.skip(str(problem))
    return request.param


def close(got, want):
    torch.testing.assert_close(got, want, atol=BAND, rtol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_answers_as_torch_does(engine, case):
    make, rows = CASES[case]
    net = make()
    plan = middling(net, rows(64))
    mine = off.open(net, plan, engine=engine, example=rows(64))
    eager = off.open(net, plan)
    left = set()
    for size in SIZES:
        x = rows(size)
        got = mine(x)
        want = eager(x)
        close(got.logits, want.logits) if size else None
        assert len(got.logits) == size
        assert got.exit.tolist() == want.exit.tolist()
        assert got.why.tolist() == want.why.tolist()
        assert got.flagged.tolist() == want.flagged.tolist()
        left |= set(got.exit.tolist())
    assert left == set(range(len(net.topology.exits)))
    for one, other in zip(mine.anytime(rows(7)), eager.anytime(rows(7)), strict=True):
        close(one.logits, other.logits)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ladder", "cut, in place"])
def test_run_equals_replay(engine, case):
    make, rows = CASES[case]
    net = make()
    x = rows(96)
    trace = off.record(net, x.numpy(), timed=False, engine=engine, progress=False)
    eager = off.record(net, x.numpy(), timed=False, progress=False)
    for name, column in eager.columns.items():
        np.testing.assert_allclose(trace.columns[name], column, atol=BAND, err_msg=name)
    assert trace.header.origin.engine == engine_of(engine)[1]
    assert trace.header.origin.engine.startswith(engine + " ")
    rng = np.random.default_rng(0)
    for _ in range(12):
        chosen = {
            gate: float(rng.choice(trace.columns[f"score/{gate}"])) + 0.01
            for gate in net.topology.gates
        }
        plan = Plan(
            thresholds={gate: (t,) for gate, t in chosen.items()}, origin=trace.header.origin
        )
        sure = np.ones(len(x), bool)
        for gate, t in chosen.items():
            sure &= np.abs(trace.columns[f"score/{gate}"] - t) > BAND
        picks = rng.permutation(len(x))[: rng.integers(1, 65)]
        got = off.open(net, plan, engine=engine)(x[picks])
        want = trace.replay(plan)
        at = sure[picks]
        assert at.any()
        assert (got.exit.numpy()[at] == want.exit[picks][at]).all()
        assert (got.logits.numpy().argmax(1)[at] == want.answer[picks][at]).all()


def every_turn(runner, x):
    """Until every module has been looked at."""
    for _ in range(runner.check_period):
        runner(x)


def test_nothing_is_compiled_while_serving(engine, monkeypatch):
    """Rows of another shape or type are refused by a Runner; `run` opens again for them."""
    net = off.ladder({"a": Summing(2), "b": Summing(3)}).eval()
    x = rows_of(6)
    plan = Plan.by_hand({"a": 0.5})
    runner = off.open(net, plan, engine=engine, example=x)
    want = runner(x)
    assert [len(steps.logits) for steps in runner.anytime(x)] == [6, 6]
    with monkeypatch.context() as patched:
        patched.setattr(graphs, "written", lambda *_: pytest.fail("written while serving"))
        for other in (x[:, :3], x.double()):
            with pytest.raises(BadData, match=r"compiled for rows of .*float32 .*example="):
                runner(other)
        close(runner(x.numpy()).logits, want.logits)
    for other in (x[:, :3], x):
        close(off.run(net, plan, other, engine=engine).logits, off.run(net, plan, other).logits)


class Summing(nn.Module):
    """Takes rows of any width."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.head = seeded(lambda: nn.Linear(1, 3), seed)

    def forward(self, x):
        return self.head(x.sum(1, keepdim=True))


def test_a_plan_of_another_engine_is_refused(engine):
    net = ladder_of(2)
    x = rows_of(30).numpy()
    theirs = off.record(net, x, timed=False, engine=engine, progress=False).header.origin
    mine = off.record(net, x, timed=False, progress=False).header.origin
    for origin, asked in (
        (theirs, "torch"),
        (mine, engine),
        (replace(theirs, engine=f"{engine} 0.1"), engine),
    ):
        with pytest.raises(Mismatch, match="Record and calibrate this one"):
            off.open(net, Plan(thresholds={"small": (0.5,)}, origin=origin), engine=asked)
    probe = replace(
        theirs.probe, logits=tuple(tuple((9.0,) * 3 for _ in rows) for rows in theirs.probe.logits)
    )
    with pytest.raises(Mismatch, match="probe"):
        off.open(
            net,
            Plan(thresholds={"small": (0.5,)}, origin=replace(theirs, probe=probe)),
            engine=engine,
        )


@pytest.mark.slow
def test_changed_weights_are_noticed_and_used_when_opened_again(engine):
    net = cut_of()
    x = images_of(5)
    plan = Plan.by_hand({})
    runner = off.open(net, plan, engine=engine)
    before = runner(x).logits
    with torch.no_grad():
        net.backbone.head.weight.mul_(2)
    with pytest.raises(StaleRunner, match="open again"):
        every_turn(runner, x)
    after = off.run(net, plan, x, engine=engine).logits
    close(after, net(x)[-1])
    assert (after - before).abs().max() > 0.01


def answered_by(runner, x):
    with contextlib.suppress(StaleRunner):
        return runner(x).logits
    return None


def trained(module):
    with torch.no_grad():
        [value.mul_(2) for value in module.parameters()]


AT_ONCE = {"all of it": lambda net: trained(net), "training mode": lambda net: net.train()}
IN_TURN = {
    "an exit": lambda net: trained(net.exits["stem"]),
    "another exit": lambda net: net.exits.__setattr__("stem", nn.Identity().eval()),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", AT_ONCE)
def test_what_changes_as_a_whole_is_noticed_at_the_next_batch(engine, change):
    net = cut_of()
    x = images_of(5)
    runner = off.open(net, Plan.by_hand({"stem": 1e9}), engine=engine)
    runner(x)
    AT_ONCE[change](net)
    with pytest.raises(StaleRunner, match="open again"):
        runner(x)


@pytest.mark.slow
@pytest.mark.parametrize("change", IN_TURN)
def test_an_exit_is_noticed_within_the_turns(engine, change):
    net = cut_of()
    x = images_of(5)
    runner = off.open(net, Plan.by_hand({"stem": 1e9}), engine=engine)
    runner(x)
    IN_TURN[change](net)
    with pytest.raises(StaleRunner, match="open again"):
        every_turn(runner, x)


@pytest.mark.slow
def test_a_layer_in_the_middle_is_noticed_within_the_turns_and_by_a_check_at_once(engine):
    """Until then the answers are those of the network as it was opened: the engine has its own
    copies.
    """
    net = cut_of()
    x = images_of(5)
    runner = off.open(net, Plan.by_hand({}), engine=engine)
    before = runner(x).logits
    trained(net.backbone.blocks[0])
    with pytest.raises(StaleRunner):
        runner.check()
    answered = [
        answer
        for answer in (answered_by(runner, x) for _ in range(runner.check_period))
        if answer is not None
    ]
    assert len(answered) < runner.check_period
    for answer in answered:
        close(answer, before)


@pytest.mark.slow
def test_what_a_plan_does_not_run_is_neither_in_its_graphs_nor_charged(engine):
    net = cut_of()
    x = images_of(5)
    shelved = kind_of(engine)()
    schedule = Plan.by_hand({"blocks.0": 0.1}).schedule(net.topology)
    engine_stages = shelved.open(net, schedule, net.device())
    state = {"x": x}
    for engine_stage in engine_stages:
        with torch.inference_mode():
            engine_stage.call(state)
    assert set(state) == {
        "x",
        "blocks.0",
        "blocks.0/logits",
        "blocks.0/score",
        "backbone",
        "backbone/logits",
    }


@pytest.mark.slow
@pytest.mark.parametrize("gates", [(), ("stem",), ("blocks.0",)])
def test_a_node_where_nothing_is_asked_is_in_the_graph_of_the_next(gates):
    net = cut_of()
    x = images_of(9)
    scores = {
        name: score.detach().sort().values for name, _, score in net.walk(x) if score is not None
    }
    plan = Plan.by_hand({gate: scores[gate][4:6].mean().item() for gate in gates})
    engine_stages = kind_of("onnxruntime")().open(net, plan.schedule(net.topology), net.device())
    assert [engine_stage.name for engine_stage in engine_stages] == [*gates, "backbone"]
    assert sorted(
        name for engine_stage in engine_stages for name in engine_stage.stage.nodes
    ) == sorted(net.topology.exits)
    got = off.open(net, plan, engine="onnxruntime")(x)
    want = off.open(net, plan)(x)
    close(got.logits, want.logits)
    assert got.exit.tolist() == want.exit.tolist()


@pytest.mark.slow
def test_a_node_that_is_passed_is_watched(engine):
    net = cut_of()
    x = images_of(5)
    runner = off.open(net, Plan.by_hand({}), engine=engine)
    runner(x)
    with torch.no_grad():
        next(net.backbone.stem.parameters()).mul_(2)
    with pytest.raises(StaleRunner, match="open again"):
        every_turn(runner, x)


@pytest.mark.slow
def test_multiply_adds_are_those_of_torch(engine):
    net = ladder_of(2)
    x = rows_of(8).numpy()
    mine = off.record(net, x, engine=engine, progress=False).columns
    eager = off.record(net, x, timed=False, progress=False).columns
    costs = [name for name in eager if name.startswith("cost/")]
    assert {name: mine[name][0] for name in costs} == {name: eager[name][0] for name in costs}
    assert all(np.isfinite(mine[name]).all() for name in costs)
    assert mine["cost/segment/middle"][1:].sum() > 0
    assert mine["cost/exit/middle"][1:].sum() == 0


class Strange(Gate):
    """Uses an operator that ONNX does not have."""

    def score(self, seen):
        return torch.special.bessel_j0(seen.own).sum(-1)

    def config(self):
        return {"name": "tests:Strange"}


class Turning(Gate):
    """Uses an operator that ONNX has and OpenVINO has not."""

    def score(self, seen):
        return torch.linalg.det(seen.own[:, :, None] * seen.own[:, None, :])

    def config(self):
        return {"name": "tests:Turning"}


def test_an_operator_that_cannot_be_written_is_named_with_its_segment(engine):
    net = ladder_of(2, gate=Strange())
    with pytest.raises(
        BadNetwork, match=r"segment 'small' cannot .*bessel_j0.*engine='torch'"
    ) as caught:
        off.run(net, Plan.by_hand({"small": 0.4}), rows_of(4), engine=engine)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_an_operator_that_openvino_has_not_is_named_with_its_segment():
    net = ladder_of(2, gate=Turning())
    with pytest.raises(
        BadNetwork, match=r"segment 'small' cannot run on OpenVINO: .*operator Det .*engine='torch'"
    ):
        off.run(net, Plan.by_hand({"small": 0.4}), rows_of(4), engine="openvino")


@pytest.mark.slow
def test_rows_with_nan_go_to_the_end_and_are_flagged_and_no_row_is_written_to(engine):
    net = cut_of()
    x = images_of(6)
    x[1, 0, 0, 0], x[2] = torch.nan, torch.nan
    before = x.clone()
    plan = Plan.by_hand(dict.fromkeys(net.topology.gates, -1e9))
    got = off.run(net, plan, x, engine=engine)
    want = off.run(net, plan, before)
    assert got.exit.tolist() == want.exit.tolist() == [0, 2, 2, 0, 0, 0]
    assert got.flagged.tolist() == want.flagged.tolist()
    close(got.logits, want.logits)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.slow
def test_any_number_of_threads_may_call_at_once(engine):
    net = cut_of()
    x = images_of(40)
    runner = off.open(net, middling(net, x), engine=engine)
    sizes = [1, 3, 7, 40] * 6
    want = {size: runner(x[:size]).logits for size in set(sizes)}
    with ThreadPoolExecutor(4) as pool:
        for size, got in zip(sizes, pool.map(lambda size: runner(x[:size]), sizes), strict=True):
            torch.testing.assert_close(got.logits, want[size])


def test_a_type_that_onnxruntime_has_no_kernel_for():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = off.ladder({"a": nn.Sequential(nn.Linear(4, 3)).eval(), "b": dense(2)}).to(torch.bfloat16)
    with pytest.raises(
        BadNetwork, match=r"segment 'a' cannot run on ONNX Runtime: .*(opset|operator)"
    ):
        off.run(net, Plan.by_hand({"a": 0.4}), rows_of(4).bfloat16(), engine="onnxruntime")


def test_rows_that_do_not_fit(engine):
    net = ladder_of(2)
    with pytest.raises(BadData, match="give rows of its shape and type"):
        off.run(net, Plan.by_hand({"small": 0.4}), torch.zeros(3, 5), engine=engine)


@pytest.mark.parametrize("package", ENGINES)
def test_a_package_that_is_missing_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'offramp\[{package}\]'"):
        off.open(ladder_of(2), Plan.by_hand({}), engine=package)


def test_writing_graphs_needs_onnxscript(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match="onnxscript"):
        off.run(ladder_of(2), Plan.by_hand({}), rows_of(3), engine=engine)


def test_another_device_is_refused(engine):
    shelved = kind_of(engine)()
    with pytest.raises(InvalidArgument, match="must be on the cpu"):
        shelved.open(ladder_of(2), (), torch.device("meta"))


def test_threads_are_those_of_torch(monkeypatch):
    package = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    seen = []
    whole = package.InferenceSession

    def session(model, options, **others):
        seen.append((options.intra_op_num_threads, options.inter_op_num_threads))
        return whole(model, options, **others)

    monkeypatch.setattr(package, "InferenceSession", session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    off.run(ladder_of(2), Plan.by_hand({}), rows_of(3), engine="onnxruntime")
    assert set(seen) == {(2, 1)}


@pytest.mark.slow
def test_a_process_with_one_pool_for_all_sessions_runs_too():
    """That pool cannot be taken away again, so a process of its own."""
    pytest.importorskip("onnxscript")
    told = (
        "import onnxruntime, torch, offramp as off\n"
        "from small import ladder_of, rows_of\n"
        "onnxruntime.set_global_thread_pool_sizes(2, 1)\n"
        "torch.set_num_threads(2)\n"
        "net, plan, x = ladder_of(2), off.Plan.by_hand({'small': 0.5}), rows_of(9)\n"
        "got, want = off.open(net, plan, engine='onnxruntime', example=x)(x), off.open(net, "
        "plan)(x)\n"
        "assert torch.allclose(got.logits, want.logits, atol=1e-4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", told],
        cwd=Path(__file__).parents[1] / "helpers",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_gate_that_was_replaced_or_changed_is_compiled_anew(engine):
    net = cut_of()
    x = images_of(40)
    found = []
    for gate in (
        make_gate("margin"),
        make_gate("max_prob"),
        Tempered(make_gate("max_prob"), 5.0),
        0.2,
    ):
        if isinstance(gate, float):
            net.gates["stem"].temperature = gate
        else:
            net.gates["stem"] = gate.eval()
        got, want = (
            off.record(net, x, engine=name, timed=False, progress=False).columns["score/stem"]
            for name in (engine, "torch")
        )
        np.testing.assert_allclose(got, want, atol=1e-4)
        found.append(want)
    assert all(np.abs(one - other).max() > 0.01 for one, other in pairwise(found))


@pytest.mark.slow
def test_a_layer_without_weights_that_was_replaced_is_compiled_anew(engine):
    net = ladder_of(2)
    x = rows_of(9)
    off.run(net, Plan.by_hand({}), x, engine=engine)
    net.backbone["middle"][1] = nn.ReLU().eval()
    close(off.run(net, Plan.by_hand({}), x, engine=engine).logits, net(x)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True])
def test_texts_of_any_length_are_compiled_once(engine, halves, monkeypatch):
    length = ("input_ids", "attention_mask")
    net = off.cut(
        encoder(halves=halves),
        texts(6, 9),
        at=["blocks.0", "blocks.1"],
        exits="linear",
        length=length,
    )
    plan = middling(net, texts(64, 9))
    mine = off.open(net, plan, engine=engine)
    eager = off.open(net, plan)
    mine(texts(6, 9))
    monkeypatch.setattr(graphs, "written", lambda *_: pytest.fail("written anew while serving"))
    for count, size in ((5, 9), (3, 8), (1, 12), (7, 31), (2, 3)):
        x = texts(count, size, seed=size)
        got = mine(x)
        want = eager(x)
        close(got.logits, want.logits)
        assert got.exit.tolist() == want.exit.tolist()
