"""ONNX Runtime in eight bits: near to float32, the same for any batch, and another engine for
plans.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from offramp.engines import _quantizing
from offramp.engines._quantizing import Quantizer
from offramp.errors import BadData, BadFile, InvalidArgument, Mismatch, OverlappingRows
from offramp.networks.nodes import Seen
from offramp.plans.schedule import full_schedule
from offramp.runtime.benching import bench
from offramp.runtime.engine import engine_of
from small import cut_of, images_of, ladder_of, rows_of

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = rows_of(40).numpy()


@pytest.fixture
def scales(tmp_path):
    """An engine whose scales are set by sixteen rows of a file."""
    np.savez(tmp_path / "some.npz", x=rows_of(16, seed=1).numpy())
    return f"onnxruntime:int8=npz:{tmp_path / 'some.npz'}"


@pytest.mark.slow
def test_it_is_near_and_does_not_mix_rows_and_a_plan_keeps_to_it(scales):
    net = ladder_of(2)
    trace = off.record(net, (X, np.arange(40) % 3), timed=False, engine=scales)
    plain = off.record(net, X, timed=False).columns
    for name in ("logits/small", "logits/middle", "score/small"):
        far = np.abs(trace.columns[name] - plain[name])
        assert 1e-5 < far.max() < 1, name
        assert far.mean() < 0.05, name
    alone = off.record(net, X, timed=False, engine=scales, batch_size=1).columns
    assert (alone["logits/middle"] == trace.columns["logits/middle"]).all()
    plan = off.Plan(
        thresholds={"small": (float(np.median(trace.columns["score/small"])),)},
        origin=trace.header.origin,
    )
    assert plan.origin.engine.split(":int8=")[0] == engine_of("onnxruntime")[1]
    answers = off.open(net, plan, engine=scales)(X)
    wanted = trace.replay(plan)
    assert answers.exit.tolist() == wanted.exit.tolist()
    with pytest.raises(Mismatch, match="int8="):
        off.open(net, plan, engine="onnxruntime")
    with pytest.raises(Mismatch, match="int8="):
        off.open(
            net,
            off.Plan(thresholds={}, origin=off.record(net, X, timed=False).header.origin),
            engine=scales,
        )


@pytest.mark.slow
def test_it_is_timed_beside_the_plain_network(scales):
    plan = off.Plan.by_hand({"small": 0.5})
    found = bench(ladder_of(2), plan, rows_of(4), batches=(2,), repeats=1, engine=scales)
    assert {line.batch for line in found.lines} == {2}


@pytest.mark.slow
def test_rows_that_set_scales_promise_nothing(scales):
    rows = rows_of(16, seed=1).numpy()
    trace = off.record(ladder_of(2), (rows, np.arange(16) % 3), timed=False, engine=scales)
    assert trace.columns["learned"].all()
    with pytest.raises(OverlappingRows):
        off.calibrate(trace, budget=0.9)


@pytest.mark.slow
def test_exits_and_gates_stay_in_float32(tmp_path):
    """A cut model: convolutions in eight bits; what an exit makes of its float32 features is
    exact.
    """
    np.savez(tmp_path / "some.npz", x=images_of(16, 1).numpy())
    net = cut_of(gate="margin")
    x = images_of(9)
    engine, _ = engine_of(f"onnxruntime:int8=npz:{tmp_path / 'some.npz'}")
    state = {"x": x}
    with torch.no_grad():
        for engine_stage in engine.open(net, full_schedule(net.topology), net.device()):
            engine_stage.call(state)
    exit_ = net.exit_of("blocks.0")
    wanted = exit_(Seen(state["blocks.0"], {}))
    torch.testing.assert_close(state["blocks.0/logits"], wanted, atol=1e-5, rtol=1e-5)
    assert (state["blocks.0"] - dict(net.look(x))["blocks.0"].features).abs().max() > 1e-4


def test_texts_that_are_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="int8 of onnxruntime must have a value"):
        engine_of("onnxruntime:int8")
    np.savez(tmp_path / "many.npz", x=np.zeros((2001, 4), np.float32))
    with pytest.raises(BadData, match=r"int8 must have 1 to 2000 rows .* 2001 rows"):
        engine_of(f"onnxruntime:int8=npz:{tmp_path / 'many.npz'}")


@pytest.fixture
def reaching(tmp_path):
    """Rows for scales, a plan under which only some of them go on, and where both are saved."""
    net = ladder_of(2)
    rows = rows_of(64, seed=1).numpy()
    np.savez(tmp_path / "some.npz", x=rows)
    scores = off.record(net, rows, timed=False, progress=False).scores[:, 0]
    plan = off.Plan.by_hand({"small": float(np.median(scores))})
    plan.save(tmp_path / "plan.json")
    text = f"onnxruntime:int8=npz:{tmp_path / 'some.npz'}"
    return net, rows, scores < np.float32(np.median(scores)), text, tmp_path / "plan.json"


def test_only_rows_that_reach_a_segment_set_its_scales(reaching, monkeypatch):
    net, rows, stay, text, file = reaching
    seen = {}
    whole = _quantizing._Reader._inputs

    def inputs(network, source, reads, chosen):
        batches = list(whole(network, source, reads, chosen))
        seen[len(seen)] = np.concatenate([batch["x"] for batch in batches])
        return iter(batches)

    monkeypatch.setattr(_quantizing._Reader, "_inputs", staticmethod(inputs))
    off.open(net, off.Plan.never_leave(net.topology), engine=f"{text},reach={file}", example=rows)
    counts = sorted(map(len, seen.values()))
    assert counts == [32, 64]
    later = next(found for found in seen.values() if len(found) == 32)
    np.testing.assert_array_equal(later, rows[stay])


def test_where_too_few_rows_arrive_all_of_them_set_the_scales(reaching, tmp_path):
    net, _, _, text, _ = reaching
    source = _quantizing.scaling_rows(text.partition("int8=")[2])
    leave = Quantizer(net, source, off.Plan.by_hand({"small": -1e30}))
    assert leave.reached("small") is None or leave.reached("small").all()
    assert leave.reached("middle") is None
    assert Quantizer(net, source).reached("middle") is None


def test_another_plan_makes_another_engine_and_a_promise_is_refused_there(reaching, tmp_path):
    net, rows, _, text, file = reaching
    other = tmp_path / "other.json"
    off.Plan.by_hand({"small": 0.25}).save(other)
    again = tmp_path / "again.json"
    again.write_bytes(file.read_bytes())
    plain, first, same, second = (
        engine_of(text)[1],
        engine_of(f"{text},reach={file}")[1],
        engine_of(f"{text},reach={again}")[1],
        engine_of(f"{text},reach={other}")[1],
    )
    assert first == same
    assert len({plain, first, second}) == 3
    trace = off.record(net, rows_of(20), timed=False, progress=False, engine=f"{text},reach={file}")
    assert trace.header.origin.engine == first
    plan = off.Plan(thresholds={"small": (0.5,)}, origin=trace.header.origin)
    for engine in (text, f"{text},reach={other}"):
        with pytest.raises(Mismatch, match="int8="):
            off.open(net, plan, engine=engine, example=rows)


def test_rows_that_made_the_plan_of_reach_count_as_training_rows(reaching, tmp_path):
    net, _, _, text, _ = reaching
    trace = off.record(net, rows_of(400, seed=5), timed=False, progress=False)
    calibrated = off.calibrate(trace, risk="disagreement", at_most=0.3)
    calibrated.save(tmp_path / "calibrated.json")
    engine, _ = engine_of(f"{text},reach={tmp_path / 'calibrated.json'}")
    assert set(trace.columns["digest"].tolist()) <= set(engine.trained_on.tolist())
    assert len(engine.trained_on) == 400 + 64


def test_reach_without_rows_for_scales_is_refused(tmp_path):
    with pytest.raises(
        InvalidArgument, match=r"^reach must come with int8=ROWS, got reach=p alone$"
    ):
        engine_of("onnxruntime:reach=p")
    with pytest.raises(BadFile):
        engine_of(f"onnxruntime:int8=digits[0:20],reach={tmp_path / 'none.json'}")
