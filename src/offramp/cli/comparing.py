"""`offramp compare`: methods, gates and seeds from a TOML file of the command line's own flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.options import AsJson, OutputFolder, writable
from offramp.cli.printing import answer, note, table

File = Annotated[str, typer.Argument(metavar="FILE", help="A .toml of flags, as in the example below.")]


def compare(file: File, output: OutputFolder, as_json: AsJson = False) -> None:
    r"""Teach and measure several methods under one protocol.

    FILE holds flags of cut, fit, record and calibrate, shared or in a [method.NAME] each, and seeds, gates and
    budgets. Every network is made once and kept in the folder: what was stopped goes on there, and a file
    with one more method costs only that method. index.html, results.csv, curves.csv and clocks.csv tell it all.

    Example:
      offramp compare methods.toml -o comparison/       # where methods.toml says:
        train = "digits[0:800]"
        calibration = "digits[800:1300]"
        test = "digits[1300:]"
        model = "offramp:digits_large"
        at = "2,5"
        [method.joint]
        recipe = "joint"
        gates = ["own", "max_prob"]
    """
    from offramp._support.replacement import require_own_file
    from offramp.comparing.comparing import compare as compared
    from offramp.comparing.page import write_page
    from offramp.comparing.spreadsheets import require_own_tables, write_spreadsheets
    from offramp.reporting.frame import MARK, plotly_library
    from offramp.reporting.words import percent

    writable(output, folder=True)
    require_own_tables(Path(output))
    require_own_file(Path(output) / "index.html", MARK, "page")
    plotly_library()  # a missing one is told before the work, not after it
    try:
        found = compared(file, output, say=note, progress=not as_json)
    except KeyboardInterrupt as problem:
        note(f"offramp: interrupted; the same command goes on from what lies in {output}, if anything does")
        raise typer.Exit(130) from problem
    files = (write_page(found, Path(output) / "index.html"), *write_spreadsheets(found, output))
    means = {
        label: [sum(values) / len(values) if values else None for values in found.within(label)]
        for label in found.labels()
    }
    budgets = found.settings.budgets
    body = {"files": [*map(str, files)], "unit_macs": found.unit, "budgets": list(budgets), "accuracy": means}
    rows = [(label, *("-" if mean is None else percent(mean, 2) for mean in each)) for label, each in means.items()]
    shown = table("accuracy within", *(percent(budget, 0) for budget in budgets), rows=rows)
    answer(body, as_json, shown, f"written: {', '.join(map(str, files))}")
    for doubt in found.doubts():
        note(doubt)
