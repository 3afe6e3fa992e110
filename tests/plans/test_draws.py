"""Rows as draws: one of each content, an order and a split that the rows' own order does not
move.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import InvalidArgument, OverlappingRows
from offramp.plans.draws import (
    canonical,
    distinct,
    one_of_each,
    order_of,
    refuse_repeated_content,
    refuse_repeated_numbers,
    repeated,
    require_repeats,
    split_of,
)

CONTENTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=2, max_size=40)


def columns_of(rows: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Columns of (content, label) pairs, under numbers of their own."""
    return {
        "row": np.arange(len(rows)),
        "digest": np.array([content for content, _ in rows], np.uint64),
        "label": np.array([label for _, label in rows]),
    }


def picked(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


@given(CONTENTS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_moves_nothing(rows, shuffler):
    columns = columns_of(rows)
    moved = np.array(shuffler.sample(range(len(rows)), len(rows)))
    other = picked(columns, moved)
    for found in (canonical, order_of, one_of_each, distinct):
        here = columns["row"][found(columns)]
        there = other["row"][found(other)]
        if found in (one_of_each, distinct):
            here = np.sort(here)
            there = np.sort(there)
        assert here.tolist() == there.tolist()
    for mine, its in zip(split_of(columns, 0.4), split_of(other, 0.4), strict=True):
        assert columns["row"][mine].tolist() == other["row"][its].tolist()


@given(CONTENTS)
def test_all_rows_have_a_place_and_each_content_counts_once(rows):
    columns = columns_of(rows)
    every = list(range(len(rows)))
    assert sorted(canonical(columns)) == sorted(order_of(columns)) == every
    assert sorted(np.concatenate(split_of(columns, 0.4))) == every
    kept = one_of_each(columns)
    assert (np.diff(kept) > 0).all()
    assert sorted(columns["digest"][kept]) == sorted({content for content, _ in rows})
    assert repeated(columns) == len(rows) - len(kept)
    assert distinct(columns).tolist() == kept.tolist()  # numbers do not repeat here


def test_rows_of_one_number_count_once_in_an_interval():
    """Two augmented copies of one row have contents of their own, and its number."""
    columns = {"row": np.array([5, 6, 5, 7]), "digest": np.array([1, 2, 3, 2], np.uint64)}
    kept = distinct(columns)
    assert len(kept) == 2
    assert {5} <= set(columns["row"][kept])


def test_nothing_is_found_among_no_rows():
    none = {"row": np.zeros(0, int), "digest": np.zeros(0, np.uint64)}
    for found in (canonical, order_of, one_of_each, distinct):
        assert found(none).tolist() == []
    assert repeated(none) == 0


def test_other_contents_give_another_order():
    rows = [(content, 0) for content in range(1000)]
    order = order_of(columns_of(rows))
    other = order_of(columns_of([*rows[:-1], (5000, 0)]))
    assert (order == other).mean() < 0.02
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


def test_copies_stand_anywhere_in_the_order():
    """Of two contents, 500 rows each, none stands together."""
    columns = columns_of([(row // 500, 0) for row in range(1000)])
    met = columns["digest"][order_of(columns)].astype(int)
    runs = 1 + int((np.diff(met) != 0).sum())
    assert 430 < runs < 570


def test_labels_decide_nothing_for_contents_of_their_own():
    rows = [(content, 0) for content in range(50)]
    swapped = [(content, content % 3) for content in range(50)]
    assert order_of(columns_of(rows)).tolist() == order_of(columns_of(swapped)).tolist()


def test_the_order_is_the_same_for_ever():
    """A promise can be tested again years later: these numbers may never change."""
    columns = columns_of([(7, 0), (3, 1), (3, 0), (11, 2), (2**40, 0)])
    assert order_of(columns).tolist() == [1, 4, 2, 3, 0]
    assert one_of_each(columns).tolist() == [0, 1, 3, 4]
    assert [part.tolist() for part in split_of(columns, 0.4)] == [[0, 3], [2, 1, 4]]


def test_what_repeats_is_refused_with_all_numbers():
    columns = {"row": np.array([8, 9, 8, 4]), "digest": np.array([1, 2, 1, 1], np.uint64)}
    with pytest.raises(
        OverlappingRows, match=r"1 of the 4 test rows have the number of another one \(row 8\)"
    ):
        refuse_repeated_numbers(columns, "test")
    with pytest.raises(
        OverlappingRows, match=r"2 of the 4 test rows .* \(rows 8 and 4\)"
    ) as caught:
        refuse_repeated_content(columns, "test")
    assert caught.value.rows == (8, 4)


@pytest.mark.parametrize("word", ["Once", "", 1, True, ["once"]])
def test_what_may_be_said_of_repeats(word):
    for known in (None, "once", "independent"):
        require_repeats(known)
    with pytest.raises(InvalidArgument, match="repeats must be 'independent' or 'once', got"):
        require_repeats(word)
