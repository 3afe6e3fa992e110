"""Engines from texts: their options, and that a plan keeps to the ones it was made with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import offramp as off
from offramp.calibration.calibrating import problem_of
from offramp.engines.torch import Eager
from offramp.errors import InvalidArgument, Mismatch, UnknownName
from offramp.guarantees.risks import find_risk
from offramp.plans.schedule import Schedule
from offramp.plans.trace import Trace
from offramp.runtime.engine import engine_of
from offramp.runtime.recording import record
from offramp.testing import check_engine
from small import conv, cut_of, images_of, ladder_of

X = images_of(12).numpy()


def test_the_text_in_its_normal_form():
    assert engine_of("torch")[1] == engine_of("torch:")[1] == "torch"
    engine, identity = engine_of("torch:channels_last,bf16")
    assert (engine.options, identity) == (
        {"bf16": True, "channels_last": True},
        "torch:bf16,channels_last",
    )


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("troch:bf16", UnknownName, "did you mean 'torch'"),
        (
            "torch:bf61",
            UnknownName,
            "option of the engine 'torch' called 'bf61'; did you mean 'bf16'",
        ),
        ("torch:bf16=1", InvalidArgument, "bf16 of torch must have no value"),
    ],
)
def test_texts_that_are_refused(text, error, says):
    with pytest.raises(error, match=says):
        engine_of(text)


def test_channels_last_answers_alike_and_is_seen_by_the_model():
    engine, _ = engine_of("torch:channels_last")
    images = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    seen = []
    net = ladder_of(
        2,
        make=lambda index, seed: torch.nn.Sequential(torch.nn.Conv2d(2, 1, 1), conv(index)).eval(),
    )
    check_engine(engine, net, images)
    net.backbone["middle"][0].register_forward_pre_hook(lambda _, x: seen.append(x[0].stride()))
    off.open(net, off.Plan.by_hand({}), engine="torch:channels_last")(images)
    assert seen[-1] == (72, 1, 12, 2)


def test_bf16_is_near_and_gives_float32():
    found = {
        name: record(cut_of(), X, timed=False, engine=name) for name in ("torch", "torch:bf16")
    }
    wide, narrow = (trace.columns for trace in found.values())
    for name in wide:
        assert narrow[name].dtype == wide[name].dtype
        if name.startswith(("logits/", "score/")):
            np.testing.assert_allclose(narrow[name], wide[name], atol=0.05)
    assert np.abs(narrow["logits/stem"] - wide["logits/stem"]).max() > 1e-5
    net = cut_of()
    plan = off.calibrate(found["torch:bf16"], budget=0.9)
    answers = off.open(net, plan, engine="torch:bf16")(X)
    assert answers.logits.dtype == torch.float32
    for engine in ("torch", "torch:channels_last", "torch:bf16,channels_last"):
        with pytest.raises(Mismatch, match="on torch:bf16 in float32"):
            off.open(net, plan, engine=engine)
    with pytest.raises(Mismatch, match="is for network"):
        off.run(net, off.calibrate(found["torch"], budget=0.9), X, engine="torch:bf16")


def test_bf16_is_refused_where_a_device_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old card")
    with pytest.raises(InvalidArgument, match="bf16 needs a device with bfloat16, got an old card"):
        Eager(bf16=True).open(ladder_of(2), Schedule(()), torch.device("cuda"))


@pytest.mark.parametrize(
    ("engine", "band"),
    [
        ("torch", 1e-4),
        ("torch:channels_last", 1e-4),
        ("torch:bf16,channels_last", 0.125),
        ("onnxruntime 1:int8=ab", 0.125),
    ],
)
def test_the_band_around_thresholds_is_wider_where_numbers_are_short(engine, band, trace):
    origin = replace(trace.header.origin, engine=engine)
    assert origin.band == band
    there = Trace(trace.columns, replace(trace.header, origin=origin))
    plan = off.Plan.by_hand({"small": 0.5})
    near = np.abs(there.columns["score/small"].astype(float) - 0.5) <= band
    assert there.evaluate(plan).in_band == pytest.approx(near.mean())
    assert problem_of(there, find_risk("error")).band == band
