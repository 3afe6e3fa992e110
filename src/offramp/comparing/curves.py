"""Curves of a comparison as data for plotly.js: the mean over seeds, and the range between them as a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from offramp.comparing.comparing import Comparison, Result
from offramp.comparing.figures import Figures, Point
from offramp.evaluation import Array
from offramp.reporting.charts import SHARE, SYMBOLS, Figure, figure, safe

COLOURS = tuple(f"--s{number}" for number in range(1, 9))
DASHES = ("solid", "dash", "dot", "dashdot")
GRID = 60  # places along the cost axis at which seeds are averaged

KINDS: dict[str, Callable[[Figures], Sequence[Point]]] = {
    "exact frontier": lambda figures: figures.frontier,
    "p^k, as in MSDNet": lambda figures: figures.powers,
    "anytime": lambda figures: figures.anytime,
}


def trade_off_chart(comparison: Comparison) -> Figure:
    """Accuracy against mean cost on test rows: one choice per kind of curve, static networks in each."""
    return figure("trade-off", *({"data": _planes(comparison, kind), "layout": _layout()} for kind in KINDS))


def leaving_chart(comparison: Comparison) -> Figure:
    """Share of rows that leaves at the first exit against the threshold there, a choice per label (first seed)."""
    choices = []
    for label in comparison.labels():
        told = comparison.of(label)[0].figures.leaving
        lines = [
            _line("leave at the first exit", [t for t, _, _ in told], [share for _, share, _ in told], 0),
            _line("of these are right", [t for t, _, _ in told], [right for _, _, right in told], 1),
        ]
        layout = {
            "xaxis": {"title": {"text": "threshold of the first gate"}},
            "yaxis": {**SHARE, "range": [0, 1.03]},
            "showlegend": True,
        }
        choices.append({"data": lines, "layout": layout})
    return figure("leaving", *choices)


def along(points: Sequence[Point], unit: float) -> tuple[Array, Array]:
    """Costs in shares of the unit, rising, and the accuracies at them."""
    order = sorted(points, key=lambda point: (point.cost, point.accuracy))
    return np.array([point.cost / unit for point in order]), np.array([point.accuracy for point in order])


def averaged(results: Sequence[Result], kind: str, unit: float) -> tuple[Array, Array, Array, Array]:
    """Costs, and mean, least and largest accuracy over seeds there; where seeds have few points each, point by point."""
    curves = [along(KINDS[kind](result.figures), unit) for result in results]
    if kind == "anytime" or len(curves) == 1:
        costs = np.mean([cost for cost, _ in curves], axis=0)
        each = np.array([accuracy for _, accuracy in curves])
    else:
        low, high = max(cost[0] for cost, _ in curves), min(cost[-1] for cost, _ in curves)
        costs = np.linspace(low, max(low, high), GRID)
        each = np.array([np.interp(costs, cost, accuracy) for cost, accuracy in curves])
    return costs, each.mean(0), each.min(0), each.max(0)


def _planes(comparison: Comparison, kind: str) -> list[dict[str, Any]]:
    found = []
    methods: list[str] = []
    for label in comparison.labels():
        results = comparison.of(label)
        method = results[0].method
        first = method not in methods
        methods += [method] if first else []
        colour = COLOURS[methods.index(method) % len(COLOURS)]
        dash = DASHES[
            [each for each in comparison.labels() if comparison.of(each)[0].method == method].index(label) % 4
        ]
        found += _curve(label, results, kind, comparison.unit, colour, dash, shown=first)
    return [*found, *_statics(comparison)]


def _curve(
    label: str, results: Sequence[Result], kind: str, unit: float, colour: str, dash: str, *, shown: bool
) -> list[dict[str, Any]]:
    """A line and, with several seeds, whiskers. Further gates of a method are shown when their name is clicked."""
    costs, mean, low, high = averaged(results, kind, unit)
    seeds = f"{len(results)} seeds" if len(results) > 1 else "one seed"
    hover = [
        f"<b>{safe(label)}</b> ({seeds})<br>cost {cost:.1%} of plain<br>accuracy {value:.2%}"
        + (f" ({least:.2%} to {most:.2%})" if len(results) > 1 else "")
        for cost, value, least, most in zip(costs, mean, low, high, strict=True)
    ]
    few = kind == "anytime"
    line: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": safe(label),
        "x": costs.tolist(),
        "y": mean.tolist(),
        "hovertext": hover,
        "hoverinfo": "text",
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"color": colour, "size": 7},
        "visible": True if shown else "legendonly",
    }
    if len(results) > 1 and few:
        line["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": (high - mean).tolist(),
            "arrayminus": (mean - low).tolist(),
            "color": colour,
            "thickness": 1.2,
            "width": 3,
        }
    return [line]


def _statics(comparison: Comparison) -> list[dict[str, Any]]:
    """Networks that are not cut, and the plain network of the first method that is."""
    found = []
    for number, label in enumerate(comparison.labels(static=True)):
        points = [result.figures.anytime[0] for result in comparison.of(label)]
        found.append(_mark(label, points, comparison.unit, number))
    first = next(result for result in comparison.results if not result.static)
    plain = [
        Point(result.figures.plain, result.figures.plain, result.figures.alone[-1], ())
        for result in comparison.of(first.label)
    ]
    mark = _mark(f"{first.method}'s last exit", plain, comparison.unit, 0)
    return [*found, {**mark, "marker": {"color": "--ink", "size": 12, "symbol": "diamond"}}]


def _mark(label: str, points: Sequence[Point], unit: float, number: int) -> dict[str, Any]:
    values = [point.accuracy for point in points]
    cost, mean = points[0].cost / unit, float(np.mean(values))
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": safe(label),
        "x": [cost],
        "y": [mean],
        "text": [safe(label)],
        "textposition": "bottom center",
        "textfont": {"color": "--static", "size": 12},
        "hovertext": [f"<b>{safe(label)}</b>, static<br>cost {cost:.1%} of plain<br>accuracy {mean:.2%}"],
        "hoverinfo": "text",
        "marker": {"color": "--static", "size": 11, "symbol": ("square", *SYMBOLS)[number % (1 + len(SYMBOLS))]},
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
