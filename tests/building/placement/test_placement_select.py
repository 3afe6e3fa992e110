"""Which places pay, from made-up costs and rows."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.building.placement.select import CutCandidate, chosen, expected, leaving, probed


def candidate(name, reach, head, *, share, rows=100, start=0):
    leaves = np.zeros(rows, dtype=bool)
    leaves[start : start + round(share * rows)] = True
    return CutCandidate(name, reach, head, leaves)


def test_break_even_is_the_exit_over_what_leaving_saves():
    one = candidate("a", 2.0, 1.0, share=0.2)
    assert one.break_even(10.0) == 1 / 8
    assert candidate("a", 2.0, 1.0, share=0.2).break_even(2.0) == float("inf")
    at_it = candidate("a", 2.0, 1.0, share=0.13)
    assert expected([at_it], 10.0) == pytest.approx(10 + 1 - 0.13 * 8)
    assert chosen([candidate("a", 2.0, 1.0, share=0.12)], 10.0) == []
    assert names(chosen([candidate("a", 2.0, 1.0, share=0.2)], 10.0)) == ["a"]


def test_a_row_pays_the_exits_on_its_way():
    first = candidate("a", 1.0, 0.5, share=0.5)
    second = candidate("b", 4.0, 0.25, share=0.7)
    by_hand = 0.5 * 1.5 + 0.2 * 4.75 + 0.3 * 10.75
    assert expected([first, second], 10.0) == pytest.approx(by_hand)
    assert expected([], 10.0) == 10.0


def names(found):
    return [one.name for one in found]


def test_the_greedy_choice():
    early = candidate("a", 1, 0.1, share=0.3)
    middle = candidate("b", 5, 0.1, share=0.6)
    late = candidate("c", 9.9, 0.1, share=1.0)
    assert names(chosen([early, middle, late], 10.0)) == ["a", "b"]
    assert names(chosen([early, middle, late], 10.0, most=1)) == ["b"]
    assert chosen([late], 10.0) == []
    assert chosen([early], 10.0, most=0) == []
    assert chosen([], 10.0) == []


def test_less_than_two_hundredths_are_not_worth_it():
    assert chosen([candidate("a", 5.0, 0.0, share=0.03)], 10.0) == []
    assert names(chosen([candidate("a", 5.0, 0.0, share=0.05)], 10.0)) == ["a"]


def test_what_a_later_choice_made_needless_is_taken_out():
    """b is the best alone, but a with c does without it."""
    a = candidate("a", 1, 0.0, share=0.5)
    b = candidate("b", 2, 1.0, share=0.9)
    c = candidate("c", 3, 0.0, share=1.0)
    assert min((a, b, c), key=lambda one: expected([one], 10.0)).name == "c"
    found = chosen([a, b, c], 10.0)
    assert names(found) == ["a", "c"]
    all_sets = [[], [a], [b], [c], [a, b], [a, c], [b, c], [a, b, c]]
    assert expected(found, 10.0) == min(expected(some, 10.0) for some in all_sets)


def test_as_many_leave_as_lose_one_in_a_hundred():
    y = np.zeros(200, dtype=int)
    scores = np.zeros((200, 2))
    scores[:, 0] = np.linspace(2, 1, 200)
    right = np.ones(200, dtype=bool)
    assert leaving(scores, y, right).all()
    scores[150, 1] = 10  # sure and wrong: the first to leave
    assert leaving(scores, y, right).sum() == 200  # one in two hundred
    scores[:10] = scores[:10, ::-1]  # ten of the surest are wrong
    assert leaving(scores, y, right).sum() == 0
    right[:10] = False  # where the model is wrong as well nothing is lost
    right[150] = False
    assert leaving(scores, y, right).all()


def test_rows_that_tie_leave_together():
    scores = np.tile([1.0, 0.0], (50, 1))
    y = np.zeros(50, dtype=int)
    y[40:] = 1
    assert not leaving(scores, y, np.ones(50, dtype=bool)).any()


def test_the_probe_learns_on_even_rows_and_answers_for_odd_ones():
    dice = np.random.default_rng(0)
    y = dice.integers(0, 3, 400)
    x = np.eye(3)[y] + 0.1 * dice.normal(size=(400, 3))
    # two columns that say nothing
    features = np.column_stack([x, np.full(400, 7.0), np.zeros(400)])
    assert (probed(features, y, 3).argmax(1) == y[1::2]).mean() > 0.99
    swapped = y.copy()
    swapped[1::2] = (y[1::2] + 1) % 3
    np.testing.assert_array_equal(probed(features, y, 3), probed(features, swapped, 3))
    nothing = probed(np.zeros((400, 2)), y, 3)
    np.testing.assert_allclose(nothing, np.tile(np.eye(3)[y[::2]].mean(0), (200, 1)))


def test_the_probe_is_ridge_regression():
    dice = np.random.default_rng(1)
    x = dice.normal(size=(60, 4))
    y = dice.integers(0, 2, 60)
    train_model = (x[::2] - x[::2].mean(0)) / x[::2].std(0)
    held = (x[1::2] - x[::2].mean(0)) / x[::2].std(0)
    targets = np.eye(2)[y[::2]]
    weights = np.linalg.solve(
        train_model.T @ train_model + 0.1 * 4 * np.eye(4),
        train_model.T @ (targets - targets.mean(0)),
    )
    np.testing.assert_allclose(probed(x, y, 2), held @ weights + targets.mean(0), atol=1e-10)
