"""The page and the tables of a comparison: one self-contained HTML file, and everything on it as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from offramp.comparing.comparing import Comparison, Result
from offramp.comparing.curves import KINDS, leaving_chart, trade_off_chart
from offramp.comparing.figures import Budget, Point
from offramp.files import replacing
from offramp.reporting.charts import Figure
from offramp.reporting.frame import frame, plotly_library, version_text
from offramp.reporting.markup import Html, chart, folded, join, section, switch, table, tag
from offramp.reporting.words import percent

DASH = "–"


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Write the HTML page, and return its path. Raises MissingExtra, BadFile."""
    library = plotly_library()
    parts = [
        _at_budgets(comparison),
        _trade_off(comparison),
        _exits(comparison),
        _leaving(comparison),
        _certified(comparison),
        _clock(comparison),
        _teaching(comparison),
    ]
    settings = comparison.settings
    seeds = max(len(comparison.of(label)) for label in comparison.labels())
    whole = frame(
        title=settings.title,
        lead=f"{len(comparison.labels())} ways to leave early, {seeds} seeds at most, under one protocol: thresholds are "
        f"chosen on {settings.calibration}, and every figure is of {settings.test}, which nothing has seen before. "
        "A cost of 100% is that of the plain network.",
        sections=join(part for part, _ in parts),
        footer=_footer(comparison),
        figures=[figure for _, figures in parts for figure in figures],
        library=library,
    )
    with replacing(path) as temporary:
        temporary.write_text(whole, encoding="utf-8", errors="replace")
    return Path(path)


def write_tables(comparison: Comparison, folder: str | Path) -> tuple[Path, Path]:
    """results.csv (a line per method, seed, gate and aim) and curves.csv (a line per point of a curve)."""
    home = Path(folder)
    results, curves = home / "results.csv", home / "curves.csv"
    head = (
        "method",
        "seed",
        "gate",
        "static",
        "aim",
        "accuracy",
        "cost",
        "worst",
        "macs",
        "shares",
        "median",
        "seconds",
    )
    _write(results, head, (row for result in comparison.results for row in _rows(result, comparison.unit)))
    _write(
        curves,
        ("method", "seed", "gate", "curve", "cost", "accuracy", "worst"),
        (
            (result.method, result.seed, result.gate, kind, *_plain(point, comparison.unit))
            for result in comparison.results
            for kind, of in KINDS.items()
            for point in of(result.figures)
        ),
    )
    return results, curves


def _plain(point: Point, unit: float) -> tuple[float, float, float]:
    return point.cost / unit, point.accuracy, point.worst / unit


def _rows(result: Result, unit: float) -> Iterable[Sequence[object]]:
    start = (result.method, result.seed, result.gate, result.static)
    told: list[tuple[str, Point | None, str]] = [
        (f"budget {budget.budget:g}", budget.point, _median(budget)) for budget in result.figures.budgets
    ]
    if result.static:
        told = [("static", result.figures.anytime[0], "")]
    if result.figures.certified is not None:
        told.append(("certified", result.figures.certified, ""))
    for aim, point, median in told:
        if point is None:
            yield (*start, aim, "", "", "", "", "", median, result.seconds)
            continue
        shares = "/".join(f"{share:.4f}" for share in point.shares)
        cost, accuracy, worst = _plain(point, unit)
        yield (*start, aim, accuracy, cost, worst, point.cost, shares, median, result.seconds)


def _median(budget: Budget) -> str:
    return f"{budget.over_splits[1]:.6f}" if budget.over_splits else ""


