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

    FILE holds flags of convert, cut, fit, record and calibrate, shared or in a [method.NAME] each,
    and seeds, gates and budgets. Every network is made once and kept in the folder: what was
    stopped goes on there, and a file with one more method costs only that method. index.html,
    results.csv, curves.csv, clocks.csv and costs.csv tell it all.

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
        found = compared(file, output, say=note, progress=not as_json)
    except KeyboardInterrupt as problem:
        note(
            f"offramp: interrupted; the same command goes on from what lies in {output}, if "
            f"anything does"
        )
        raise typer.Exit(130) from problem
    rows = []
    for label, means in found.mean_accuracies().items():
        rows.append((label, *("-" if mean is None else percent(mean, 2) for mean in means)))
    shown = table(
        "accuracy within", *(percent(budget, 0) for budget in found.settings.budgets), rows=rows
    )
    answer(found.to_json(), as_json, shown, f"written: {', '.join(map(str, found.files))}")
    for doubt in found.doubts():
        note(doubt)
