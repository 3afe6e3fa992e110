"""`offramp compare`: methods, gates and seeds from a TOML file of the command line's own flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.options import AsJson, OutputFolder, writable
from offramp.cli.printing import answer, note, table
from offramp.reporting.words import percent

File = Annotated[str, typer.Argument(metavar="FILE", help="A .toml of flags; see the example below and benchmarks/.")]


def compare(file: File, output: OutputFolder, as_json: AsJson = False) -> None:
    r"""Teach and measure several methods under one protocol.

    FILE holds flags of cut, fit, record and calibrate, shared or in a [method.NAME] each, and seeds, gates and
    budgets. Every network is made once and kept in the folder: what was stopped goes on there, and a file
    with one more method costs only that method. index.html, results.csv and curves.csv tell all of it.

    Example:
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
    from offramp.comparing.page import write_page, write_tables

    writable(output, folder=True)
    try:
        found = compared(file, output, say=note)
    except KeyboardInterrupt as problem:
        note(f"offramp: interrupted; the same command goes on from what lies in {output}")
        raise typer.Exit(130) from problem
    results, curves = write_tables(found, output)
    page = write_page(found, Path(output) / "index.html")
    rows = []
    for label in found.labels():
        cells = []
        for place in range(len(found.settings.budgets)):
            points = [result.figures.budgets[place].point for result in found.of(label)]
            kept = [point.accuracy for point in points if point is not None]
            cells.append(percent(sum(kept) / len(kept), 2) if kept else "-")
        rows.append((label, *cells))
    budgets = [percent(budget, 0) for budget in found.settings.budgets]
    body = {"page": str(page), "results": str(results), "curves": str(curves), "unit_macs": found.unit}
    body["accuracy"] = {label: dict(zip(budgets, cells, strict=True)) for label, *cells in rows}
    answer(body, as_json, table("accuracy within", *budgets, rows=rows), f"written: {page}, {results}, {curves}")
