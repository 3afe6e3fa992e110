"""Curves of a comparison as data for plotly.js: the mean over seeds, and the range between them as
a band.
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
    """Costs in shares of the unit, rising, and over seeds the mean, least and largest accuracy
    there.
    """

    cost: Array
    mean: Array
    least: Array
    largest: Array


@dataclass(frozen=True)
class Style:
    """Methods differ in colour and their gates in dashes; `shown` before anybody clicks."""

    colour: str
    dash: str
    shown: bool


def trade_off_chart(comparison: Comparison) -> Figure:
    """Accuracy against mean cost on test rows: one choice per kind of curve, static networks in
    each.
    """
    return figure(
        "trade-off", *({"data": _plane(comparison, kind), "layout": _layout()} for kind in KINDS)
    )


def leaving_chart(comparison: Comparison) -> Figure:
    """Share of rows that leaves at the first exit against its threshold: a choice per method, first
    seed and gate.
    """
    choices = []
    for label in comparison.leading():
        told = comparison.of(label)[0].figures.leaving
        lines = [
            _line(
                "leave at the first exit",
                [t for t, _, _ in told],
                [share for _, share, _ in told],
                0,
            ),
            _line(
                "of these are right", [t for t, _, _ in told], [right for _, _, right in told], 1
            ),
        ]
        layout = {
            "xaxis": {"title": {"text": "threshold of the first gate"}},
            "yaxis": {**SHARE, "range": [0, 1.03]},
            "showlegend": True,
        }
        choices.append({"data": lines, "layout": layout})
    return figure("leaving", *choices)


def averaged(results: Sequence[Result], kind: str, unit: float) -> Curve:
    """A kind of curve over seeds: point by point where all have the same few, else between the
    points on a grid.
    """
    curves = [_along(KINDS[kind](result.figures), unit) for result in results]
    if kind == FEW or len(curves) == 1:
        costs = np.mean([cost for cost, _ in curves], axis=0)
        each = np.array([accuracy for _, accuracy in curves])
    else:
        low = max(cost[0] for cost, _ in curves)
        high = min(cost[-1] for cost, _ in curves)
        costs = np.linspace(low, max(low, high), GRID)
        each = np.array([np.interp(costs, cost, accuracy) for cost, accuracy in curves])
    return Curve(costs, each.mean(0), each.min(0), each.max(0))


def _along(points: Sequence[Point], unit: float) -> tuple[Array, Array]:
    """Costs in shares of the unit, rising, and the accuracies at them."""
    order = sorted(points, key=lambda point: (point.cost, point.accuracy))
    return np.array([point.cost / unit for point in order]), np.array(
        [point.accuracy for point in order]
    )


def _styles(comparison: Comparison) -> dict[str, Style]:
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
    styles = _styles(comparison)
    found = []
    for label, style in styles.items():
        results = comparison.of(label)
        curve = averaged(results, kind, comparison.unit)
        found += [_curve(label, curve, style, len(results), kind == FEW)]
        if len(results) > 1:
            found.append(_band(label, curve, style))
    return [*found, *_statics(comparison)]


def _curve(label: str, curve: Curve, style: Style, seeds: int, few: bool) -> dict[str, Any]:
    """A line; further gates of a method are shown when their name is clicked."""
    said = f"{seeds} seeds" if seeds > 1 else "one seed"
    hover = []
    for cost, mean, least, largest in zip(
        curve.cost, curve.mean, curve.least, curve.largest, strict=True
    ):
        hover.append(
            f"<b>{safe(label)}</b> ({said})<br>cost {cost:.1%} of plain<br>accuracy {mean:.2%}"
            + (f" ({least:.2%} to {largest:.2%})" if seeds > 1 else "")
        )
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": safe(label),
        "legendgroup": label,
        "x": curve.cost.tolist(),
        "y": curve.mean.tolist(),
        "hovertext": hover,
        "hoverinfo": "text",
        "line": {"color": style.colour, "width": 2, "dash": style.dash},
        "marker": {"color": style.colour, "size": 7},
        "visible": True if style.shown else "legendonly",
    }


def _band(label: str, curve: Curve, style: Style) -> dict[str, Any]:
    """The range between seeds, shown and hidden with the line."""
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
        "visible": True if style.shown else "legendonly",
    }


def _statics(comparison: Comparison) -> list[dict[str, Any]]:
    """Networks that are not cut, and the plain network of the first method that is."""
    found = []
    for number, label in enumerate(comparison.labels(static=True)):
        points = [result.figures.anytime[0] for result in comparison.of(label)]
        found.append(_mark(label, points, comparison.unit, number))
    cut = (result for result in comparison.results if not result.static)
    first = next(result for result in cut if result.figures.plain == comparison.unit)
    plain = [
        Point(result.figures.plain, result.figures.plain, result.figures.alone[-1], ())
        for result in comparison.of(first.label)
    ]
    mark = _mark(f"{first.method}'s last exit", plain, comparison.unit, 0)
    return [*found, {**mark, "marker": {"color": "--ink", "size": 12, "symbol": "diamond"}}]


def _mark(label: str, points: Sequence[Point], unit: float, number: int) -> dict[str, Any]:
    values = [point.accuracy for point in points]
    cost = points[0].cost / unit
    mean = float(np.mean(values))
    spread = f" ({min(values):.2%} to {max(values):.2%})" if len(values) > 1 else ""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": safe(label),
        "x": [cost],
        "y": [mean],
        "text": [safe(label)],
        "textposition": "bottom left" if cost > 0.75 else "bottom center",  # inside the plot
        "textfont": {"color": "--static", "size": 12},
        "hovertext": [
            f"<b>{safe(label)}</b>, static<br>cost {cost:.1%} of plain<br>accuracy "
            f"{mean:.2%}{spread}"
        ],
        "hoverinfo": "text",
        "marker": {
            "color": "--static",
            "size": 11,
            "symbol": ("square", *SYMBOLS)[number % (1 + len(SYMBOLS))],
        },
        "showlegend": False,
        "cliponaxis": False,
    }


def _line(name: str, x: Sequence[float], y: Sequence[float], number: int) -> dict[str, Any]:
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
    return {
        "xaxis": {"title": {"text": "mean cost in MACs, plain network = 100%"}, **SHARE},
        "yaxis": {"title": {"text": "accuracy"}, "tickformat": ".1%"},
        "showlegend": True,
        "hovermode": "closest",
    }
