"""`offramp compare`: methods, gates and seeds from a TOML file of the command line's own flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.options import AsJson, OutputFolder, writable
from offramp.cli.printing import answer, note, table
from offramp.reporting.words import percent

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
    from offramp.comparing.comparing import compare as compared
    from offramp.comparing.page import write_page
    from offramp.comparing.spreadsheets import write_spreadsheets
    from offramp.reporting.frame import plotly_library

    writable(output, folder=True)
    plotly_library()  # a missing one is told before the work, not after it
    try:
        found = compared(file, output, say=note, progress=not as_json)
    except KeyboardInterrupt as problem:
        note(f"offramp: interrupted; the same command goes on from what lies in {output}")
        raise typer.Exit(130) from problem
    files = (write_page(found, Path(output) / "index.html"), *write_spreadsheets(found, output))
    budgets = [percent(budget, 0) for budget in found.settings.budgets]
    means = {
        label: [sum(values) / len(values) if values else None for values in found.within(label)]
        for label in found.labels()
    }
    body = {
        "files": [str(path) for path in files],
        "unit_macs": found.unit,
        "budgets": list(found.settings.budgets),
        "accuracy": means,
    }
    rows = [(label, *("-" if mean is None else percent(mean, 2) for mean in values)) for label, values in means.items()]
    answer(body, as_json, table("accuracy within", *budgets, rows=rows), f"written: {', '.join(map(str, files))}")
