"""The page of a comparison: one self-contained HTML file with charts and tables."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from offramp._support.arguments import percentage
from offramp._support.files import replacing
from offramp.comparing.comparing import Comparison
from offramp.comparing.curves import KINDS, leaving_chart, trade_off_chart, with_first_exit
from offramp.comparing.settings import Method
from offramp.comparing.tables import (
    budgets_table,
    certified_table,
    clocks_table,
    exit_clocks_table,
    exits_tables,
    models_table,
    shares_table,
    splits_table,
    statics_table,
    training_table,
)
from offramp.reporting.charts import Figure
from offramp.reporting.frame import MARK, frame, plotly_library, version_text
from offramp.reporting.markup import Html, chart, folded, join, section, switch, tag
from offramp.reporting.words import percent


def write_page(comparison: Comparison, path: str | Path) -> Path:
    """Write the page.

    Args:
        comparison: with all results.
        path: of the HTML file.

    Returns:
        The path.

    Raises:
        MissingExtra: plotly is not installed.
        BadFile: the path has a file that is not such a page, or cannot be written.
    """
    settings = comparison.settings
    lead = (
        f"{len(comparison.labels())} ways to spend less under one protocol: thresholds are "
        f"chosen on {settings.calibration}, and every figure is of {settings.test}, which nothing "
        "has seen before. A cost of 100% is that of the plain network. Means are over seeds, with "
        "the range between them in brackets."
    )
    write_section = (_budgets, _models, _curves, _exits, _leaving, _certified, _clocks, _training)
    sections = [write(comparison) for write in write_section]
    page = frame(
        title=settings.title,
        lead=lead,
        sections=join(sections),
        footer=_footer(comparison),
        figures=_charts(comparison),
        library=plotly_library(),
    )
    with replacing(path, mark=MARK, what="page") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return Path(path)


def _charts(comparison: Comparison) -> list[Figure]:
    """The charts of the sections; without first exits there is one less."""
    if not with_first_exit(comparison):
        return [trade_off_chart(comparison)]
    return [trade_off_chart(comparison), leaving_chart(comparison)]


def _budgets(comparison: Comparison) -> Html:
    """Accuracy within each budget."""
    lead = (
        "The best plan that a search finds on calibration rows within a share of the plain "
        "network's cost, and its accuracy on test rows. The best of each column is bold."
    )
    parts = [tag("p", lead), budgets_table(comparison)]
    for doubt in comparison.doubts():
        parts.append(tag("p", doubt))
    splits = splits_table(comparison)
    if splits:
        parts.append(folded("Over random splits of calibration and test rows", splits))
    return section("budgets", "Accuracy at equal cost", *parts, statics_table(comparison))


def _models(comparison: Comparison) -> Html:
    """Size, operations and times of every model; empty if all methods have one model."""
    shown = models_table(comparison)
    if not shown:
        return Html()
    settings = comparison.settings
    lead = (
        "One network of each method, first seed. A method with exits is measured under its plan "
        f"within {percent(settings.budgets[settings.shown], 0)} of the cost; its multiply-adds and "
        "times are means over the rows. Bytes and parameters are those of the network with its "
        f"exits. Times are on {settings.engine}, as a share of the plain network of the first "
        "method that is cut, measured in turn with it, with a 90% interval. For a plan the share "
        "is that of its plain network times the plan's share of it."
    )
    return section("models", "Every model at its cost", tag("p", lead), shown)


def _curves(comparison: Comparison) -> Html:
    lead = (
        "The exact frontier is our search over all thresholds; p^k gives exit k a share of rows "
        "that is a power of one "
        "number, as MSDNet does for a batch with a budget; anytime answers every row at exit 1, "
        "2, and so on. "
        "Thresholds are from calibration rows, places from test rows. A band is the range between "
        "seeds; marks with a "
        "name are static networks. A click on a name hides or shows its curve."
    )
    figure = chart(
        "trade-off", "accuracy against mean cost; the figures stand in the tables", tall=True
    )
    return section(
        "curves",
        "Accuracy against cost",
        tag("p", lead),
        switch("trade-off", "Curve", list(KINDS)),
        figure,
    )


def _exits(comparison: Comparison) -> Html:
    """The accuracy of each exit, and the shares of rows."""
    title = "What each exit knows, and who leaves there"
    return section("knowing", title, *exits_tables(comparison), shares_table(comparison))


def _leaving(comparison: Comparison) -> Html:
    """The chart of the first exit; empty if only networks with forks are compared."""
    if not with_first_exit(comparison):
        return Html()
    lead = (
        "How many rows leave at the first exit, and how many of these are right, by the threshold "
        "of its gate (first seed and gate)."
    )
    figure = chart("leaving", "share leaving at the first exit against its threshold")
    chosen = switch("leaving", "Method", with_first_exit(comparison))
    return section("first-exit", "The first exit and its threshold", tag("p", lead), chosen, figure)


def _certified(comparison: Comparison) -> Html:
    """Plans with a promise; empty if none was requested."""
    settings = comparison.settings
    if settings.at_most is None:
        return Html()  # without at-most there is no promise to show
    lead = (
        f"Plans that promise {settings.risk} ≤ {settings.at_most:.12g} against the network's own "
        f"last exit, with {percentage(settings.confidence)} confidence, certified on the "
        "calibration rows along a path fixed beforehand."
    )
    return section("certified", "With a promise", tag("p", lead), certified_table(comparison))


def _clocks(comparison: Comparison) -> Html:
    """Wall-clock times; empty if nothing was timed."""
    settings = comparison.settings
    shown = clocks_table(comparison)
    if not shown:
        return Html()
    lead = (
        f"The best plan within {percent(settings.budgets[settings.shown], 0)} of MACs on "
        f"{settings.engine}, first seed and first gate. At batch 1 it is the mean over the exits "
        "that test rows leave at. Ratios are of interleaved medians with a 90% interval; plain / "
        "plain shows the noise."
    )
    by_exit = folded("Batch 1, exit by exit", exit_clocks_table(comparison))
    return section("clocks", "Wall-clock", tag("p", lead), shown, by_exit)


def _training(comparison: Comparison) -> Html:
    """Seconds of training; empty if nothing was trained."""
    shown = training_table(comparison)
    if not shown:
        return Html()
    lead = (
        "Time of all epochs on the machine that trained. Features that are pooled once are "
        "computed before them, and not counted."
    )
    return section("training", "Training", tag("p", lead), shown)


def _footer(comparison: Comparison) -> Html:
    """Where the figures come from, and all flags."""
    settings = comparison.settings
    entries = {
        "calibration": settings.calibration,
        "test": settings.test,
        "engine": settings.engine,
        "unit of cost": f"{comparison.unit:,.0f} MACs per row",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by offramp {version_text()}",
    }
    flags = [tag("pre", _flags(method)) for method in settings.methods]
    listed = []
    for name, value in entries.items():
        listed.append(join((tag("dt", name), tag("dd", value))))
    return join((tag("dl", *listed), folded("All flags", *flags)))


def _flags(method: Method) -> str:
    """The flags of a method's networks, a line each. Flags without a value are left out."""
    flags = method.asked(method.seeds[0])
    # The flags of the first seed, with all seeds and gates in the place of its own.
    flags.pop("seed", None)
    flags["seeds"] = list(method.seeds)
    flags["gates"] = list(method.scores)
    lines = [f"[method.{method.name}]"]
    for key, value in flags.items():
        if value not in (None, [], ""):
            lines.append(f"{key.replace('_', '-')} = {value}")
    return "\n".join(lines)
