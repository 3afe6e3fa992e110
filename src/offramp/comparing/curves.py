"""Curves of a comparison as data for plotly.js.

A line is the mean over seeds; a band around it is the range between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.comparing.comparing import Comparison, Result
from offramp.comparing.figures import Figures, Point
from offramp.plans.evaluation import Array
from offramp.reporting.charts import SHARE, SYMBOLS, Figure, figure, safe

COLOURS = tuple(f"--s{number}" for number in range(1, 9))
DASHES = ("solid", "dash", "dot", "dashdot")
GRID = 60  # places along the cost axis at which seeds are averaged
FEW = "anytime"  # the curve with a point per exit, at the same costs for every seed

KINDS: dict[str, Callable[[Figures], Sequence[Point]]] = {
    "exact frontier": lambda figures: figures.frontier,
    "p^k, as in MSDNet": lambda figures: figures.powers,
    FEW: lambda figures: figures.anytime,
}


@dataclass(frozen=True)
class Curve:
    """A curve over seeds.

    Attributes:
        cost: shares of the unit [P], rising.
        mean: accuracy [P] at each cost, as the mean over seeds.
        least: the smallest accuracy [P] of any seed.
        largest: the largest accuracy [P] of any seed.
    """

    cost: Array
    mean: Array
    least: Array
    largest: Array


@dataclass(frozen=True)
class Style:
    """How a line looks. Methods differ in colour, the gates of a method in dashes.

    Attributes:
        colour: name of a CSS variable.
        dash: a dash style of plotly.
        shown: whether the line is visible when the page opens.
    """

    colour: str
    dash: str
    shown: bool


def trade_off_chart(comparison: Comparison) -> Figure:
    """Accuracy against mean cost on test rows.

    The chart has one choice per kind of curve. Static networks are marked in each of them.
    """
    choices = []
    for kind in KINDS:
        choices.append({"data": _plane(comparison, kind), "layout": _layout()})
    return figure("trade-off", *choices)


def leaving_chart(comparison: Comparison) -> Figure:
    """The share of rows that leave at the first exit, against its threshold.

    The chart has one choice per method, of its first seed and first gate.
    """
    choices = []
    for label in with_first_exit(comparison):
        thresholds = []
        shares = []
        accuracies = []
        for threshold, share, accuracy in comparison.of(label)[0].figures.leaving:
            thresholds.append(threshold)
            shares.append(share)
            accuracies.append(accuracy)
        lines = [
            _line("leave at the first exit", thresholds, shares, 0),
            _line("of these are right", thresholds, accuracies, 1),
        ]
        layout = {
            "xaxis": {"title": {"text": "threshold of the first gate"}},
            "yaxis": {**SHARE, "range": [0, 1.03]},
            "showlegend": True,
        }
        choices.append({"data": lines, "layout": layout})
    return figure("leaving", *choices)


def with_first_exit(comparison: Comparison) -> list[str]:
    """The leading labels of networks whose rows may leave at a first exit: those without forks."""
    return [label for label in comparison.leading() if comparison.of(label)[0].figures.leaving]


def averaged(results: Sequence[Result], kind: str, unit: float) -> Curve:
    """A curve over seeds.

    Args:
        results: of one method and gate, one per seed.
        kind: a key of `KINDS`.
        unit: MACs per row that costs are divided by.

    Returns:
        Point by point if all seeds have points at the same costs; otherwise accuracies are
        interpolated on a grid of costs.
    """
    costs_by_seed = []
    accuracies_by_seed = []
    cheapest = []  # by seed
    dearest = []
    for result in results:
        costs, accuracies = _along(KINDS[kind](result.figures), unit)
        costs_by_seed.append(costs)
        accuracies_by_seed.append(accuracies)
        cheapest.append(costs[0])
        dearest.append(costs[-1])
    if kind == FEW or len(results) == 1:
        grid = np.mean(costs_by_seed, axis=0)
        on_grid = np.array(accuracies_by_seed)  # [seeds, P]
    else:
        # only the range of costs that every seed covers, so that nothing is extrapolated
        low = max(cheapest)
        high = min(dearest)
        grid = np.linspace(low, max(low, high), GRID)
        interpolated = []
        for costs, accuracies in zip(costs_by_seed, accuracies_by_seed, strict=True):
            interpolated.append(np.interp(grid, costs, accuracies))
        on_grid = np.array(interpolated)  # [seeds, GRID]
    return Curve(grid, on_grid.mean(0), on_grid.min(0), on_grid.max(0))


def _along(points: Sequence[Point], unit: float) -> tuple[Array, Array]:
    """Costs in shares of the unit, rising, and the accuracies at them."""
    order = sorted(points, key=lambda point: (point.cost, point.accuracy))
    costs = np.array([point.cost / unit for point in order])
    accuracies = np.array([point.accuracy for point in order])
    return costs, accuracies


def _styles(comparison: Comparison) -> dict[str, Style]:
    """A style by label: the next colour for a new method, the next dash for a further gate."""
    styles: dict[str, Style] = {}
    gates: dict[str, int] = {}  # method -> how many of its gates have a style
    for label in comparison.labels():
        method = comparison.of(label)[0].method
        number = gates.setdefault(method, 0)
        colour = COLOURS[list(gates).index(method) % len(COLOURS)]
        styles[label] = Style(colour, DASHES[number % len(DASHES)], number == 0)
        gates[method] += 1
    return styles


def _plane(comparison: Comparison, kind: str) -> list[dict[str, Any]]:
    """The lines and bands of one kind of curve, and the marks of the static networks."""
    traces = []
    for label, style in _styles(comparison).items():
        results = comparison.of(label)
        if not KINDS[kind](results[0].figures):  # a network with forks has no plans by p^k
            continue
        curve = averaged(results, kind, comparison.unit)
        traces.append(_curve(label, curve, style, len(results), kind == FEW))
        if len(results) > 1:
            traces.append(_band(label, curve, style))
    return [*traces, *_statics(comparison)]


def _curve(label: str, curve: Curve, style: Style, seeds: int, few: bool) -> dict[str, Any]:
    """A line. The lines of further gates appear when a reader clicks their name in the legend."""
    count = "one seed"
    if seeds > 1:
        count = f"{seeds} seeds"
    mode = "lines"
    if few:
        mode = "lines+markers"
    hover = []
    points = zip(curve.cost, curve.mean, curve.least, curve.largest, strict=True)
    for cost, mean, least, largest in points:
        words = f"<b>{safe(label)}</b> ({count})<br>cost {cost:.1%} of plain<br>accuracy {mean:.2%}"
        if seeds > 1:
            words += f" ({least:.2%} to {largest:.2%})"
        hover.append(words)
    return {
        "type": "scatter",
        "mode": mode,
        "name": safe(label),
        "legendgroup": label,
        "x": curve.cost.tolist(),
        "y": curve.mean.tolist(),
        "hovertext": hover,
        "hoverinfo": "text",
        "line": {"color": style.colour, "width": 2, "dash": style.dash},
        "marker": {"color": style.colour, "size": 7},
        "visible": _visible(style),
    }


def _visible(style: Style) -> bool | str:
    """Whether plotly shows a line at first, or only its name in the legend."""
    if style.shown:
        return True
    return "legendonly"


def _band(label: str, curve: Curve, style: Style) -> dict[str, Any]:
    """The range between seeds, shown and hidden with its line."""
    # an outline: along the largest accuracies to the right, back along the least
    return {
        "type": "scatter",
        "mode": "lines",
        "legendgroup": label,
        "showlegend": False,
        "x": [*curve.cost.tolist(), *curve.cost[::-1].tolist()],
        "y": [*curve.largest.tolist(), *curve.least[::-1].tolist()],
        "fill": "toself",
        "fillcolor": style.colour,
        "opacity": 0.12,
        "line": {"color": style.colour, "width": 0},
        "hoverinfo": "skip",
        "visible": _visible(style),
    }


def _statics(comparison: Comparison) -> list[dict[str, Any]]:
    """Networks that are not cut, and the plain network of the first method that is."""
    marks = []
    for number, label in enumerate(comparison.labels(static=True)):
        points = [result.figures.anytime[0] for result in comparison.of(label)]
        marks.append(_mark(label, points, comparison.unit, number))

    # The network whose plain cost is the unit: every row goes to its last exit.
    unit = comparison.unit
    cut = [result for result in comparison.results if not result.static]
    first = next(result for result in cut if result.figures.plain == unit)
    plain = []
    for result in comparison.of(first.label):
        cost = result.figures.plain
        plain.append(Point(cost, cost, result.figures.alone[-1], ()))
    mark = _mark(f"{first.method}'s last exit", plain, unit, 0)
    mark["marker"] = {"color": "--ink", "size": 12, "symbol": "diamond"}
    return [*marks, mark]


def _mark(label: str, points: Sequence[Point], unit: float, number: int) -> dict[str, Any]:
    """The mark of a static network: one point, the mean over its seeds."""
    accuracies = [point.accuracy for point in points]
    cost = points[0].cost / unit
    position = "bottom center"
    if cost > 0.75:  # so that the name stays inside the plot
        position = "bottom left"
    symbols = ("square", *SYMBOLS)
    mean = float(np.mean(accuracies))
    spread = ""
    if len(accuracies) > 1:
        spread = f" ({min(accuracies):.2%} to {max(accuracies):.2%})"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": safe(label),
        "x": [cost],
        "y": [mean],
        "text": [safe(label)],
        "textposition": position,
        "textfont": {"color": "--static", "size": 12},
        "hovertext": [
            f"<b>{safe(label)}</b>, static<br>cost {cost:.1%} of plain<br>accuracy "
            f"{mean:.2%}{spread}"
        ],
        "hoverinfo": "text",
        "marker": {
            "color": "--static",
            "size": 11,
            "symbol": symbols[number % len(symbols)],
        },
        "showlegend": False,
        "cliponaxis": False,
    }


def _line(name: str, x: Sequence[float], y: Sequence[float], number: int) -> dict[str, Any]:
    """A line with a marker at each point, in the colour and the dashes of a number."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": COLOURS[number], "width": 2, "dash": DASHES[number]},
        "marker": {"color": COLOURS[number], "size": 5},
        "hovertemplate": f"threshold %{{x:.4g}}<br>%{{y:.1%}} {name}<extra></extra>",
    }


def _layout() -> dict[str, Any]:
    """The axes of the trade-off."""
    return {
        "xaxis": {"title": {"text": "mean cost in MACs, plain network = 100%"}, **SHARE},
        "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".1%"},
        "showlegend": True,
        "hovermode": "closest",
    }