def _write(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(["" if value is None else value for value in row] for row in rows)


def _spread(values: Sequence[float]) -> str:
    """The mean over seeds, and the range between them."""
    if not values:
        return DASH
    mean = percent(float(np.mean(values)), 2)
    return mean if len(values) == 1 else f"{mean} [{percent(min(values), 2)}, {percent(max(values), 2)}]"


def _at_budgets(comparison: Comparison) -> tuple[Html, list[Figure]]:
    budgets = comparison.settings.budgets
    head = ["", *(f"within {percent(budget, 0)}" for budget in budgets)]
    means = {
        label: [
            [b.point.accuracy for r in comparison.of(label) if (b := r.figures.budgets[place]).point is not None]
            for place in range(len(budgets))
        ]
        for label in comparison.labels()
    }
    best = [
        max((float(np.mean(m[place])) for m in means.values() if m[place]), default=2) for place in range(len(budgets))
    ]
    rows = [
        (
            label,
            *(
                _bold(_spread(values), bool(values) and float(np.mean(values)) == top)
                for values, top in zip(m, best, strict=True)
            ),
        )
        for label, m in means.items()
    ]
    inside = [
        tag("p", "The best plan that a search finds on calibration rows within a share of the plain network's cost, and "
            "its accuracy on test rows: mean over seeds and, in brackets, the range between them. The best of each column "
            "is bold."),
        table("accuracy within a budget", head, rows),
    ]  # fmt: skip
    if any(budget.over_splits for result in comparison.results for budget in result.figures.budgets):
        inside.append(folded("Over random splits of calibration and test rows", _splits(comparison)))
    statics = [
        (label, percent(comparison.of(label)[0].figures.plain / comparison.unit), _spread([r.figures.alone[-1] for r in comparison.of(label)]))
        for label in comparison.labels(static=True)
    ]  # fmt: skip
    if statics:
        inside.append(table("static networks of the family, beside", ["", "cost", "accuracy"], statics))
    return section("budgets", "Accuracy at equal cost", *inside), []


def _bold(words: str, bold: bool) -> str:
    return tag("b", words) if bold else words


def _splits(comparison: Comparison) -> Html:
    rows = []
    for label in comparison.labels():
        spread = [budget.over_splits for budget in comparison.of(label)[0].figures.budgets]
        cells = [
            f"{percent(b, 2)} [{percent(a, 2)}, {percent(c, 2)}]" if each else DASH
            for each in spread
            for a, b, c in [each or (0.0, 0.0, 0.0)]
        ]
        rows.append((label, *cells))
    caption = f"first seed: median and 5 to 95 % over {comparison.settings.splits} splits of the same sizes"
    return table(caption, ["", *(f"within {percent(each, 0)}" for each in comparison.settings.budgets)], rows)


def _trade_off(comparison: Comparison) -> tuple[Html, list[Figure]]:
    lead = (
        "The exact frontier is our search over all thresholds; p^k gives exit k a share of rows that is a power of one "
        "number, as MSDNet does for a batch with a budget; anytime answers every row at exit 1, 2, and so on. Thresholds "
        "are from calibration rows, places from test rows. Squares are static networks. A click on a name hides or shows it."
    )
    place = chart("trade-off", "accuracy against mean cost; the figures stand in the tables", tall=True)
    whole = section("curves", "Accuracy against cost", tag("p", lead), switch("trade-off", "Curve", list(KINDS)), place)
    return whole, [trade_off_chart(comparison)]


def _exits(comparison: Comparison) -> tuple[Html, list[Figure]]:
    tables = []
    names: dict[tuple[str, ...], list[str]] = {}
    for label in comparison.labels():
        result = comparison.of(label)[0]
        if result.gate == comparison.settings.method(result.method).gates[0]:
            names.setdefault(result.figures.exits, []).append(label)
    for exits, labels in names.items():
        rows = [
            (comparison.of(label)[0].method, *(_spread([r.figures.alone[place] for r in comparison.of(label)]) for place in range(len(exits))))
            for label in labels
        ]  # fmt: skip
        tables.append(table("accuracy of each exit on all test rows", ["", *exits], rows))
    shares = _shares(comparison)
    return section("exits", "What each exit knows, and who leaves there", *tables, shares), []


def _shares(comparison: Comparison) -> Html:
    budgets = comparison.settings.budgets
    place = int(np.argmin([abs(budget - comparison.settings.wall_clock_budget) for budget in budgets]))
    rows = []
    for label in comparison.labels():
        point = comparison.of(label)[0].figures.budgets[place].point
        if point is not None:
            told = " / ".join(f"{100 * share:.0f}" for share in point.shares)
            cost, worst = percent(point.cost / comparison.unit), percent(point.worst / comparison.unit)
            rows.append((label, cost, worst, told))
    head = ["", "mean cost", "worst case", "% of rows by exit, shallow to deep"]
    return table(
        f"plans within {percent(budgets[place], 0)}, first seed: the mean falls, the worst case does not", head, rows
    )


def _leaving(comparison: Comparison) -> tuple[Html, list[Figure]]:
    lead = "How many rows leave at the first exit, and how many of these are right, by the threshold of its gate (first seed)."
    place = chart("leaving", "share leaving at the first exit against its threshold")
    parts = (tag("p", lead), switch("leaving", "Method", comparison.labels()), place)
    return section("leaving-section", "The first exit and its threshold", *parts), [leaving_chart(comparison)]


def _certified(comparison: Comparison) -> tuple[Html, list[Figure]]:
    settings = comparison.settings
    if settings.at_most is None:
        return Html(), []
    rows = []
    for label in comparison.labels():
        results = comparison.of(label)
        found = [result.figures.certified for result in results]
        points = [point for point in found if point is not None]
        cost = _spread([point.cost / comparison.unit for point in points])
        lost = [
            result.figures.alone[-1] - point.accuracy for result, point in zip(results, found, strict=True) if point
        ]
        rows.append(
            (label, f"{len(points)} of {len(found)}", cost, f"{100 * float(np.mean(lost)):+.2f}" if lost else DASH)
        )
    lead = (
        f"Plans that promise {settings.risk} ≤ {settings.at_most:g} against the network's own last exit, with "
        f"{percent(settings.confidence, 0)} confidence, certified on the calibration rows along a path fixed beforehand."
    )
    head = ["", "seeds with a plan", "cost on test rows", "points lost on test rows"]
    return section("certified", "With a promise", tag("p", lead), table("certified plans", head, rows)), []


def _clock(comparison: Comparison) -> tuple[Html, list[Figure]]:
    rows = []
    for label in comparison.labels():
        for line in (comparison.of(label)[0].timed or {}).get("lines", ()):
            over, same = line["over_plain"], line["same"]
            left = " / ".join(map(str, line["left"]))
            times = f"{line['run_ms']:.2f} ms", f"{line['plain_ms']:.2f} ms"
            ratio = f"{over['value']:.3f} [{over['low']:.3f}, {over['high']:.3f}]"
            rows.append((label, str(line["batch"]), left, *times, ratio, f"{same['value']:.3f}"))
    if not rows:
        return Html(), []
    lead = (
        f"The best plan within {percent(comparison.settings.wall_clock_budget, 0)} of MACs, the first seed, on "
        f"{comparison.settings.engine}: ratio of interleaved medians with a 90% interval; plain / plain shows the noise. "
        "At batch 1 there is a line for each exit that a row leaves at."
    )
    head = ["", "batch", "rows by exit", "run", "plain", "run / plain", "plain / plain"]
    return section("clock", "Wall-clock", tag("p", lead), table("milliseconds per batch", head, rows)), []


def _teaching(comparison: Comparison) -> tuple[Html, list[Figure]]:
    rows = []
    for method in comparison.settings.methods:
        seconds = [r.seconds for r in comparison.results if r.method == method.name and r.seconds is not None]
        seconds = seconds[:: max(1, len(method.gates) if not method.static else 1)]
        if seconds:
            told = f"{np.mean(seconds):.1f} s" + (
                f" [{min(seconds):.1f}, {max(seconds):.1f}]" if len(seconds) > 1 else ""
            )
            rows.append((method.name, method.recipe or DASH, " ".join(method.arguments) or DASH, told))
    head = ["", "recipe", "with", "seconds"]
    lead = (
        "Time of all epochs, on the machine that made this page; features that are pooled once are counted by neither."
    )
    return section("teaching", "Teaching", tag("p", lead), table("seconds of teaching by seed", head, rows)), []


def _footer(comparison: Comparison) -> Html:
    settings = comparison.settings
    told = {
        "calibration": settings.calibration,
        "test": settings.test,
        "engine": settings.engine,
        "unit of cost": f"{comparison.unit:,.0f} MACs per row",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by offramp {version_text()}",
    }
    flags = [
        tag("pre", f"[method.{method.name}]\n" + "\n".join(f"{k} = {v}" for k, v in method.asked(method.seeds[0]).items() if v not in (None, [], "")))
        for method in settings.methods
    ]  # fmt: skip
    listed = tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in told.items()))
    return join((listed, folded("All flags", *flags)))
