"""Answers on standard output, for people or as one JSON object; everything else goes to standard
error.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

PIPED = 200  # columns where nobody's window is: names are not cut off


def answer(body: Mapping[str, Any], as_json: bool, *shown: object) -> None:
    """Print `body` as JSON, or what is `shown`: texts, or anything that Rich can draw."""
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

            wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED
            Console(markup=False, highlight=False, emoji=False, width=wide).print(thing)


def note(text: str) -> None:
    """A word to the person, on standard error."""
    if main_process():
        typer.echo(text, err=True)


def main_process() -> bool:
    """Whether this is the process that writes and prints: of those that a launcher started the
    first, else always.
    """
    return os.environ.get("RANK", "0") == "0"


def table(*heads: str, rows: Sequence[tuple[str, ...]]) -> Any:
    """A Rich table; the first column is text, the others are figures."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, pad_edge=False)
    for index, head in enumerate(heads):
        made.add_column(head, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    return made


def plain(value: Any) -> Any:
    """The same as JSON can say it: NaN becomes null, infinities the texts "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
