"""Plans evaluated in one pass, and in a list, against a slow row-by-row reference: ties, NaN and
infinities too.
"""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from offramp.calibration import sweep as sweep_module
from offramp.calibration.listed import Listed
from offramp.calibration.path import shared_path
from offramp.calibration.sweep import band_edges, sweep
from offramp.plans.plan import BAND, choose

AROUND = [
    0.0,
    0.00005,
    0.0001,
    0.0002,
    0.5,
    0.50005,
    0.5001,
    0.5002,
    1.0,
    1.0001,
    7.0,
    -1.0,
    3e38,
    -3e38,
]
SCORES = st.sampled_from([*AROUND, np.inf, -np.inf, np.nan]).map(np.float32)
BARS = st.sampled_from([*AROUND, 0.25, 0.4999, -np.inf]).map(np.float32)
LOSSES = st.sampled_from([-1, 0, 1])


def slow_worst(scores, losses, thresholds, band):
    """Row by row: the largest loss over all decisions that are possible within the band."""

    def outcomes(row, gate):
        if gate == scores.shape[1]:
            return {losses[row, gate]}
        score = scores[row, gate]
        t = thresholds[gate]
        leaves = choose(scores[[row]][:, [gate]], thresholds[[gate]])[0] == 0
        here = {losses[row, gate]}
        further = outcomes(row, gate + 1)
        if abs(float(score) - float(t)) <= band:
            return here | further
        return here if leaves else further

    return np.array([max(outcomes(row, 0)) for row in range(len(scores))])


def slow_reach(scores, thresholds):
    """How many rows arrive at each exit, as `choose` has it."""
    going = np.ones(len(scores), bool)
    reach = [len(scores)]
    for gate in range(scores.shape[1]):
        going &= choose(scores[:, [gate]], thresholds[[gate]]) == 1
        reach.append(int(going.sum()))
    return reach


@st.composite
def chains(draw):
    """Scores [N, G], losses [N, G + 1], weights [N], groups [N]."""
    rows = draw(st.integers(1, 12))
    gates = draw(st.integers(1, 3))
    scores = draw(arrays(np.float32, (rows, gates), elements=SCORES))
    losses = draw(arrays(np.int8, (rows, gates + 1), elements=LOSSES))
    weights = draw(arrays(np.float64, rows, elements=st.integers(0, 5)))
    groups = draw(arrays(np.uint16, rows, elements=st.integers(0, 2)))
    groups[0] = 2  # so that there are three
    return scores, losses, weights, groups


BANDS = st.sampled_from([BAND, 0.0, 0.125])


@settings(max_examples=60)
@given(chains(), st.lists(BARS, min_size=1, max_size=6, unique=True), BANDS)
def test_a_path_against_row_by_row(topology, bars, band):
    scores, losses, weights, groups = topology
    gates = scores.shape[1]
    path = np.sort(np.array(bars, np.float32))[::-1]
    found = sweep(path, scores, losses, band, weights=[None] + [weights] * gates, groups=groups)
    sums = {0: None}
    for plans, sums_CB in found.group_sums(2):
        sums.update(zip(plans.tolist(), sums_CB, strict=True))
    assert set(sums) >= {0, 1}  # plan 0 may pass untested, and plan 1 may not
    for plan, t in enumerate([np.float32(np.inf), *path]):
        thresholds = np.full(gates, t, np.float32)
        worst = slow_worst(scores, losses, thresholds, band)
        assert found.loss_P[plan] == worst.sum()
        assert found.reach_PE[plan].tolist() == slow_reach(scores, thresholds)
        assert found.on_score_P[plan] == (t < np.inf and bool((scores == t).any()))
        if plan in sums:
            last = sums[plan]
        # unchanged where a plan was left out
        assert last.tolist() == np.bincount(groups, worst, 3).tolist()
        going = np.ones(len(scores), bool)
        for gate in range(gates):
            going &= choose(scores[:, [gate]], thresholds[[gate]]) == 1
            assert found.carried_PE[plan, gate + 1] == weights[going].sum()


@settings(max_examples=60)
@given(chains(), st.data(), BANDS)
def test_a_list_against_row_by_row(topology, data, band):
    scores, losses, _, groups = topology
    bars = st.sampled_from([*AROUND, np.inf, -np.inf]).map(np.float32)
    plans = data.draw(
        arrays(np.float32, (data.draw(st.integers(1, 4)), scores.shape[1]), elements=bars)
    )
    found = Listed(plans, scores, losses, band, groups)
    sums = np.concatenate([sums_CB for _, sums_CB in found.group_sums(3)])
    for plan, thresholds in enumerate(plans):
        worst = slow_worst(scores, losses, thresholds, band)
        assert found.loss_P[plan] == worst.sum()
        assert found.reach_PE[plan].tolist() == slow_reach(scores, thresholds)
        assert sums[plan].tolist() == np.bincount(groups, worst, 3).tolist()
        at = [
            np.isfinite(t) and bool((scores[:, gate] == t).any())
            for gate, t in enumerate(thresholds)
        ]
        assert found.on_score_P[plan] == any(at)


@given(
    arrays(np.float32, st.integers(1, 8), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    BANDS,
)
def test_edges_are_the_smallest_scores_that_may_and_must_leave(thresholds, band):
    near, sure = band_edges(thresholds, band)
    for t, may, must in zip(thresholds.astype(float), near, sure, strict=True):
        below = float(np.nextafter(may, np.float32(-np.inf)))
        assert abs(float(may) - t) <= band or float(may) == t
        assert below < t
        assert not abs(below - t) <= band
        assert float(must) > t
        assert not abs(float(must) - t) <= band
        below = float(np.nextafter(must, np.float32(-np.inf)))
        assert below <= t or abs(below - t) <= band


@pytest.mark.parametrize("whole", [True, False])
def test_blocks_of_rows_change_nothing(whole, monkeypatch):
    rng = np.random.default_rng(0)
    scores = rng.choice([0.1, 0.3, 1.0, 2.5, np.nan, np.inf], (500, 2)).astype(np.float32)
    scores[:100] += rng.normal(0, BAND, (100, 2)).astype(np.float32)
    if whole:
        losses = rng.integers(-1, 2, (500, 3))
    else:
        losses = np.round(rng.random((500, 3)) * 64) / 64
    groups = rng.integers(0, 7, 500).astype(np.uint16)
    path = shared_path()
    one = sweep(path, scores, losses, BAND, groups=groups)
    monkeypatch.setattr(sweep_module, "BLOCK", 64)
    other = sweep(path, scores, losses, BAND, groups=groups)
    assert np.array_equal(one.loss_P, other.loss_P)
    assert np.array_equal(one.reach_PE, other.reach_PE)
    for (plans, sums), (same_plans, same_sums) in zip(
        one.group_sums(5), other.group_sums(5), strict=True
    ):
        assert np.array_equal(plans, same_plans)
        assert np.array_equal(sums, same_sums)


def test_no_gate_and_no_path():
    losses = np.array([[1], [0]], np.int8)
    found = sweep(np.zeros(0, np.float32), np.zeros((2, 0), np.float32), losses, BAND)
    assert found.loss_P.tolist() == [1]
    assert found.leaving_P.tolist() == [0]


def test_docstrings_run():
    assert doctest.testmod(sweep_module).failed == 0
