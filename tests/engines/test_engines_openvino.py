"""OpenVINO in a process that does other things too: signals, forks, its settings, and silence."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp._support.find import find_file
from offramp.errors import InvalidArgument, Mismatch
from offramp.plans.plan import Plan
from offramp.plans.provenance import BAND, ROUNDED
from offramp.runtime.one_graph import Coded
from small import (
    INF_MARK,
    NAN_MARK,
    cut_of,
    images_of,
    ladder_of,
    rows_of,
    seeded,
    spoiled,
    whole_numbers,
)

pytest.importorskip("onnxscript")
if find_spec("openvino") is None:
    pytest.skip("needs openvino", allow_module_level=True)
package = find_file("engines", "openvino")._package()

TWO_GRAPHS_GO = """
import faulthandler, gc, os, signal, sys
faulthandler.enable()
import numpy as np, torch
from onnx import TensorProto, helper
from offramp.engines import openvino
from offramp.runtime.onnx_graphs import Graph

ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 3]) for name in ("x", "a")]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["a"])], "a", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
calls = [openvino._compiled(Graph("a", ("x",), ("a",), model)) for _ in range(2)]
for call in calls:
    for rows in (0, 1, 7):
        assert call({"x": torch.ones(rows, 3)})["a"].tolist() == [[1.0] * 3] * rows
del calls[0], call
gc.collect()
calls.clear()
gc.collect()
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
signal.raise_signal(signal.SIGINT)
assert heard == [1]
assert "openvino_telemetry" not in sys.modules
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0, "a child that exits"
"""


@pytest.mark.slow
def test_it_leaves_signals_and_forks_alone_and_says_nothing_to_anyone():
    done = subprocess.run(
        [sys.executable, "-c", TWO_GRAPHS_GO], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_computes_in_float32_on_the_threads_of_torch_and_pins_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing was compiled before
    seen = []
    whole = package.Core.compile_model

    def compile_model(core, model, device, config):
        seen.append(config)
        return whole(core, model, device, config)

    monkeypatch.setattr(package.Core, "compile_model", compile_model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    off.run(ladder_of(2), Plan.by_hand({}), rows_of(3), engine="openvino")
    config, *_ = seen
    assert config["INFERENCE_PRECISION_HINT"] == "f32"
    assert (
        config["INFERENCE_NUM_THREADS"],
        config["NUM_STREAMS"],
        config["ENABLE_CPU_PINNING"],
    ) == (2, 1, False)


def has_bf16() -> bool:
    return "BF16" in find_file("engines", "openvino")._core().get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    )


def test_bf16_is_near_and_gives_float32_scores_of_full_resolution():
    if not has_bf16():
        pytest.skip("needs a processor with bfloat16")
    images = images_of(12)
    traces = {}
    for engine in ("openvino", "openvino:bf16"):
        traces[engine] = off.record(cut_of(), images, timed=False, progress=False, engine=engine)
    wide = traces["openvino"].columns
    narrow = traces["openvino:bf16"].columns
    for name in wide:
        assert narrow[name].dtype == wide[name].dtype
        if name.startswith(("logits/", "score/")):
            np.testing.assert_allclose(narrow[name], wide[name], atol=0.05)
    assert np.abs(narrow["logits/stem"] - wide["logits/stem"]).max() > 1e-5
    # a score in bfloat16 would have eight bits, and thresholds would fall on ties
    scores = narrow["score/stem"]
    rounded = torch.from_numpy(scores).bfloat16().float().numpy()
    assert (scores != rounded).any()


def test_a_promise_of_bf16_holds_for_it_alone_and_run_equals_replay():
    if not has_bf16():
        pytest.skip("needs a processor with bfloat16")
    net = cut_of()
    images = images_of(40)
    trace = off.record(net, images, timed=False, progress=False, engine="openvino:bf16")
    origin = trace.header.origin
    assert origin is not None
    assert origin.engine.endswith(":bf16")
    assert origin.band == ROUNDED
    plan = off.calibrate(trace, budget=0.9)
    replayed = trace.replay(plan)
    answers = off.open(net, plan, engine="openvino:bf16")(images)
    threshold = plan.thresholds["stem"][0]
    near = np.abs(trace.columns["score/stem"] - threshold) <= origin.band
    np.testing.assert_array_equal(answers.exit.numpy()[~near], replayed.exit[~near])
    with pytest.raises(Mismatch, match=":bf16"):
        off.open(net, plan, engine="openvino")


def test_bf16_is_refused_on_a_processor_without_it(monkeypatch):
    class Older:
        def get_property(self, device, name):
            return {"OPTIMIZATION_CAPABILITIES": ["FP32"], "FULL_DEVICE_NAME": "an old chip"}[name]

    monkeypatch.setattr(find_file("engines", "openvino"), "_core", Older)
    with pytest.raises(
        InvalidArgument, match="bf16 needs a processor with bfloat16, got an old chip"
    ):
        off.open(cut_of(), Plan.by_hand({}), engine="openvino:bf16", example=images_of(2))


def test_there_is_one_core_in_a_process():
    shelved = find_file("engines", "openvino")
    assert shelved._core() is shelved._core()


class Roots(nn.Module):
    """Features that are NaN for rows of negative numbers, and logits that hide it behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Identity(), Root())
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))

    def forward(self, x):
        return self.head(self.body(x))


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x * self.one).sqrt()


