"""A progress bar on long passes, on standard error, only where someone watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], *, what: str, total: float | None, show: bool) -> Iterator[T]:
    """Yield the items; with `show`, and a terminal at standard error, draw a bar that says how long it will take."""
    if not show or not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    yield from bar(items, description=what, total=total, console=Console(stderr=True), transient=True)
