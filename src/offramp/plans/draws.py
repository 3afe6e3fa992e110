"""Rows as independent draws: which of them repeat, and an order of the rows that nobody chose. Does
not import torch.

A promise and an interval assume rows drawn independently of each other. A row that counts forty
times looks like forty draws that agree, so every bound becomes too confident. This file finds the
repetitions that can be seen: row numbers that repeat, and contents (digests) that repeat. Columns
are those of a trace; N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from offramp.errors import InvalidArgument, OverlappingRows
from offramp.guarantees.testing import order_from, split_from
from offramp.plans.provenance import named

REPEATS = ("independent", "once")

Array = np.ndarray[Any, np.dtype[Any]]
Columns = Mapping[str, Array]


def require_repeats(repeats: str | None) -> None:
    """Raise InvalidArgument unless `repeats` is None, "independent" or "once"."""
    if repeats is not None and repeats not in REPEATS:
        raise InvalidArgument(f"repeats must be 'independent' or 'once', got {repeats!r}")


def refuse_repeated_numbers(columns: Columns, what: str) -> None:
    """Refuse rows that share a number.

    Args:
        columns: those of a trace; `row` [N] numbers the rows in their source.
        what: the use of the rows, for the sentence ("calibration").

    Raises:
        OverlappingRows: a number repeats. No option allows that: one row of a source is one draw.
    """
    repetitions = _repetitions(columns["row"])
    if repetitions.size:
        rows = columns["row"][repetitions]
        raise OverlappingRows(
            f"{rows.size:,} of the {columns['row'].size:,} {what} rows have the number of another "
            f"one ({named(rows)}), and one row of a source is one draw. Select each row once. If "
            f"traces of several sources were joined, give each row a number of its own.",
            rows=rows,
        )


def refuse_repeated_content(columns: Columns, what: str) -> None:
    """Refuse rows that share their content.

    Args:
        columns: those of a trace; `digest` [N] identifies the content of a row.
        what: the use of the rows, for the sentence ("calibration").

    Raises:
        OverlappingRows: a content repeats. The message names both options.
    """
    repetitions = _repetitions(columns["digest"])
    if repetitions.size:
        rows = columns["row"][repetitions]
        raise OverlappingRows(
            f"{rows.size:,} of the {columns['row'].size:,} {what} rows have the same content as "
            f"another one ({named(rows)}); with repeats='once' copies count once (a promise about "
            f"distinct rows), with repeats='independent' all count, which is right only if each "
            f"was drawn on its own, as in data of few possible values",
            rows=rows,
        )


def repeated(columns: Columns) -> int:
    """How many rows have the same content as an earlier one."""
    return int(_repetitions(columns["digest"]).size)


def one_of_each(columns: Columns) -> Array:
    """One row of each content.

    Copies of one content can differ in their labels, so the choice must not depend on a loss or on
    the order of the rows. The copies are sorted by label and number, and the content's digest draws
    one of them. Each has the same chance, so in expectation the loss that counts is the mean over
    the copies.

    Args:
        columns: those of a trace.

    Returns:
        Positions [D], ascending, for D contents.
    """
    rows = canonical(columns)
    digests = columns["digest"][rows]
    if not len(rows):
        return np.zeros(0, np.intp)
    # sorted by content, copies follow each other: a group starts where the digest changes
    starts = np.flatnonzero(np.append(True, digests[1:] != digests[:-1]))  # [D]
    counts = np.diff(np.append(starts, len(rows)))  # [D]
    drawn = (_mixed(digests[starts]) % counts.astype(np.uint64)).astype(np.intp)
    return np.sort(rows[starts + drawn])


def distinct(columns: Columns) -> Array:
    """The rows that an interval may count: no two share their content or their number.

    Args:
        columns: those of a trace.

    Returns:
        Positions [D], ascending.
    """
    rows = one_of_each(columns)
    # of rows with the same number, the one with the smallest digest counts
    by_content = rows[np.argsort(columns["digest"][rows], kind="stable")]
    _, first = np.unique(columns["row"][by_content], return_index=True)
    return np.sort(by_content[first])


def canonical(columns: Columns) -> Array:
    """An order of the rows that does not depend on how they are arranged.

    Args:
        columns: those of a trace.

    Returns:
        Positions [N] of the rows sorted by content; copies of one content by label, then by number.
    """
    digest = columns["digest"]
    rows: Array = np.argsort(digest, kind="stable")
    ordered = digest[rows]
    if (ordered[1:] == ordered[:-1]).any():
        # lexsort sorts by its last key first
        keys = [columns["row"]]
        if "label" in columns:
            keys.append(columns["label"])
        rows = np.lexsort((*keys, digest))
    return rows


def order_of(columns: Columns) -> Array:
    """The order in which a betting test reads the rows.

    A permutation drawn from the set of contents is applied to the rows in their canonical order. So
    the same rows give the same order however they are arranged, and copies of one content are
    scattered over all of it. Each row is as likely to be at any position as under a random order,
    which is what the test assumes. (Rows sorted by a hash of their content would not do: all copies
    of one content would follow each other.)

    Args:
        columns: those of a trace.

    Returns:
        Positions [N].
    """
    rows = canonical(columns)
    ordered: Array = rows[order_from(_fingerprint(columns["digest"][rows]), len(rows))]
    return ordered


def split_of(columns: Columns, share: float) -> tuple[Array, Array]:
    """Split the rows into search rows and the others.

    Drawn from the set of contents as in `order_of`, by another stream of random numbers.

    Args:
        columns: those of a trace.
        share: the share of search rows, about.

    Returns:
        Positions of the search rows and of the others, both in canonical order.
    """
    rows = canonical(columns)
    searched, certified = split_from(_fingerprint(columns["digest"][rows]), len(rows), share)
    return rows[searched], rows[certified]


def _fingerprint(ordered: Array) -> str:
    """A fingerprint of sorted digests: the same for every order of the rows."""
    return hashlib.sha256(ordered.astype("<u8").tobytes()).hexdigest()


def _repetitions(values: Array) -> Array:
    """Positions, ascending, of all values that occurred before."""
    _, first = np.unique(values, return_index=True)
    is_repeated = np.ones(len(values), bool)
    is_repeated[first] = False
    return np.flatnonzero(is_repeated)


def _mixed(digests: Array) -> Array:
    """Digests mixed once more, so that their remainders are evenly spread."""
    # the finaliser of SplitMix64
    mixed = digests + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
