"""Parts of messages: the first line of another error, and the first of many names."""

from __future__ import annotations

from collections.abc import Iterable


def first_line(problem: BaseException) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    line = str(problem).strip().partition("\n")[0]
    return line or type(problem).__name__


def few(names: Iterable[object], most: int) -> str:
    """The first names, and how many more there are.

    >>> few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    texts = [str(name) for name in names]
    listed = ", ".join(texts[:most])
    if len(texts) > most:
        listed += f" and {len(texts) - most} more"
    return listed
