"""`compare`: measure the methods of a settings file, and write the page and the tables."""

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

    Every network is made once and kept in the folder. A run that was stopped goes on where it was,
    and one more method in the file costs only that method.

    Args:
        file: a .toml of the command line's flags; `offramp compare --help` shows one.
        folder: where networks, page and tables are written.
        say: called with one line of text as each step begins.
        progress: True to show progress bars.

    Returns:
        All results; `files` has the paths of the written files.

    Raises:
        BadFile: the file cannot be read, or the folder has another file in the place of a page or
            table.
        InvalidArgument: a setting is wrong, or the folder holds a network of the same name that was
            made with other settings.
        OverlappingRows: rows are used in two roles.
        MissingExtra: plotly is not installed.
    """
    home = Path(folder)
    require_writable(home, folder=True)
    require_own_tables(home)
    require_own_file(home / PAGE, MARK, "page")
    plotly_library()  # raises before the work if plotly is missing
    comparison = measure(file, home, say=say, progress=progress)
    page = write_page(comparison, home / PAGE)
    spreadsheets = write_spreadsheets(comparison, home)
    return comparison.written((page, *spreadsheets))
