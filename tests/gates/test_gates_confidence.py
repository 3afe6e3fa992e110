"""Scores from logits: right against a slow reference, finite at the edges, and in one
orientation.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.building.factories import make_gate
from offramp.gates.confidence import margin, max_prob, neg_entropy
from offramp.networks.nodes import Seen, grade

ROWS = st.lists(
    st.lists(st.floats(-120, 120, width=32), min_size=3, max_size=3), min_size=1, max_size=5
)


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


@given(ROWS)
def test_against_the_formula(rows):
    logits = torch.tensor(rows)
    chances = [softmax(row) for row in rows]
    for score, want in (
        (margin, [sorted(row)[-1] - sorted(row)[-2] for row in rows]),
        (max_prob, [max(row) for row in chances]),
        (neg_entropy, [sum(p * math.log(p) for p in row if p > 0) for row in chances]),
    ):
        got = score(logits)
        assert got.shape == (len(rows),)
        assert got.tolist() == pytest.approx(want, abs=2e-5, rel=1e-5)
        assert got.isfinite().all()


@pytest.mark.parametrize(
    "score",
    [margin, max_prob, neg_entropy],
)
def test_higher_is_surer(score):
    surer = torch.stack(
        [torch.zeros(4), *(t * torch.tensor([3.0, 1, 0, -1]) for t in (0.1, 0.5, 1, 2))]
    )
    scores = score(surer)
    assert (scores.diff() > 0).all()


def test_the_edges():
    sure = torch.tensor([[120.0, 0.0], [0.0, -500.0], [1e30, -1e30]])
    assert neg_entropy(sure).tolist() == pytest.approx([0, 0, 0])
    assert max_prob(sure).tolist() == [1, 1, 1]
    assert margin(sure).tolist() == [120, 500, pytest.approx(2e30)]
    even = torch.zeros(1, 10)
    assert neg_entropy(even).item() == pytest.approx(-math.log(10))
    assert max_prob(even).item() == pytest.approx(0.1)
    assert margin(even).item() == 0


def test_margins_tell_apart_what_probabilities_cannot():
    logits = torch.tensor([[20.0, 0.0], [40.0, 0.0]])
    assert max_prob(logits)[0] == max_prob(logits)[1]
    assert margin(logits)[0] < margin(logits)[1]


@pytest.mark.parametrize("score", [margin, max_prob, neg_entropy])
def test_nan_is_not_hidden(score):
    assert score(torch.tensor([[math.nan, 1.0], [1.0, 2.0]])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("score", [neg_entropy])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_score_that_says_so_is_nan_for_every_logit_that_is_not_finite(score, bad, where):
    assert score.spreads_nan
    logits = torch.tensor([[5.0, 1.0, 0.0], [120.0, -120.0, 0.0], [0.0, 0.0, 0.0]])
    logits[:, where] = bad
    assert score(logits).isnan().all()


def test_only_scores_that_say_so_do_without_the_check_of_their_logits():
    seen = Seen(torch.zeros(2, 3), {})
    logits = torch.tensor([[5.0, 1.0, -math.inf], [5.0, 1.0, 0.0]])
    for name in ("margin", "max_prob", "neg_entropy"):
        gate = make_gate(name, ())
        assert grade(gate, seen, logits).isnan().tolist() == [True, False], name
