"""`compare`: measure what a settings file asks for, and write the page and the tables of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from offramp._support.replacement import require_own_file, require_writable
from offramp.comparing.comparing import Comparison, measure
from offramp.comparing.page import write_page
from offramp.comparing.spreadsheets import require_own_tables, write_spreadsheets
from offramp.reporting.frame import MARK, plotly_library

PAGE = "index.html"


def compare(
    file: str | Path,
    folder: str | Path,
    *,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Comparison:
    """Train and measure several methods under one protocol, and write index.html and the CSV
    tables.

    Every network is made once and kept in the folder: a run that was stopped goes on where it was,
    and a file with one more method costs only that method.

    Args:
        file: a .toml of the command line's flags; `offramp compare --help` shows one.
        folder: where networks, page and tables are written.
        say: called with a line for each thing that begins.
        progress: whether to draw bars.

    Returns:
        All results; `files` names what was written.

    Raises:
        BadFile: the file cannot be read, or the folder holds somebody else's page or table.
        InvalidArgument: a setting is not what it must be, or a network of the same name was made
            otherwise.
        OverlappingRows: rows have two roles.
        MissingExtra: plotly is not installed.
    """
    home = Path(folder)
    require_writable(home, folder=True)
    require_own_tables(home)
    require_own_file(home / PAGE, MARK, "page")
    plotly_library()  # a missing one is told before the work, not after it
    found = measure(file, home, say=say, progress=progress)
    written = (write_page(found, home / PAGE), *write_spreadsheets(found, home))
    return found.written(written)
