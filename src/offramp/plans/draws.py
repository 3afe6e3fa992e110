"""Rows as independent draws: which of them repeat, and an order of them that is nobody's choice. No
torch.

A promise and an interval are about rows drawn independently of each other. A row that counts forty
times looks like forty draws that agree, so every bound becomes too sure. What can be seen of that
is here: numbers of rows that repeat, and contents (digests) that repeat. Columns are those of a
trace; N rows.
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
    """Refuse rows of which one has the number of another.

    Args:
        columns: those of a trace; `row` [N] numbers the rows in their source.
        what: the part that the rows play, for the sentence ("calibration").

    Raises:
        OverlappingRows: a number repeats. Nothing allows that: one row of a source is one draw.
    """
    again = _repetitions(columns["row"])
    if again.size:
        raise OverlappingRows(
            f"{again.size:,} of the {columns['row'].size:,} {what} rows have the number of "
            f"another one "
            f"({named(columns['row'][again])}), and one row of a source is one draw; select each "
            f"row once, and where "
            "traces of several sources were joined give each row a number of its own",
            rows=columns["row"][again],
        )


def refuse_repeated_content(columns: Columns, what: str) -> None:
    """Refuse rows of which one has the content of another.

    Args:
        columns: those of a trace; `digest` [N] identifies the content of a row.
        what: the part that the rows play, for the sentence ("calibration").

    Raises:
        OverlappingRows: a content repeats. The sentence names both ways on.
    """
    again = _repetitions(columns["digest"])
    if again.size:
        raise OverlappingRows(
            f"{again.size:,} of the {columns['row'].size:,} {what} rows have the same content as "
            f"another one "
            f"({named(columns['row'][again])}); with repeats='once' copies count once (a promise "
            f"about distinct rows), "
            "with repeats='independent' all count, which is right only if each was drawn on its "
            "own, as in data of few "
            "possible values",
            rows=columns["row"][again],
        )


def repeated(columns: Columns) -> int:
    """How many rows have the same content as another one that counts already."""
    return int(_repetitions(columns["digest"]).size)


def one_of_each(columns: Columns) -> Array:
    """Positions [D], ascending, of one row of each of the D contents.

    Copies of one content can differ in their labels, so which of them counts must depend on no loss
    and on no order of the rows. They are sorted by label and number, and the content's digest draws
    one of them, each with the same
    chance: the loss that counts is the mean over the copies in expectation.
    """
    rows = canonical(columns)
    digests = columns["digest"][rows]
    if len(rows):
        starts = np.flatnonzero(np.append(True, digests[1:] != digests[:-1]))
    else:
        starts = np.zeros(0, np.intp)
    counts = np.diff(np.append(starts, len(rows)))
    drawn = (_mixed(digests[starts]) % counts.astype(np.uint64)).astype(np.intp)
    return np.sort(rows[starts + drawn])


def distinct(columns: Columns) -> Array:
    """Positions [D], ascending, of rows that share neither content nor number: what an interval may
    count.
    """
    kept = one_of_each(columns)
    by_content = kept[np.argsort(columns["digest"][kept], kind="stable")]
    _, first = np.unique(columns["row"][by_content], return_index=True)
    return np.sort(by_content[first])


def canonical(columns: Columns) -> Array:
    """Positions [N] of the rows sorted by content; copies of one content by label, then by
    number.
    """
    digest = columns["digest"]
    rows: Array = np.argsort(digest, kind="stable")
    ordered = digest[rows]
    if (ordered[1:] == ordered[:-1]).any():
        labels = [columns["label"]] if "label" in columns else []
        rows = np.lexsort((columns["row"], *labels, digest))
    return rows


def order_of(columns: Columns) -> Array:
    """The order [N] in which a betting test meets the rows, whatever order they stand in.

    A permutation drawn from the set of contents is applied to the rows in their canonical order. So
    the same rows give the same order however they are arranged, and copies of one content are
    scattered over all of it: each row is as likely to stand anywhere as under a random order, which
    is what the test assumes. (Rows sorted by a hash of their content would not do: all copies of
    one content would follow each other.)
    """
    rows = canonical(columns)
    ordered: Array = rows[order_from(_fingerprint(columns["digest"][rows]), len(rows))]
    return ordered


def split_of(columns: Columns, share: float) -> tuple[Array, Array]:
    """Positions of search rows (about `share` of N) and of the others, both in canonical order.

    Drawn from the set of contents as `order_of` is, by another stream.
    """
    rows = canonical(columns)
    searched, certified = split_from(_fingerprint(columns["digest"][rows]), len(rows), share)
    return rows[searched], rows[certified]


def _fingerprint(ordered: Array) -> str:
    """Of sorted digests: the same for every order of the rows."""
    return hashlib.sha256(ordered.astype("<u8").tobytes()).hexdigest()


def _repetitions(values: Array) -> Array:
    """Positions, ascending, of all values but the first of each kind."""
    _, first = np.unique(values, return_index=True)
    again = np.ones(len(values), bool)
    again[first] = False
    return np.flatnonzero(again)


def _mixed(digests: Array) -> Array:
    """Digests mixed once more (the finaliser of SplitMix64), so that a remainder of them is evenly
    spread.
    """
    mixed = digests + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
