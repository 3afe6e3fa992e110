"""Progress of long passes, on standard error: a bar in a terminal, otherwise a line every ten
seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

SILENCE = 10.0  # seconds between two lines without a terminal
PAUSE = 1.0  # after more seconds than this, a pass does not continue the one before it

T = TypeVar("T")


class _Stopwatch:
    """The times of the last line and of the end of the last pass, shared by all passes.

    Otherwise a run of many short passes would stay silent, because none of them takes ten seconds.
    """

    line = 0.0
    ended = 0.0


def track(items: Iterable[T], *, what: str, total: float | None, show: bool) -> Iterator[T]:
    """Yield the items and show how far the pass is.

    Args:
        items: the items.
        what: the name of the pass.
        total: number of items; None if it is not known.
        show: False prints nothing.
    """
    if not show:
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, what, total)
    else:
        yield from _lines(items, what, total)


def _bar(items: Iterable[T], what: str, total: float | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(
        items, description=what, total=total, console=Console(stderr=True), transient=True
    )


def _lines(items: Iterable[T], what: str, total: float | None) -> Iterator[T]:
    start = time.monotonic()
    if start - _Stopwatch.ended > PAUSE:
        _Stopwatch.line = start
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - _Stopwatch.line >= SILENCE and count != total:
            _Stopwatch.line = now
            print(_line(what, count, total, now - start), file=sys.stderr, flush=True)
    _Stopwatch.ended = time.monotonic()


def _line(what: str, count: int, total: float | None, seconds: float) -> str:
    if not total:
        return f"{what}: {count:,} batches in {seconds:.0f} s"
    left = seconds * max(total - count, 0) / count
    return f"{what}: {count:,} of {total:,.0f} batches, about {left:.0f} s left"