class Loud(off.Exit):
    """Logits that overflow for features of 4 and more; features of NaN count as 0."""

    def forward(self, seen):
        return seen.features.nan_to_num(0, 0, 0) * torch.tensor([1e38, 0.5e38, 0.0])

    def config(self):
        return {"name": "tests:Loud"}


def test_one_graph_flags_what_the_stages_flag():
    """A score of NaN is marked in the graph; NaN between two stages is left to the stages."""
    x = torch.tensor([[1.0, 1, 1], [4, 1, 1], [25, 1, 1], [36, 4, 4], [-1, 1, 1]])
    net = off.cut(seeded(Roots, 0).eval(), x[:4], at=["body"], exits=lambda *_: Loud())
    plan = Plan.by_hand({"body": 1e38})
    runner = off.open(net, plan, engine="openvino", example=x[:4])
    assert "in one graph on openvino" in repr(runner)
    eager = off.open(net, plan)
    kinds = list[bool]()
    for rows in ([0], [1], [2], [0, 1, 2, 3], [3, 0], [4], [4, 0, 2]):
        got = runner(x[rows])
        want = eager(x[rows])
        kinds.append(isinstance(got, Coded))
        assert got.exit.tolist() == want.exit.tolist()
        assert got.why.tolist() == want.why.tolist()
        flagged = [bool(row in (2, 3, 4)) for row in rows]
        assert got.flagged.tolist() == flagged
        finite = ~got.flagged
        torch.testing.assert_close(got.logits[finite], want.logits[finite], atol=BAND, rtol=1e-5)
    assert kinds == [True] * 5 + [False] * 2


@pytest.mark.slow
@pytest.mark.parametrize("make", [whole_numbers, spoiled])
def test_one_graph_equals_the_replay(make):
    net = ladder_of(3, make=make, seed=3)
    x = rows_of(96, whole=True, seed=7)
    x[5], x[17, 0], x[30, 0], x[31, 0] = x[6], NAN_MARK, INF_MARK, NAN_MARK
    trace = off.record(net, x.numpy(), timed=False, batch_size=96, engine="openvino")
    rng = np.random.default_rng(1)
    graphs = 0
    for _ in range(8):
        chosen = dict[str, float]()
        for gate in trace.topology.gates:
            scores = trace.columns[f"score/{gate}"]
            chosen[gate] = float(rng.choice(scores[np.isfinite(scores)]))
        plan = Plan.by_hand(chosen)
        runner = off.open(net, plan, engine="openvino", example=x)
        replay = trace.replay(plan)
        for size in (1, 2, 64):
            rows = rng.permutation(96)[:size]
            answers = runner(x[rows])
            stages = runner._lean(x[rows])
            graphs += isinstance(answers, Coded)
            assert answers.exit.tolist() == replay.exit[rows].tolist()
            assert answers.why.tolist() == replay.why[rows].tolist()
            assert answers.flagged.tolist() == stages.flagged.tolist()
            torch.testing.assert_close(
                answers.logits, stages.logits, atol=BAND, rtol=0, equal_nan=True
            )
    assert graphs == 24


def test_arrays_that_cannot_be_shared_are_copied():
    """Read-only arrays, arrays with gaps, and both through one graph and through stages."""
    net = cut_of()
    x = images_of(6).numpy()
    runner = off.open(net, Plan.by_hand({"stem": 1e9}), engine="openvino", example=x)
    want = runner(x)
    for rows in (x[::2], np.asfortranarray(x)[::2], np.array(x[::2])):
        rows.flags.writeable = False
        torch.testing.assert_close(runner(rows).logits, want.logits[::2], atol=BAND, rtol=1e-5)
