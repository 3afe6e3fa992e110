"""torch:compile, ahead of time: it answers as torch does at any batch size, and never compiles
while it serves.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument, Mismatch
from offramp.plans.plan import Plan
from offramp.runtime.engine import engine_of
from offramp.testing import check_engine
from small import ladder_of, rows_of

X = rows_of(70)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_it_answers_as_torch_does_and_compiles_nothing_after_open(monkeypatch):
    net = ladder_of(2)
    trace = off.record(net, X, timed=False, engine="torch:compile")
    assert trace.header.origin.engine == "torch:compile"
    middle = float(np.median(trace.columns["score/small"]))
    plan = Plan(thresholds={"small": (middle,)}, origin=trace.header.origin)
    with pytest.raises(Mismatch, match="torch:compile"):
        off.open(net, plan)
    runner = off.open(net, plan, engine="torch:compile")

    def late(*_args, **_options):
        raise AssertionError("compiled while it served")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", late)
    frames = dict(torch._dynamo.utils.counters["frames"])
    eager = off.open(net, Plan.by_hand({"small": middle}))
    for size in (1, 2, 3, 17, 64, 1, 70):
        mine = runner(X[:size])
        wanted = eager(X[:size])
        assert mine.exit.tolist() == wanted.exit.tolist()
        torch.testing.assert_close(mine.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert dict(torch._dynamo.utils.counters["frames"]) == frames
    check_engine(engine_of("torch:compile")[0], net, X[:9])


def test_what_it_does_not_keep_is_refused():
    with pytest.raises(
        InvalidArgument, match="compile must be the only option, got it together with bf16"
    ):
        engine_of("torch:compile,bf16")[0].open(ladder_of(2), (), torch.device("cpu"))


def test_without_a_compiler_it_is_said(monkeypatch):
    def fails(*_args, **_options):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    with pytest.raises(BadNetwork, match="segment 'small' cannot be compiled: No working C"):
        off.record(ladder_of(2, seed=3), X, timed=False, engine="torch:compile")
