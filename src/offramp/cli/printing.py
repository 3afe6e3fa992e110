"""Results on standard output, as text or as one JSON object; all else goes to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

PIPED = 200  # columns of a table without a terminal, so that names are not cut off


def answer(body: Mapping[str, Any], as_json: bool, *shown: object) -> None:
    """Print the result of a command.

    Args:
        body: the result as plain data.
        as_json: True prints `body` as JSON, False prints `shown`.
        *shown: the result for people: texts, or objects that Rich can draw.
    """
    if not main_process():
        return
    if as_json:
        typer.echo(json.dumps(plain(body), indent=1, allow_nan=False))
        return
    for thing in shown:
        if isinstance(thing, str):
            typer.echo(thing)
        else:
            from rich.console import Console

            width: int | None = PIPED
            if sys.stdout.isatty() or "COLUMNS" in os.environ:
                width = None  # Rich finds it
            Console(markup=False, highlight=False, emoji=False, width=width).print(thing)


def note(text: str) -> None:
    """Print a note to the user, on standard error."""
    if main_process():
        typer.echo(text, err=True)


def main_process() -> bool:
    """Whether this process writes and prints.

    A launcher such as torchrun starts several processes, and only the first one does.
    """
    return os.environ.get("RANK", "0") == "0"


def table(*heads: str, rows: Sequence[tuple[str, ...]]) -> Any:
    """A Rich table. The first column is text, the others are figures."""
    from rich import box
    from rich.table import Table

    first, *others = heads
    drawn = Table(box=box.SIMPLE, pad_edge=False)
    drawn.add_column(first, justify="left")
    for head in others:
        drawn.add_column(head, justify="right")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def plain(value: Any) -> Any:
    """A value as JSON can have it: NaN becomes null, infinities the texts "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return None
    return str(value)
