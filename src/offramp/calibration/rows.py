"""The rows that a promise is tested on, chosen before anything is computed on them. Does not import
torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from scipy import stats

from offramp.errors import InvalidArgument, OverlappingRows
from offramp.plans.draws import (
    Array,
    canonical,
    one_of_each,
    refuse_repeated_content,
    refuse_repeated_numbers,
    repeated,
    require_repeats,
    split_of,
)
from offramp.plans.provenance import SeenRows, named, refuse_training_rows
from offramp.plans.trace import Trace

# If rows are independent draws, this share of rows seen before is allowed beyond chance.
SLACK = 0.02
CONTENTS = 8  # with fewer contents, two draws often have equal frequencies
ALIKE = 1e-5  # the probability that independent draws look so similar to the rows seen before
DEVIATIONS = 4.0  # standard deviations above the share that chance would give


@dataclass(frozen=True)
class Selected:
    """Rows of a trace that count, and how many others there were.

    Attributes:
        trace: the rows that count.
        dropped: how many rows were left out because the network or the plan was made from them.
        repeated: how many rows have the content of another one. They are left out under
            repeats="once", and counted otherwise.
    """

    trace: Trace
    dropped: int
    repeated: int


def independent_rows(
    trace: Trace, *, repeats: str | None, drop_seen: bool, what: str, seen: SeenRows | None = None
) -> Selected:
    """The rows of a trace that may count as independent draws.

    Args:
        trace: the rows.
        repeats: how to count rows of equal content. None refuses them, "independent" counts all,
            "once" one of each.
        drop_seen: leave out the rows that trained the network, and those among `seen`, instead of
            refusing them.
        what: the use of the rows, for messages ("calibration", "test").
        seen: rows that the plan was made from. Under repeats="once" they were counted already, and
            are left out too.

    Returns:
        The rows that count, and how many others there were.

    Raises:
        OverlappingRows: rows repeat or were used before, and no argument allows it.
        InvalidArgument: `repeats` is none of these words, or no row is left.
    """
    require_repeats(repeats)
    refuse_repeated_numbers(trace.columns, what)
    unseen, dropped = unseen_rows(trace, drop_seen=drop_seen, what=what, seen=seen, repeats=repeats)
    copies = repeated(unseen.columns)
    if copies and repeats is None:
        refuse_repeated_content(unseen.columns, what)
    if copies and repeats == "once":
        unseen = unseen[one_of_each(unseen.columns)]
    return Selected(unseen, dropped, copies)


def unseen_rows(
    trace: Trace,
    *,
    drop_seen: bool,
    what: str,
    seen: SeenRows | None = None,
    repeats: str | None = None,
) -> tuple[Trace, int]:
    """The rows that neither the network nor the plan was made from.

    Args:
        trace: the rows.
        drop_seen: leave out the other rows instead of refusing them.
        what: the use of the rows, for messages.
        seen: rows that the plan was made from.
        repeats: how to count rows of equal content, as in `independent_rows`.

    Returns:
        The rows, and how many others were left out.

    Raises:
        OverlappingRows: rows were used before, and no argument allows it.
        InvalidArgument: no row is left.
    """
    is_out = np.zeros(len(trace), bool)
    if drop_seen:
        is_out |= trace.columns.get("learned", is_out)
    else:
        refuse_training_rows(trace.columns, what)
    if seen is not None:
        digests = trace.columns["digest"]
        is_seen = seen.shared(digests, what, trace.header.digest_form)
        if drop_seen or repeats == "once":
            is_out |= is_seen
        elif repeats is None:
            _refuse_seen(trace, what, seen, independent=False)
        elif _more_than_chance(is_seen, seen) or _too_alike(digests, seen.digests):
            # equal content may be chance in independent draws, but not in this degree
            _refuse_seen(trace, what, seen, independent=True)
    if not is_out.any():
        return trace, 0
    if is_out.all():
        raise InvalidArgument(
            f"all {len(trace):,} {what} rows were used for the network or the plan, and none is "
            f"left. Use rows that were not used before."
        )
    return trace[~is_out], int(is_out.sum())


def _more_than_chance(is_seen: Array, seen: SeenRows) -> bool:
    """Whether more rows have the content of rows seen before than independent draws would.

    Of n draws, as many share their content with another one as a new draw shares its content with
    these n. So the share of the rows seen before that repeat each other is what to expect of new
    rows.

    Args:
        is_seen: whether the content of a row was seen before, bool [N].
        seen: those rows.
    """
    if not is_seen.any():
        return False
    _, counts = np.unique(seen.digests, return_counts=True)
    before = int(counts.sum())
    # one and two more than were counted: a share of 0 or 1 would have no deviation
    expected = (int(counts[counts > 1].sum()) + 1) / (before + 2)
    variance = expected * (1 - expected) * (1 / len(is_seen) + 1 / max(before, 1))
    deviation = math.sqrt(variance)
    return float(is_seen.mean()) > expected + max(SLACK, DEVIATIONS * deviation)


def _too_alike(digests: Array, before: Array) -> bool:
    """Whether the frequencies of contents are more similar than two independent draws ever give.

    This notices the same rows, or all but a few of them, where the data has few possible contents.
    It is Pearson's statistic of two samples, C contents, with its lower tail.

    Args:
        digests: of some rows, uint64 [N].
        before: of rows seen before, uint64 [M].
    """
    contents, index = np.unique(np.concatenate([digests, before]), return_inverse=True)
    if len(contents) < CONTENTS or not len(digests) or not len(before):
        return False
    now_C = np.bincount(index[: len(digests)], minlength=len(contents))
    before_C = np.bincount(index[len(digests) :], minlength=len(contents))
    share = len(digests) / (len(digests) + len(before))
    expected_C = (now_C + before_C) * share
    statistic = float(((now_C - expected_C) ** 2 / (expected_C * (1 - share))).sum())
    return bool(stats.chi2.cdf(statistic, len(contents) - 1) < ALIKE)


def _refuse_seen(trace: Trace, what: str, seen: SeenRows, *, independent: bool) -> None:
    """Refuse rows that the plan was made from, and name the options."""
    try:
        seen.refuse_overlap(
            trace.columns["digest"], what, trace.columns["row"], trace.header.digest_form
        )
    except OverlappingRows as problem:
        if independent:
            options = (
                "Or leave these out with drop_seen=True. They are too many, or too similar, for "
                "rows that were each drawn on their own."
            )
        else:
            options = (
                "Or leave these out with drop_seen=True, or say repeats='independent' if rows of "
                "equal content were each drawn on their own."
            )
        raise OverlappingRows(f"{problem} {options}", rows=problem.rows) from None


def searched_and_certified(
    trace: Trace, search: Trace | None, share: float, repeats: str | None
) -> tuple[Trace, Trace]:
    """Split the rows into those that give candidates and those that test them.

    The rows that give candidates are in canonical order, so the candidates do not depend on how
    the rows are arranged in their files.

    Args:
        trace: calibration rows.
        search: other rows that give candidates, or None to take them from `trace`.
        share: the share of `trace` that gives candidates, without `search`.
        repeats: how to count rows of equal content.

    Returns:
        The search rows and the rows that certify. They share no row.

    Raises:
        OverlappingRows: search rows are among the rows of `trace`.
        InvalidArgument: no search row is left.
    """
    if search is None:
        searched, certified = split_of(trace.columns, share)
        return trace[searched], trace[certified]
    apart = _apart(trace, search, repeats)
    return apart[canonical(apart.columns)], trace


def _apart(trace: Trace, search: Trace, repeats: str | None) -> Trace:
    """The search rows that are not among the rows of `trace`."""
    shared = search.seen.shared(trace.columns["digest"], "calibration", trace.header.digest_form)
    same = _same_rows(trace, search)
    if same.any():
        rows = trace.columns["row"][same]
        raise OverlappingRows(
            f"{rows.size:,} of the {len(trace):,} calibration rows ({named(rows)}) are also among "
            f"the {len(search):,} search rows, and one row of a source is one draw. Use search "
            f"rows that were not used before.",
            rows=rows,
        )
    if not shared.any() or repeats == "independent":
        return search
    if repeats is None:
        rows = trace.columns["row"][shared]
        raise OverlappingRows(
            f"{rows.size:,} of the {len(trace):,} calibration rows ({named(rows)}) have the "
            f"content of search rows; with repeats='once' these search rows are left out, with "
            f"repeats='independent' they stay, which is right only if each row was drawn on its "
            f"own",
            rows=rows,
        )
    is_new = ~np.isin(search.columns["digest"], trace.columns["digest"])
    if not is_new.any():
        raise InvalidArgument(
            "every search row has the content of a calibration row, and none is left; give other "
            "search rows"
        )
    return search[is_new]


def _same_rows(trace: Trace, search: Trace) -> Array:
    """Which rows [N] of `trace` are rows of `search`, if both number the rows of the same source.

    The source is the same if it has the same name, as a data spec has, or if all rows of equal
    number have equal content. Two arrays do not have names: row 5 of one is not row 5 of the other.
    """
    is_none = np.zeros(len(trace), bool)
    numbers, first = np.unique(search.columns["row"], return_index=True)
    if not len(numbers):
        return is_none
    # For each row of the trace, the search row of the same number, where there is one. searchsorted
    # gives the position where the number would be inserted.
    position = np.searchsorted(numbers, trace.columns["row"]).clip(0, len(numbers) - 1)
    has_same_number: Array = numbers[position] == trace.columns["row"]
    digests = search.columns["digest"][first]
    has_same_content = digests[position] == trace.columns["digest"]
    if has_same_content[has_same_number].all():
        return has_same_number
    has_name = ":" in trace.header.data
    if has_name and _source(trace.header.data) == _source(search.header.data):
        return has_same_number
    return is_none


def _source(data: str) -> str:
    """The name of a source without the selections behind it."""
    return re.sub(r"(\[[^\[\]]*\]| \([0-9,]+ rows\))+$", "", data)
