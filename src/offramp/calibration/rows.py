"""The rows that a promise is tested on, chosen before anything is computed on them. No torch."""

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

# share of rows seen before that nobody minds where rows are said to be independent draws
SLACK = 0.02
CONTENTS = 8  # of fewer contents two draws often have equal frequencies
ALIKE = 1e-5  # how often independent draws may look that much like the rows seen before
DEVIATIONS = 4.0  # standard deviations above the share that chance would give


@dataclass(frozen=True)
class Selected:
    """Rows of a trace that count, and what was decided about the others.

    Attributes:
        trace: the rows that count.
        dropped: how many rows were left out because they had a part in the network or the plan.
        repeated: how many rows have the content of another one: left out under repeats="once", else
            counted.
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
        repeats: what to do with rows of equal content; None refuses them, "independent" counts all,
            "once" one of each.
        drop_seen: leave out the rows that trained the network, and those among `seen`, instead of
            refusing them.
        what: the part that the rows play, for sentences ("calibration", "test").
        seen: rows that had a part in the plan. Under repeats="once" they have counted already, and
            are left out too.

    Raises:
        OverlappingRows: rows repeat, or had a part before, and nothing was said about it.
        InvalidArgument: `repeats` is none of these words, or no row is left.
    """
    require_repeats(repeats)
    refuse_repeated_numbers(trace.columns, what)
    kept, dropped = unseen_rows(trace, drop_seen=drop_seen, what=what, seen=seen, repeats=repeats)
    again = repeated(kept.columns)
    if again and repeats is None:
        refuse_repeated_content(kept.columns, what)
    if again and repeats == "once":
        kept = kept[one_of_each(kept.columns)]
    return Selected(kept, dropped, again)


def unseen_rows(
    trace: Trace,
    *,
    drop_seen: bool,
    what: str,
    seen: SeenRows | None = None,
    repeats: str | None = None,
) -> tuple[Trace, int]:
    """The rows that had no part in the network or the plan, and how many were left out for that.

    Args as those of `independent_rows`. Raises OverlappingRows, and InvalidArgument where no row is
    left.
    """
    out = np.zeros(len(trace), bool)
    if drop_seen:
        out |= trace.columns.get("learned", out)
    else:
        refuse_training_rows(trace.columns, what)
    if seen is not None:
        used = seen.shared(trace.columns["digest"], what, trace.header.digest_form)
        if drop_seen or repeats == "once":
            out |= used
        elif (
            repeats is None
            or _more_than_chance(used, seen)
            or _too_alike(trace.columns["digest"], seen.digests)
        ):
            _refuse_seen(trace, what, seen, independent=repeats is not None)
    if not out.any():
        return trace, 0
    if out.all():
        raise InvalidArgument(
            f"all {len(trace):,} {what} rows had a part in the network or the plan before, and "
            f"none is left; give rows "
            "that were used for nothing before"
        )
    return trace[~out], int(out.sum())


def _more_than_chance(used: Array, seen: SeenRows) -> bool:
    """Whether more rows have the content of rows seen before than independent draws of the same
    source would.

    Of n draws, as many meet the content of another one as a new draw meets the content of these n.
    So the share of the rows seen before that repeat each other is what to expect of new rows.

    Args:
        used: whether the content of a row was seen before, bool [N].
        seen: those rows.
    """
    if not used.any():
        return False
    _, counts = np.unique(seen.digests, return_counts=True)
    before = int(counts.sum())
    expected = (int(counts[counts > 1].sum()) + 1) / (before + 2)
    deviation = math.sqrt(expected * (1 - expected) * (1 / len(used) + 1 / max(before, 1)))
    return float(used.mean()) > expected + max(SLACK, DEVIATIONS * deviation)


def _too_alike(digests: Array, before: Array) -> bool:
    """Whether contents are as frequent as they were before to a degree that two draws of one source
    never are.

    Pearson's statistic of two samples, with its lower tail: so it tells the same rows, or all but a
    few of them, where the data has few possible contents.

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
    """Refuse rows that had a part in the plan, and name the ways on."""
    try:
        seen.refuse_overlap(
            trace.columns["digest"], what, trace.columns["row"], trace.header.digest_form
        )
    except OverlappingRows as problem:
        if independent:
            way = (
                "leave these out with drop_seen=True. They are too many, or too much alike, for "
                "rows that were each "
                "drawn on their own"
            )
        else:
            way = (
                "leave these out with drop_seen=True, or say repeats='independent' if rows of "
                "equal content "
                "were each drawn on their own"
            )
        raise OverlappingRows(f"{problem}, {way}", rows=problem.rows) from None


def searched_and_certified(
    trace: Trace, search: Trace | None, share: float, repeats: str | None
) -> tuple[Trace, Trace]:
    """The rows that give candidates and those that test them, apart from each other and in
    canonical order.

    The canonical order makes the candidates independent of how the rows stand in their files.
    """
    if search is None:
        searched, certified = split_of(trace.columns, share)
        return trace[searched], trace[certified]
    apart = _apart(trace, search, repeats)
    return apart[canonical(apart.columns)], trace


def _apart(trace: Trace, search: Trace, repeats: str | None) -> Trace:
    """The search rows that are none of the rows of `trace`."""
    shared = search.seen.shared(trace.columns["digest"], "calibration", trace.header.digest_form)
    same = _same_rows(trace, search)
    if same.any():
        rows = trace.columns["row"][same]
        raise OverlappingRows(
            f"{rows.size:,} of the {len(trace):,} calibration rows ({named(rows)}) also stand "
            f"among the "
            f"{len(search):,} search rows, and one row of a source is one draw; give "
            "search rows that were used for nothing before",
            rows=rows,
        )
    if not shared.any() or repeats == "independent":
        return search
    if repeats is None:
        rows = trace.columns["row"][shared]
        raise OverlappingRows(
            f"{rows.size:,} of the {len(trace):,} calibration rows ({named(rows)}) have the "
            f"content of search rows; "
            "with repeats='once' such search rows are left out, with repeats='independent' they "
            "stay, which is right "
            "only if each row was drawn on its own",
            rows=rows,
        )
    kept = ~np.isin(search.columns["digest"], trace.columns["digest"])
    if not kept.any():
        raise InvalidArgument(
            "every search row has the content of a calibration row, and none is left; give other "
            "search rows"
        )
    return search[kept]


def _same_rows(trace: Trace, search: Trace) -> Array:
    """Which rows [N] of `trace` are rows of `search` by their numbers, where both count in the same
    source.

    The source is the same if it has the same name, as a spec has one, or if all rows of equal
    number have equal content. Two arrays have no names, and row 5 of the one is not row 5 of the
    other.
    """
    numbers, first = np.unique(search.columns["row"], return_index=True)
    index = np.searchsorted(numbers, trace.columns["row"]).clip(0, max(len(numbers) - 1, 0))
    same: Array = (
        numbers[index] == trace.columns["row"] if len(numbers) else np.zeros(len(trace), bool)
    )
    digests = search.columns["digest"][first]
    equal = digests[index] == trace.columns["digest"] if len(numbers) else same
    named_alike = ":" in trace.header.data and _source(trace.header.data) == _source(
        search.header.data
    )
    return same if named_alike or equal[same].all() else np.zeros(len(trace), bool)


def _source(data: str) -> str:
    """The name of a source without the selections behind it."""
    return re.sub(r"(\[[^\[\]]*\]| \([0-9,]+ rows\))+$", "", data)
