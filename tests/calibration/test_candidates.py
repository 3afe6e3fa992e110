"""The path that is fixed beforehand, and losses with the float band counted against a plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.candidates import (
    distinct,
    in_order,
    off_scores,
    shared_path,
    spread,
    trade_offs,
    worst_losses,
)
from offramp.calibration.search import Problem, exits_of
from offramp.plan import BAND, choose


def slow_worst(scores, losses, thresholds):
    """Row by row: the largest loss over all decisions that are possible within the band."""

    def outcomes(row, gate):
        if gate == scores.shape[1]:
            return {losses[row, gate]}
        score, t = scores[row, gate], thresholds[gate]
        leaves = choose(scores[[row]][:, [gate]], thresholds[[gate]])[0] == 0
        near = abs(float(score) - float(t)) <= BAND
        here, on = {losses[row, gate]}, outcomes(row, gate + 1)
        return here | on if near else here if leaves else on

    return np.array([max(outcomes(row, 0)) for row in range(len(scores))])


SCORES = st.sampled_from([-np.inf, -1.0, 0.0, 0.00005, 0.0001, 0.5, 0.50005, 0.5002, 1.0, 7.0, np.inf, np.nan])
BARS = st.sampled_from([-np.inf, -1.0, 0.0, 0.00003, 0.25, 0.5, 0.50012, 1.0, np.inf])


@given(st.data())
def test_worst_losses_against_a_row_by_row_reference(data):
    rows, gates, plans = (data.draw(st.integers(low, high)) for low, high in ((1, 6), (0, 3), (1, 4)))
    scores = np.array([[data.draw(SCORES) for _ in range(gates)] for _ in range(rows)], np.float32)
    scores = scores.reshape(rows, gates)
    losses = np.array([[data.draw(st.sampled_from([-1, 0, 1])) for _ in range(gates + 1)] for _ in range(rows)])
    thresholds = np.array([[data.draw(BARS) for _ in range(gates)] for _ in range(plans)], np.float32)
    thresholds = thresholds.reshape(plans, gates)
    worst = worst_losses(scores, losses, thresholds)
    assert worst.shape == (plans, rows)
    for plan in range(plans):
        np.testing.assert_array_equal(worst[plan], slow_worst(scores, losses, thresholds[plan]))
        plain = losses[np.arange(rows), exits_of(scores, thresholds[[plan]])[0]]
        assert (worst[plan] >= plain).all()


def test_worst_losses_keep_their_type():
    worst = worst_losses(np.zeros((2, 1), np.float32), np.zeros((2, 2), np.int8), np.ones((3, 1), np.float32))
    assert worst.dtype == np.int8


def test_the_path_is_fixed_and_goes_down():
    path = shared_path()
    assert path.dtype == np.float32
    assert (np.diff(path.astype(float)) < 0).all()
    assert np.isfinite(path).all()
    assert path[0] > 1e4
    assert path[-1] < -1e4
    margins = path[(path > 1e-3) & (path < 1e3)].astype(float)
    assert (margins[:-1] / margins[1:]).max() < 1.012
    probabilities = path[(path > 0.5) & (path < 1 - 1e-5)]
    assert ((1 - probabilities[1:].astype(float)) / (1 - probabilities[:-1].astype(float))).max() < 1.03
    assert path[path < 1][0] > 1 - 1e-6


def test_round_numbers_are_off_the_path():
    path = shared_path()
    assert not np.isin(np.float32([0, 0.5, 0.9, 0.95, 0.99, 0.999, 1, 2, 3, 5, 10, 100, -1, -0.5]), path).any()


@pytest.mark.parametrize("seed", range(5))
def test_dropping_repetitions_drops_no_losses(seed):
    rng = np.random.default_rng(seed)
    scores = rng.choice([0.1, 0.3, 1.0, 2.5, np.nan, np.inf], (20, 2)).astype(np.float32)
    scores[0] += np.float32(BAND / 2)
    losses = rng.integers(0, 2, (20, 3))
    path = shared_path()
    kept = distinct(path, scores)
    assert np.isin(kept, path).all()
    assert len(kept) < len(path) / 10
    every = worst_losses(scores, losses, spread(path, 2))
    some = worst_losses(scores, losses, spread(kept, 2))
    assert len(np.unique(every, axis=0)) == len(np.unique(np.concatenate([every, some]), axis=0))
    changes = np.concatenate([[True], (every[1:] != every[:-1]).any(1)])
    assert {row.tobytes() for row in every[changes]} == {row.tobytes() for row in some}


def test_off_scores():
    scores = np.float32([[1.0, 5.0], [2.0, np.nan]])
    plans = np.float32([[1.5, 4.0], [1.0, 4.0], [5.0, 5.0], [np.inf, 1.0]])
    assert off_scores(scores, plans).tolist() == [True, False, False, True]


@pytest.mark.parametrize("signed", [False, True])
def test_trade_offs_let_rows_leave_and_keep_off_the_scores(signed):
    rng = np.random.default_rng(0)
    scores = rng.random((300, 2)).astype(np.float32)
    losses = np.column_stack([rng.random(300) < 0.3, rng.random(300) < 0.1, np.zeros(300)]).astype(float)
    if signed:
        losses[:, 0] -= rng.random(300) < 0.3
    problem = Problem(scores, losses, lambda open_E: np.array([1.0, 3.0, 9.0]))
    plans = trade_offs(problem, 20)
    assert plans.dtype == np.float32
    assert np.isfinite(plans).any(1).all()
    assert len(np.unique(plans, axis=0)) == len(plans) > 10
    assert not (np.abs(plans.astype(float)[:, None] - scores) < 0.9 * BAND).any()


def test_candidates_are_tested_safest_first_and_only_while_they_get_cheaper():
    p, cost = np.array([0.3, 0.1, 0.2, 0.2, 0.4]), np.array([2.0, 5.0, 6.0, 4.0, 1.0])
    assert in_order(p, cost).tolist() == [1, 3, 0, 4]
    assert in_order(np.zeros(0), np.zeros(0)).tolist() == []


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=8), st.tuples(BARS, BARS))
def test_exits_of_is_choose(scores, bars):
    scores, bars = np.array(scores, np.float32), np.array(bars, np.float32)
    going, want = np.ones(len(scores), bool), np.full(len(scores), 2)
    for gate in range(2):
        left = going & (choose(scores[:, [gate]], bars[[gate]]) == 0)
        want[left] = gate
        going &= ~left
    assert exits_of(scores, bars[None])[0].tolist() == want.tolist()
