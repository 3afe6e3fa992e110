"""Risks: the three named ones by hand, the user's own with every way to get it wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offramp.errors import BadData, InvalidArgument, UnknownName
from offramp.guarantees import risks
from offramp.guarantees.risks import Risk, find_risk, losses_of

ANSWERS = np.array([[1, 1, 1], [2, 1, 1], [1, 2, 2], [0, 3, 1]])
LABELS = np.array([1, 1, 1, 2])


def of(name, labels=LABELS, reference=2):
    return losses_of(find_risk(name), ANSWERS, labels, reference)


def test_named_risks_by_hand():
    np.testing.assert_array_equal(of("disagreement"), [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(of("accuracy_gap"), [[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(of("error"), [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
    assert of("error").dtype == np.float64


def test_the_reference_may_be_any_exit():
    np.testing.assert_array_equal(of("disagreement", reference=1)[3], [1, 0, 1])
    np.testing.assert_array_equal(of("accuracy_gap", reference=0)[1:3], [[0, -1, -1], [0, 1, 1]])


@given(
    hnp.arrays(np.int64, (7, 4), elements=st.integers(0, 3)),
    hnp.arrays(np.int64, 7, elements=st.integers(0, 3)),
)
def test_a_promise_on_disagreement_is_one_on_accuracy(answers, labels):
    gap = losses_of(find_risk("accuracy_gap"), answers, labels, 3)
    assert (gap <= losses_of(find_risk("disagreement"), answers, None, 3)).all()
    wrong = losses_of(find_risk("error"), answers, labels, 3)
    np.testing.assert_array_equal(gap, wrong - wrong[:, [3]])


def test_facts_that_calibrate_relies_on():
    facts = {
        risk.name: (risk.low, risk.binary, risk.needs_labels, risk.zero_at_reference)
        for risk in risks.NAMED
    }
    assert facts == {
        "disagreement": (0, True, False, True),
        "accuracy_gap": (-1, False, True, True),
        "error": (0, True, True, False),
    }


def test_find_by_name_by_function_and_as_is():
    own = Risk("own", 0, 1, False, False, risks.disagreement)
    assert find_risk(own) is own
    assert not own.binary  # nobody said that it is only 0 and 1
    assert find_risk(risks.error) is find_risk("error")


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'accuracy_gap'"):
        find_risk("acuracy-gap")
    with pytest.raises(UnknownName, match="build a Risk of your own"):
        find_risk("zzz")
    with pytest.raises(InvalidArgument, match=r"Risk\('returning', low="):
        find_risk(returning)


@pytest.mark.parametrize("name", ["accuracy_gap", "error"])
def test_without_labels_disagreement_is_offered(name):
    with pytest.raises(InvalidArgument, match=f"'{name}'.*'disagreement'"):
        of(name, labels=None)
    with pytest.raises(InvalidArgument, match=f"'{name}'.*'disagreement'"):
        getattr(risks, name)(ANSWERS, None, 2)
    assert of("disagreement", labels=None).shape == (4, 3)


def test_a_risk_may_read_the_logits():
    def brier_gap(logits_NEC, labels, reference):
        p = np.exp(logits_NEC) / np.exp(logits_NEC).sum(-1, keepdims=True)
        brier = ((p - np.eye(4)[labels][:, None]) ** 2).sum(-1)
        return brier - brier[:, [reference]]

    risk = Risk("brier_gap", -2, 2, True, True, brier_gap, reads="outputs")
    logits = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
    losses = losses_of(risk, ANSWERS, LABELS, 2, outputs=logits)
    np.testing.assert_array_equal(losses, brier_gap(logits, LABELS, 2))
    assert losses.any()
    with pytest.raises(InvalidArgument, match="record the trace with its logits"):
        losses_of(risk, ANSWERS, LABELS, 2)
    with pytest.raises(InvalidArgument, match=r"logits of shape \(4, 2, 4\)"):
        losses_of(risk, ANSWERS, LABELS, 2, outputs=logits[:, :2])


def returning(losses, **more):
    return Risk("own", 0.0, 1.0, False, more.pop("zero", False), lambda *_: losses, **more)


@pytest.mark.parametrize(
    ("risk", "told"),
    [
        (returning(np.zeros((4, 2))), r"numbers of shape \(4, 3\), got float64 of shape \(4, 2\)"),
        (returning(np.full((4, 3), None)), "got object"),
        (
            returning(np.where(ANSWERS == 3, np.nan, 0.5)),
            r"got nan \(first at row 3, exit 1\)",
        ),
        (returning(np.where(ANSWERS == 3, 1.25, 0.5)), r"in \[0\.0, 1\.0\], got 1\.25"),
        (returning(np.where(ANSWERS == 3, -0.1, 0.5)), r"-0\.1"),
        (returning(np.full((4, 3), 0.5), values=(0.0, 1.0)), r"only the values .* got 0\.5"),
        (returning((ANSWERS == 3) | (ANSWERS == 1), zero=True), "for the reference itself"),
    ],
)
def test_what_a_risk_returns_is_checked(risk, told):
    with pytest.raises(InvalidArgument, match=told):
        losses_of(risk, ANSWERS, None, 2)


def test_what_a_risk_states_is_checked():
    for low, high in [(1, 0), (0, 0), (0, np.inf), (np.nan, 1)]:
        with pytest.raises(InvalidArgument, match="two finite numbers"):
            Risk("own", low, high, False, False, risks.error)
    with pytest.raises(InvalidArgument, match="values of the risk"):
        Risk("own", 0, 1, False, False, risks.error, values=(0, 2))
    with pytest.raises(InvalidArgument, match="must be 'answers' or 'outputs'"):
        Risk("own", 0, 1, False, False, risks.error, reads="logits")


def test_rows_are_checked():
    risk = find_risk("error")
    with pytest.raises(BadData, match="answers must be integers"):
        losses_of(risk, ANSWERS.astype(float), LABELS, 2)
    with pytest.raises(BadData, match=r"labels of shape \(3,\) for 4 rows"):
        losses_of(risk, ANSWERS, LABELS[:3], 2)
    for reference in (-1, 3):
        with pytest.raises(InvalidArgument, match="index of an exit, 0 to 2"):
            losses_of(risk, ANSWERS, LABELS, reference)
