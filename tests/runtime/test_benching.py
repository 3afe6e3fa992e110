"""Baselines are the engine's bare call: what it answers, and that nothing of ours is around it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import offramp as off
from offramp.networks.inputs import as_inputs
from offramp.runtime.benching import bench, plain_call, plain_of
from offramp.runtime.engine import engine_of
from small import ladder_of, rows_of

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Halved(nn.Module):
    """Preprocessing."""

    def forward(self, x):
        return x / 2


def network():
    """A ladder whose last model has preprocessing, and that model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    first = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    return off.ladder({"small": first, "large": (model, Halved().eval())}).eval(), lambda x: model(
        x / 2
    ).detach()


def ours_called(call):
    """Functions of offramp that a call goes through."""
    found = set()

    def notice(frame, event, _):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("offramp."):
            found.add(f"{name}.{frame.f_code.co_name}")

    sys.setprofile(notice)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    return found, result


@pytest.mark.parametrize("engine", ["torch", "torch:channels_last", "torch:bf16"])
def test_torch_is_the_module_in_inference_mode(engine):
    net, plain = network()
    call = plain_call(net, as_inputs(X), engine_of(engine)[0])
    found, logits = ours_called(call)
    assert "offramp.engines.torch.call" in found
    assert all(name.startswith("offramp.engines.torch.") for name in found)
    assert logits.is_inference()
    near = 0.05 if "bf16" in engine else 1e-5
    torch.testing.assert_close(logits.float(), plain(X), rtol=near, atol=near)


def test_onnxruntime_is_session_run_on_arrays():
    runtime = pytest.importorskip("onnxruntime")
    net, plain = network()
    bind = plain_of(net, as_inputs(X[:2]), engine_of("onnxruntime")[0])
    for count in (1, 6):
        call = bind(as_inputs(X[:count]))
        assert call.func.__name__ == "run"
        assert isinstance(call.func.__self__, runtime.InferenceSession)
        found, (logits,) = ours_called(call)
        assert found == set()
        torch.testing.assert_close(torch.from_numpy(logits), plain(X[:count]), rtol=1e-4, atol=1e-5)


def test_openvino_is_infer_of_a_request():
    pytest.importorskip("openvino")
    net, plain = network()
    bind = plain_of(net, as_inputs(X[:2]), engine_of("openvino")[0])
    for count in (1, 6):
        call = bind(as_inputs(X[:count]))
        assert call.func.__name__ == "infer"
        found, outputs = ours_called(call)
        assert found == set()
        (logits,) = outputs.to_tuple()
        torch.testing.assert_close(torch.from_numpy(logits), plain(X[:count]), rtol=1e-4, atol=1e-5)


def test_bench_takes_a_clock():
    ticks = iter(range(100_000))
    net = ladder_of(2)
    found = bench(
        net, off.Plan.by_hand({"small": 1.0}), rows_of(8), batches=(8,), clock=lambda: next(ticks)
    )
    (line,) = found.lines
    assert (line.run_ms, line.plain_ms, line.parts_ms) == (1000.0, 1000.0, 1000.0)
    assert line.over_plain.value == line.same.value == 1.0


def test_the_plain_network_is_compiled_once_for_all_sizes(monkeypatch):
    pytest.importorskip("onnxruntime")
    net, _ = network()
    bound = []

    def noting(plain, rows, engine):
        bound.append(plain)
        return plain_of(plain, rows, engine)

    monkeypatch.setattr("offramp.runtime.benching.plain_of", noting)
    plan = off.Plan.never_leave(net.topology)
    report = bench(net, plan, X, batches=(1, 2, 6), repeats=1, engine="onnxruntime")
    assert [line.batch for line in report.lines] == [1, 2, 6]
    assert len(bound) == 1
