"""Counting and fitting. No test asserts a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from forked import CLASSES, WIDTH, three
from offramp.plans.signature import INPUT
from offramp.runtime.measuring import (
    Percentile,
    cost,
    interleaved,
    line,
    macs,
    pace,
    percentiles,
    ratio,
    tiled,
)


def test_macs_count_convolutions_and_products():
    x = torch.zeros(2, 3, 8, 8)
    assert macs(lambda: nn.Conv2d(3, 5, 3, padding=1)(x)) == 2 * 8 * 8 * 5 * 3 * 9
    assert macs(lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3)(x)) == 2 * 8 * 8 * 6 * 9
    assert macs(lambda: nn.Linear(7, 11)(torch.zeros(4, 7))) == 4 * 7 * 11
    assert macs(lambda: torch.relu(x) + x) == 0


def test_interleaved_runs_all_in_every_round():
    order = []
    times = interleaved(
        {name: lambda name=name: order.append(name) for name in "abc"}, repeats=3, warmup=1
    )
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert {name: values.shape for name, values in times.items()} == dict.fromkeys("abc", (3,))


def test_ratio_pairs_the_repeats():
    drift = np.array([1.0, 2.0, 4.0, 3.0, 8.0])
    found = ratio(2 * drift, drift)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    noisy = ratio(drift, np.ones(5))
    assert noisy.low < noisy.value < noisy.high
    assert ratio(drift, np.ones(5)) == noisy
    assert str(found) == "2.000 [2.000, 2.000]"


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.1), (0.0, 2.0), (3.0, 0.0)])
def test_line_finds_a_line(a, b):
    sizes = [1, 4, 16, 64]
    assert line(sizes, [a + b * n for n in sizes]) == pytest.approx((a, b), abs=1e-9)


def test_line_is_never_negative():
    a, b = line([1, 4, 16, 64], [4.0, 3.0, 2.0, 1.0])
    assert a > 0
    assert b == 0
    a, b = line([1, 4, 16, 64], [0.1, 1.0, 10.0, 100.0])
    assert a == 0
    assert b > 0


def test_cost_counts_per_row_and_leaves_time_out_unless_asked():
    layer = nn.Linear(5, 3)
    sizes = []

    def call(state):
        sizes.append(len(state[INPUT]))
        return layer(state[INPUT])

    def of(count):
        return {INPUT: torch.zeros(count, 5)}

    assert cost(call, of, timed=False)[0] == 15
    assert np.isnan(cost(call, of, timed=False)[1:]).all()
    assert set(sizes) == {2}
    timed = cost(call, of, timed=True, repeats=1)
    assert timed[0] == 15
    assert np.isfinite(timed).all()
    assert set(sizes) == {1, 2, 4, 16, 64}


def test_percentile_between_and_beyond():
    worst = Percentile((1, 4, 16), (1.0, 2.0, 8.0))
    assert [worst(count) for count in (1, 4, 16)] == [1.0, 2.0, 8.0]
    assert worst(10) == 5.0
    assert worst(32) == 16.0


def test_percentiles_of_parts_never_fall_with_the_batch(three):
    import offramp as off
    from offramp.plans.plan import Plan

    engine_stages = off.open(three, Plan.by_hand({"small": 0.5}))._engine_stages
    found = percentiles(engine_stages, {"x": torch.zeros(3, 4)}, repeats=2)
    assert len(found) == len(engine_stages)
    for each in found:
        assert each.sizes == (1, 4, 16, 64)
        assert list(each.ms) == sorted(each.ms)


@pytest.mark.parametrize(("rows", "count"), [(3, 7), (3, 3), (5, 2), (1, 4)])
def test_tiled(rows, count):
    x = torch.arange(rows * 2.0).reshape(rows, 2)
    got = tiled(x, count)
    assert got.shape == (count, 2)
    assert got[:, 0].tolist() == [float(2 * (row % rows)) for row in range(count)]


class Inner(nn.Module):
    """A body of two layers, of which the first runs twice, one that never runs, and work behind the
    last module.
    """

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.spare = nn.Linear(4, 4)
        self.behind = behind

    def forward(self, x):
        h = self.body[0](self.body(x)) if self.behind else self.body(x)
        return h * 2 if self.behind else h


@pytest.mark.parametrize("behind", [False, True])
def test_pace_tells_when_modules_have_ended(behind):
    model = Inner(behind).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_inference_mode_enabled()))
    found = pace(model, nn.Flatten(), {INPUT: torch.zeros(3, 2, 2)}, repeats=3)
    assert calls == [True] * 5
    order = ["body.1", "body", "body.0"] if behind else ["body.0", "body.1", "body"]
    assert sorted(found.shares, key=found.shares.get) == order
    assert found.ms > 0
    assert found.shares["body.0"] > 0
    last = [found.shares[name] for name in order[1:]]
    assert last[-1] < 1 if behind else last == [1, 1], last
    assert not any(module._forward_hooks for module in model.body.modules())


def test_nodes_that_an_engine_joins_share_its_milliseconds_by_their_macs():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    rows = (
        torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)),
        torch.arange(64) % CLASSES,
    )
    here = off.record(three(), rows, timed=False, progress=False)
    there = off.record(three(), rows, engine="onnxruntime", progress=False)
    names = [name for name in here.columns if name.startswith("cost/")]
    for name in names:
        assert there.columns[name][0] == here.columns[name][0]
        assert np.isfinite(there.columns[name]).all()
    # "stem" runs as part of "size", and "large" as part of "more": models of the same size
    for first, second in (("stem", "size"), ("large", "more")):
        one = there.columns[f"cost/segment/{first}"]
        other = there.columns[f"cost/segment/{second}"]
        assert one[0] == other[0] > 0
        assert one[1:].tolist() == other[1:].tolist()
        assert one[1:].sum() > 0
