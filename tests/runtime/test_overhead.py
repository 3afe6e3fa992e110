"""What is measured besides the parts: what it counts and where it goes, never how long it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import NoisyTimings
from offramp.networks.inputs import as_inputs
from offramp.plans.schedule import full_schedule
from offramp.plans.trace import Trace
from offramp.runtime import overhead
from offramp.runtime.engine import engine_of
from offramp.runtime.measuring import SIZES
from small import Counting, ladder_of, rows_of


def costs_in(trace):
    return {name for name in trace.columns if name.startswith("cost/")}


def test_record_measures_the_runner_and_the_plain_network(tmp_path):
    trace = off.record(ladder_of(3), rows_of(20), progress=False)
    more = {"cost/runner", "cost/runner/small", "cost/runner/middle", "cost/plain"}
    assert more <= costs_in(trace)
    for name in more:
        macs, call, row = trace.columns[name]
        assert macs == 0
        assert min(call, row) >= 0 < call + row
    assert trace.header.noise is not None
    assert trace.header.noise >= 0
    assert "without the runner" not in str(trace.price(off.Plan.never_leave(trace.topology), "ms"))
    trace.save(tmp_path / "trace.npz")
    assert Trace.load(tmp_path / "trace.npz").header == trace.header


def test_without_timings_there_is_nothing_of_it():
    trace = off.record(ladder_of(2), rows_of(20), timed=False, progress=False)
    assert not {"cost/runner", "cost/plain"} & costs_in(trace)
    assert trace.header.noise is None


def test_a_runner_is_timed_on_parts_that_compute_nothing():
    models = {"small": Counting(nn.Linear(4, 3)), "large": Counting(nn.Linear(4, 3))}
    net = off.ladder(models).eval()
    schedule = full_schedule(net.topology)
    engine_stages = engine_of("torch")[0].open(net, schedule, net.device())
    found = overhead.runner_costs(net, engine_stages, as_inputs(rows_of(5)), own_threads=False)
    assert set(found) == {"cost/runner", "cost/runner/small"}
    assert models["small"].calls == models["large"].calls == list(SIZES)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("own_threads", [False, True])
def test_of_several_rows_one_leaves_at_every_gate(count, own_threads):
    """Also where rows go through the loop on arrays."""
    net = ladder_of(3)
    engine_stages = engine_of("torch")[0].open(net, full_schedule(net.topology), net.device())
    x = as_inputs(rows_of(count))
    state = overhead._computed(engine_stages, x)
    canned = []
    for engine_stage in engine_stages:
        canned.append(
            overhead._canned(engine_stage, state, last=engine_stage is engine_stages[-1], inputs=x)
        )
    plan = off.Plan.by_hand({"small": 0.5, "middle": 0.5})
    runner = overhead.Runner(net, plan, canned, engine_stages, None, own_threads=own_threads)
    assert (runner._lean is not None) == own_threads
    exits = runner(x["x"]).exit.tolist()
    assert exits == ([2] if count == 1 else [0, 1, *[2] * (count - 2)])


def test_a_score_that_is_nan_does_not_spoil_the_timing():
    class Nowhere(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 3), torch.nan)

    net = off.ladder({"a": Nowhere(), "b": nn.Linear(4, 3)}).eval()
    engine_stages = engine_of("torch")[0].open(net, full_schedule(net.topology), net.device())
    found = overhead.runner_costs(net, engine_stages, as_inputs(rows_of(5)), own_threads=False)
    assert all(np.isfinite(price).all() for price in found.values())


def test_noise_is_the_spread_of_one_call(monkeypatch):
    net = ladder_of(2)
    engine_stages = engine_of("torch")[0].open(net, full_schedule(net.topology), net.device())
    rounds = iter([{"1": np.ones(5), "64": np.ones(5)}, {"1": np.ones(5), "64": np.full(5, 3.0)}])
    monkeypatch.setattr(overhead, "interleaved", lambda *_, **__: next(rounds))
    noise = overhead.Noise(engine_stages, as_inputs(rows_of(5)))
    noise.time()
    assert noise.share() == 0
    noise.time()
    assert noise.share() == 2  # the quartiles are 1 and 3


@pytest.fixture
def noisy(monkeypatch):
    monkeypatch.setattr(overhead.Noise, "share", lambda self: 0.7)


@pytest.mark.filterwarnings("default:the milliseconds are noisy")
@pytest.mark.filterwarnings("ignore::offramp.errors.DearFirst")  # the members take as long
def test_noisy_timings_are_said_wherever_they_are_used(noisy):
    x = rows_of(400)
    with pytest.warns(NoisyTimings, match="timings of the same call differ by 70%"):
        trace = off.record(ladder_of(2), x, progress=False)
    with pytest.warns(NoisyTimings, match="another plan may be the cheapest"):
        plan = off.calibrate(trace, at_most=0.9, unit="ms")
    assert "noisy: the same call's timings differ by 70%" in str(plan)
    assert "noisy" in str(trace.evaluate(plan))


def test_prices_in_macs_say_nothing_of_noise(noisy):
    trace = off.record(ladder_of(2), rows_of(400), progress=False)
    assert "noisy" not in str(off.calibrate(trace, at_most=0.9))


@pytest.mark.filterwarnings("error:the milliseconds are noisy")
def test_quiet_timings_warn_nobody(monkeypatch):
    monkeypatch.setattr(overhead.Noise, "share", lambda self: 0.1)
    trace = off.record(ladder_of(2), rows_of(400), progress=False)
    off.calibrate(trace, at_most=0.9, unit="ms")
