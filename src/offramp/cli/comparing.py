"""`offramp compare`: methods, gates and seeds from a TOML file of the command line's own flags."""

from __future__ import annotations

from typing import Annotated

import typer

from offramp.cli.options import AsJson, OutputFolder
from offramp.cli.printing import answer, note, table

File = Annotated[
    str, typer.Argument(metavar="FILE", help="A .toml of flags, as in the example below.")
]


def compare(file: File, output: OutputFolder, as_json: AsJson = False) -> None:
    r"""Train and measure several methods under one protocol.

    FILE has the flags of convert, cut, fit, record and calibrate, shared or for one [method.NAME],
    and seeds, gates and budgets. Every network is made once and kept in the folder. So a stopped
    comparison goes on there, and one more method in the file costs only that method. The results
    are in index.html, results.csv, curves.csv, clocks.csv and costs.csv.

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
    from offramp.comparing.writing import compare as compared
    from offramp.reporting.words import percent

    try:
        comparison = compared(file, output, say=note, progress=not as_json)
    except KeyboardInterrupt as problem:
        note(f"offramp: interrupted; the same command goes on from the files in {output}")
        raise typer.Exit(130) from problem
    # One row for each method and gate, one column for each budget; a dash without a plan.
    heads = ["accuracy within"]
    for budget in comparison.settings.budgets:
        heads.append(percent(budget, 0))
    rows = []
    for label, means in comparison.mean_accuracies().items():
        cells = [label]
        for mean in means:
            if mean is None:
                cells.append("-")
            else:
                cells.append(percent(mean, 2))
        rows.append(tuple(cells))
    shown = table(*heads, rows=rows)
    files = ", ".join(map(str, comparison.files))
    answer(comparison.to_json(), as_json, shown, f"written: {files}")
    for doubt in comparison.doubts():
        note(doubt)
