"""All figures on the page of a comparison as CSV. A cell without a value is empty.

All files begin with method, seed and gate ("own" is the gate that the network was cut or trained
with).

results.csv   a line per aim: `budget 0.5` (the best plan within that share of the plain cost),
              `certified`, `static`
    static                  True for a network that is not cut
    accuracy                share of test rows with a right output
    cost, worst             mean and worst cost of a row, in shares of the plain network of the
                            first method that is cut
    macs                    mean cost of a row in multiply-adds
    shares                  of test rows by exit, shallow to deep, a slash between them
    splits_low, _median, _high   accuracy over random splits of calibration and test rows: 5 %,
                                 median, 95 %
    seconds                 of all epochs that trained the network
curves.csv    a line per plan of a curve: exact frontier, p^k, anytime; accuracy, cost and worst as
              above
clocks.csv    a line per batch, of the first seed and gate of a method
    batch, exit             rows per batch; at batch 1 the exit that the row left at, or `mean` over
                            test rows
    run_ms, plain_ms        milliseconds per batch of the plan, and of the plain network in the same
                            run
    ratio, low, high        run / plain, and the ends of its 90 % interval
    same                    plain / plain, which shows the noise
costs.csv     a line per method and batch (none where nothing was timed), if a method is static or
              converted; of the first seed
    parameters, bytes       of the network with its exits, in a file
    macs, bit_operations    of a row in its model without exits
    batch, ms, unit_ms      milliseconds per batch of that model, and of the plain network of the
                            first method that is cut, in the same run
    ratio, low, high, same  ms / unit_ms, the ends of its 90 % interval, and unit_ms / unit_ms
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from offramp._support.arguments import require_path
from offramp._support.files import write_csv
from offramp._support.replacement import require_own_file
from offramp.comparing.clocks import each_exit, in_use
from offramp.comparing.comparing import Comparison, Result
from offramp.comparing.curves import KINDS
from offramp.comparing.figures import Point

START = ("method", "seed", "gate")
SPLITS = ("splits_low", "splits_median", "splits_high")
RESULTS = (
    *START,
    "static",
    "aim",
    "accuracy",
    "cost",
    "worst",
    "macs",
    "shares",
    *SPLITS,
    "seconds",
)
CURVES = (*START, "curve", "accuracy", "cost", "worst")
CLOCKS = (*START, "batch", "exit", "run_ms", "plain_ms", "ratio", "low", "high", "same")

COSTS = (
    *START,
    "parameters",
    "bytes",
    "macs",
    "bit_operations",
    *("batch", "ms", "unit_ms", "ratio", "low", "high", "same"),
)

Row = Sequence[object]


def write_spreadsheets(comparison: Comparison, folder: str | Path) -> tuple[Path, ...]:
    """Write results.csv, curves.csv and, if they have lines, clocks.csv and costs.csv.

    Args:
        comparison: with all results.
        folder: where the files are written.

    Returns:
        The paths of the files.

    Raises:
        BadFile: a file of the same name is not such a table, or cannot be written.
    """
    home = require_path("folder", folder)
    results: list[Row] = []
    curves: list[Row] = []
    for result in comparison.results:
        results.extend(_results(result, comparison.unit))
        curves.extend(_curves(result, comparison.unit))
    files: list[tuple[str, Sequence[str], list[Row]]] = [
        ("results.csv", RESULTS, results),
        ("curves.csv", CURVES, curves),
        ("clocks.csv", CLOCKS, list(_clocks(comparison))),
        ("costs.csv", COSTS, list(_costs(comparison))),
    ]
    written = []
    for name, head, rows in files:
        if rows:  # clocks.csv only if something was timed
            write_csv(home / name, head, rows, what="table of a comparison")
            written.append(home / name)
    return tuple(written)


def require_own_tables(folder: Path) -> None:
    """Raise BadFile, before the work, if a file of the same name is not such a table."""
    for name in ("results.csv", "curves.csv", "clocks.csv", "costs.csv"):
        require_own_file(folder / name, ",".join(START).encode(), "table of a comparison")


def _start(result: Result) -> Row:
    """The first cells of every line."""
    return result.method, result.seed, result.gate


def _results(result: Result, unit: float) -> Iterator[Row]:
    """The lines of results.csv for one network under one gate."""
    figures = result.figures
    aims: list[tuple[str, Point | None, Sequence[float | None]]] = []
    for budget in figures.budgets:
        aims.append((f"budget {budget.budget:g}", budget.point, budget.over_splits))
    if result.static:
        aims.append(("static", figures.anytime[0], ()))
    if figures.certified is not None:
        aims.append(("certified", figures.certified, ()))
    for aim, point, splits in aims:
        values: Row = (None,) * 5  # no plan is within the budget
        if point is not None:
            shares = "/".join(f"{share:.4f}" for share in point.shares)
            values = (*_places(point, unit), point.cost, shares)
        splits = splits or (None,) * 3
        yield (*_start(result), result.static, aim, *values, *splits, result.seconds)


def _curves(result: Result, unit: float) -> Iterator[Row]:
    """The lines of curves.csv for one network under one gate."""
    for kind, points_of in KINDS.items():
        for point in points_of(result.figures):
            yield (*_start(result), kind, *_places(point, unit))


def _places(point: Point, unit: float) -> tuple[float, float, float]:
    """Accuracy, mean cost and worst cost of a plan."""
    return point.accuracy, point.cost / unit, point.worst / unit


def _clocks(comparison: Comparison) -> Iterator[Row]:
    """The lines of clocks.csv."""
    for result in comparison.results:
        if result.timed is None or not result.figures.budgets:
            continue
        point = result.figures.budgets[comparison.settings.shown].point
        if point is None:
            continue
        for clock in (*in_use(result.timed, point.shares), *each_exit(result.timed)):
            # At batch 1 there is a clock for each exit, and one for the mean over test rows.
            exit_ = clock.exit
            if exit_ is None and clock.batch == 1:
                exit_ = "mean"
            times = (clock.run_ms, clock.plain_ms, *clock.ratio, clock.same)
            yield (*_start(result), clock.batch, exit_, *times)


def _costs(comparison: Comparison) -> Iterator[Row]:
    for result in comparison.results:
        cost = result.cost
        if cost is None:
            continue
        size = (cost.parameters, cost.stored_bytes, cost.macs, cost.bit_operations)
        if not cost.times:
            yield (*_start(result), *size, *(None,) * 7)
        for line in cost.times:
            ratio = line.over_unit
            times = (line.batch, line.ms, line.unit_ms, ratio.value, ratio.low, ratio.high)
            yield (*_start(result), *size, *times, line.same.value)
