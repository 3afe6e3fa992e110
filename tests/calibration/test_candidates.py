"""Candidates found on search rows: what they let leave, where they lie, and in which order they are
tested.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.candidates import in_order, losses_up_to, trade_offs
from offramp.calibration.search import SearchProblem, exits_of
from offramp.guarantees.risks import Risk, find_risk
from offramp.plans.plan import BAND, choose
from small import trace_of

SCORES = st.sampled_from(
    [-np.inf, -1.0, 0.0, 0.00005, 0.0001, 0.5, 0.50005, 0.5002, 1.0, 7.0, np.inf, np.nan]
)
BARS = st.sampled_from([-np.inf, -1.0, 0.0, 0.00003, 0.25, 0.5, 0.50012, 1.0, np.inf])


@pytest.mark.parametrize("signed", [False, True])
def test_trade_offs_let_rows_leave_and_keep_off_the_scores(signed):
    rng = np.random.default_rng(0)
    scores = rng.random((300, 2)).astype(np.float32)
    losses = np.column_stack([rng.random(300) < 0.3, rng.random(300) < 0.1, np.zeros(300)]).astype(
        float
    )
    if signed:
        losses[:, 0] -= rng.random(300) < 0.3
    problem = SearchProblem(scores, losses, lambda open_E: np.array([1.0, 3.0, 9.0]))
    plans = trade_offs(problem, 20)
    assert plans.dtype == np.float32
    assert np.isfinite(plans).any(1).all()
    assert len(np.unique(plans, axis=0)) == len(plans) > 10
    assert not (np.abs(plans.astype(float)[:, None] - scores) < 0.9 * BAND).any()


def test_candidates_are_tested_safest_first_and_only_while_they_get_cheaper():
    p = np.array([0.3, 0.1, 0.2, 0.2, 0.4])
    cost = np.array([2.0, 5.0, 6.0, 4.0, 1.0])
    assert in_order(p, cost).tolist() == [1, 3, 0, 4]
    assert in_order(np.zeros(0), np.zeros(0)).tolist() == []


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=8), st.tuples(BARS, BARS))
def test_exits_of_is_choose(scores, bars):
    scores = np.array(scores, np.float32)
    bars = np.array(bars, np.float32)
    going = np.ones(len(scores), bool)
    want = np.full(len(scores), 2)
    for gate in range(2):
        left = going & (choose(scores[:, [gate]], bars[[gate]]) == 0)
        want[left] = gate
        going &= ~left
    assert exits_of(scores, bars[None])[0].tolist() == want.tolist()


def test_where_many_rows_crowd_there_are_candidates_and_none_at_a_tie():
    """20,000 probabilities lie closer than the band, and 30 % of them are exactly 1: between the
    others is room.
    """
    rng = np.random.default_rng(1)
    scores = np.where(rng.random((20_000, 1)) < 0.3, 1, rng.uniform(0.5, 1, (20_000, 1))).astype(
        np.float32
    )
    losses = np.column_stack([rng.random(20_000) < 1 - scores[:, 0], np.zeros(20_000)]).astype(
        float
    )
    plans = trade_offs(SearchProblem(scores, losses, lambda open_E: np.array([1.0, 9.0])), 50)
    assert len(plans) > 30
    within = (np.abs(plans.astype(float) - scores[:, 0].astype(float)) <= BAND).sum(1)
    assert within.max() <= 40  # a thousandth of the rows, give or take what a sample tells of them


@pytest.mark.parametrize("name", ["disagreement", "accuracy_gap", "error"])
def test_losses_in_blocks_are_those_of_the_trace(name, monkeypatch):
    monkeypatch.setattr("offramp.calibration.candidates.BLOCK", 64)
    trace = trace_of(300)
    losses = losses_up_to(trace, find_risk(name), "middle", 2)
    assert losses.dtype == np.int8
    assert np.array_equal(losses, trace.losses(find_risk(name), "middle")[:, :2])


def test_a_risk_of_the_users_own_sees_all_rows_at_once():
    rows = []

    def seen(answers, labels, reference):
        rows.append(len(answers))
        return np.zeros(answers.shape)

    trace = trace_of(300)
    losses_up_to(trace, Risk("own", 0.0, 1.0, False, True, seen, values=(0.0, 1.0)), "last", 3)
    assert rows == [300]
