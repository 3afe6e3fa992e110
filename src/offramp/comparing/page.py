"""The page of a comparison: one self-contained HTML file, its charts and tables section by
section.
"""

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
    """Write the page, and return its path. Raises MissingExtra (plotly), BadFile."""
    settings = comparison.settings
    sections = (_budgets, _models, _curves, _exits, _leaving, _certified, _clocks, _training)
    whole = frame(
        title=settings.title,
        lead=f"{len(comparison.labels())} ways to spend less under one protocol: thresholds are "
        f"chosen on "
        f"{settings.calibration}, and every figure is of {settings.test}, which nothing has seen "
        f"before. A cost of "
        "100% is that of the plain network. Means are over seeds, with the range between them in "
        "brackets.",
        sections=join(made(comparison) for made in sections),
        footer=_footer(comparison),
        figures=_charts(comparison),
        library=plotly_library(),
    )
    with replacing(path, mark=MARK, what="page") as temporary:
        temporary.write_text(whole, encoding="utf-8", errors="replace")
    return Path(path)


def _charts(comparison: Comparison) -> list[Figure]:
    """The charts of the sections; without first exits there is one less."""
    if not with_first_exit(comparison):
        return [trade_off_chart(comparison)]
    return [trade_off_chart(comparison), leaving_chart(comparison)]


def _budgets(comparison: Comparison) -> Html:
    lead = (
        "The best plan that a search finds on calibration rows within a share of the plain "
        "network's cost, and its "
        "accuracy on test rows. The best of each column is bold."
    )
    parts = [
        tag("p", lead),
        budgets_table(comparison),
        *(tag("p", doubt) for doubt in comparison.doubts()),
    ]
    if splits := splits_table(comparison):
        parts.append(folded("Over random splits of calibration and test rows", splits))
    return section("budgets", "Accuracy at equal cost", *parts, statics_table(comparison))


def _models(comparison: Comparison) -> Html:
    shown = models_table(comparison)
    if not shown:
        return Html()
    settings = comparison.settings
    lead = (
        f"One network of each method, first seed. A method with exits stands here under its plan "
        f"within {percent(settings.budgets[settings.shown], 0)} of the cost; its multiply-adds and "
        f"times are means over the rows. Bytes and parameters are those of the network with its "
        f"exits. Times are on {settings.engine}, as a share of the plain network of the first "
        f"method that is cut, taken in turn with it, with a 90% interval. For a plan the share is "
        f"that of its plain network times what the plan takes of it."
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
    title = "What each exit knows, and who leaves there"
    return section("knowing", title, *exits_tables(comparison), shares_table(comparison))


def _leaving(comparison: Comparison) -> Html:
    if not with_first_exit(comparison):
        return Html()
    lead = (
        "How many rows leave at the first exit, and how many of these are right, by the threshold "
        "of its gate "
        "(first seed and gate)."
    )
    figure = chart("leaving", "share leaving at the first exit against its threshold")
    chosen = switch("leaving", "Method", with_first_exit(comparison))
    return section("first-exit", "The first exit and its threshold", tag("p", lead), chosen, figure)


def _certified(comparison: Comparison) -> Html:
    settings = comparison.settings
    if settings.at_most is None:
        return Html()
    lead = (
        f"Plans that promise {settings.risk} ≤ {settings.at_most:.12g} against the network's own "
        f"last exit, with "
        f"{percentage(settings.confidence)} confidence, certified on the calibration rows along a "
        f"path fixed "
        "beforehand."
    )
    return section("certified", "With a promise", tag("p", lead), certified_table(comparison))


def _clocks(comparison: Comparison) -> Html:
    settings = comparison.settings
    shown = clocks_table(comparison)
    if not shown:
        return Html()
    lead = (
        f"The best plan within {percent(settings.budgets[settings.shown], 0)} of MACs on "
        f"{settings.engine}, first seed "
        "and first gate. At batch 1 it is the mean over the exits that test rows leave at. Ratios "
        "are of interleaved "
        "medians with a 90% interval; plain / plain shows the noise."
    )
    each = folded("Batch 1, exit by exit", exit_clocks_table(comparison))
    return section("clocks", "Wall-clock", tag("p", lead), shown, each)


def _training(comparison: Comparison) -> Html:
    if not (shown := training_table(comparison)):
        return Html()
    lead = (
        "Time of all epochs on the machine that trained; features that are pooled once are "
        "computed before them, and "
        "not counted."
    )
    return section("training", "Training", tag("p", lead), shown)


def _footer(comparison: Comparison) -> Html:
    settings = comparison.settings
    told = {
        "calibration": settings.calibration,
        "test": settings.test,
        "engine": settings.engine,
        "unit of cost": f"{comparison.unit:,.0f} MACs per row",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by offramp {version_text()}",
    }
    flags = [tag("pre", _flags(method)) for method in settings.methods]
    listed = tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in told.items()))
    return join((listed, folded("All flags", *flags)))


def _flags(method: Method) -> str:
    """The flags that make a method's networks, a line each."""
    told = {
        **method.asked(method.seeds[0]),
        "seeds": list(method.seeds),
        "gates": list(method.scores),
    }
    told.pop("seed", None)
    lines = [
        f"{key.replace('_', '-')} = {value}"
        for key, value in told.items()
        if value not in (None, [], "")
    ]
    return "\n".join([f"[method.{method.name}]", *lines])
