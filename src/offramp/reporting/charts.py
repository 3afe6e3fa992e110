"""Charts as plain data for plotly.js: page.js fills in the colours, which are written as names of
CSS variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from offramp.reporting.view import Bin, Dot, Unit, View
from offramp.reporting.words import percent, unit_name

Figure = dict[str, Any]
SYMBOLS = (
    "circle",
    "triangle-up",
    "x",
    "pentagon",
    "hexagon",
    "triangle-down",
    "cross",
    "hourglass",
)
SHARE = {"tickformat": ".0%", "rangemode": "tozero"}


def safe(words: str) -> str:
    """Text for plotly, which reads a few tags."""
    return escape(words, quote=False)


def figure(name: str, *choices: Mapping[str, Any]) -> Figure:
    """A chart under the name of its place on the page; with several choices a reader switches
    between them.
    """
    return {"id": name, "choices": list(choices)}


def frontier_chart(
    view: View, others: Sequence[Dot], lines: Mapping[Unit, Sequence[Dot]]
) -> Figure:
    """Quality against mean cost, one choice per unit."""
    chosen = view.dot("this plan", view.plan)
    plain = view.plain_dot()
    statics = view.statics()
    word = "accuracy" if view.labelled else "agreement"
    return figure(
        "frontier-chart",
        *(_plane(unit, word, chosen, plain, statics, others, lines) for unit in view.units),
    )


def _plane(
    unit: Unit,
    word: str,
    chosen: Dot,
    plain: Dot,
    statics: Sequence[Dot],
    others: Sequence[Dot],
    lines: Mapping[Unit, Sequence[Dot]],
) -> Figure:
    static = {"color": "--static", "size": 9, "symbol": "square"}
    data = [
        _dots(
            unit,
            word,
            lines[unit],
            "found by search",
            "--frontier",
            {"size": 3},
            line={"width": 2, "shape": "hv"},
        ),
        _dots(
            unit,
            word,
            statics,
            "static networks",
            "--static",
            static,
            line={"width": 1, "dash": "dot"},
            told=True,
        ),
        *(
            _dots(
                unit,
                word,
                [dot],
                safe(dot.name),
                "--other",
                {"size": 11, "symbol": SYMBOLS[n % len(SYMBOLS)]},
            )
            for n, dot in enumerate(others)
        ),
        _dots(unit, word, [plain], "plain network", "--ink", {"size": 12, "symbol": "diamond"}),
        _dots(unit, word, [chosen], "this plan", "--plan", {"size": 17, "symbol": "star"}),
    ]
    title = f"mean cost in {unit_name(unit)}, plain network = 100%"
    layout = {
        "xaxis": {"title": {"text": title}, **SHARE},
        "yaxis": {"title": {"text": word}, "tickformat": ".1%"},
        "showlegend": True,
        "hovermode": "closest",
    }
    return {"data": [trace for trace in data if trace["x"]], "layout": layout}


def _dots(
    unit: Unit,
    word: str,
    dots: Sequence[Dot],
    name: str,
    color: str,
    marker: Mapping[str, Any],
    *,
    line: Mapping[str, Any] | None = None,
    told: bool = False,
) -> Figure:
    mode = "markers" + ("+lines" if line else "") + ("+text" if told else "")
    hover = [
        f"<b>{safe(dot.name)}</b><br>{safe(dot.how).replace('; ', '<br>')}<br>"
        f"{word} {percent(dot.quality, 2)}<br>cost {percent(dot.costs[unit])} of plain"
        for dot in dots
    ]
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": [dot.costs[unit] for dot in dots],
        "y": [dot.quality for dot in dots],
        "text": [safe(dot.name) for dot in dots] if told else None,
        "textposition": ["bottom right"] * (len(dots) - 1) + ["bottom center"],
        "textfont": {"color": color, "size": 12},
        "hovertext": hover,
        "hoverinfo": "text",
        "marker": {"color": color, **marker},
        "line": {"color": color, **(line or {})},
        "cliponaxis": False,
    }


def exits_chart(
    view: View, shares: Sequence[float], here: Sequence[float | None], all_rows: Sequence[float]
) -> Figure:
    """Shares as bars, how often the exits are right as marks."""
    names = [safe(name) for name in view.trace.topology.exits]
    word = "right" if view.labelled else "agree"
    marks: tuple[tuple[str, Sequence[float | None], str, Figure], ...] = (
        (f"{word}, of the rows that leave here", here, "--plan", {"symbol": "diamond", "size": 12}),
        (
            f"{word}, of all rows",
            all_rows,
            "--ink",
            {"symbol": "line-ew-open", "size": 28, "line": {"width": 3}},
        ),
    )
    bars = {
        "type": "bar",
        "name": "share of rows that leave here",
        "x": names,
        "y": list(shares),
        "text": [percent(share) for share in shares],
        "textposition": "auto",
        "insidetextanchor": "start",
        "width": 0.55,
        "marker": {"color": "--bar"},
        "textfont": {"color": "--ink"},
        "hovertemplate": "%{x}<br>%{y:.1%} of the rows leave here<extra></extra>",
    }
    dots = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": names,
            "y": list(values),
            "marker": marker | {"color": color},
            "hovertemplate": f"%{{x}}<br>%{{y:.2%}} {name}<extra></extra>",
        }
        for name, values, color, marker in marks
    ]
    layout = {
        "xaxis": {"type": "category"},
        "yaxis": {**SHARE, "range": [0, 1.06]},
        "showlegend": True,
    }
    return figure("exits-chart", {"data": [bars, *dots], "layout": layout})


def gate_chart(view: View, name: str, gate: str, bins: Sequence[Bin]) -> Figure:
    """How often an exit is right where its gate's score is low, and where it is high."""
    word = "right" if view.labelled else "agrees"
    middle = [(each.start + each.end) / 2 for each in bins]
    told = [
        f"scores {each.low:.4g} to {each.high:.4g}<br>{each.rows:,} rows<br>"
        f"{safe(gate)} {word} for {percent(each.right)}<br>{safe(view.reference)} {word} for "
        f"{percent(each.reference)}"
        for each in bins
    ]
    own = {
        "type": "scatter",
        "mode": "markers+lines",
        "name": safe(gate),
        "x": middle,
        "y": [each.right for each in bins],
        "error_y": _whiskers(bins),
        "marker": {"color": "--frontier", "size": 8},
        "line": {"color": "--frontier", "width": 1.5},
        "hovertext": told,
        "hoverinfo": "text",
    }
    reference = {
        "type": "scatter",
        "mode": "markers",
        "name": safe(view.reference),
        "x": middle,
        "y": [each.reference for each in bins],
        "marker": {"color": "--ink", "size": 7, "symbol": "diamond-open"},
        "hovertext": told,
        "hoverinfo": "text",
    }
    lowest = min(min(each.interval[0], each.reference) for each in bins)
    layout = {
        "xaxis": {
            "title": {"text": "rows, from the least to the most sure"},
            "tickformat": ".0%",
            "range": [0, 1],
        },
        "yaxis": {
            "title": {"text": "right" if view.labelled else "agreement"},
            "tickformat": ".0%",
        },
        "showlegend": True,
        **_threshold(view, gate),
    }
    layout["yaxis"]["range"] = [max(0.0, lowest - 0.05), 1.03]
    return figure(name, {"data": [own, reference] if view.labelled else [own], "layout": layout})


def _whiskers(bins: Sequence[Bin]) -> Figure:
    """The intervals of the bins."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [each.interval[1] - each.right for each in bins],
        "arrayminus": [each.right - each.interval[0] for each in bins],
        "color": "--frontier",
        "thickness": 1.2,
        "width": 3,
    }


def _threshold(view: View, gate: str) -> Figure:
    """The threshold as a line, and a shade over the rows that the gate lets leave."""
    if gate not in view.open_gates:
        return {}
    start = 1 - float(view.leaving(gate).mean())
    shade = {
        "type": "rect",
        "x0": start,
        "x1": 1,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "layer": "below",
    }
    line = {"type": "line", "x0": start, "x1": start, "y0": 0, "y1": 1, "yref": "paper"}
    words = f"leaves from {view.plan.thresholds[gate][0]:.4g}"
    right = start > 0.5
    note = {
        "x": start,
        "y": 0.03,
        "yref": "paper",
        "yanchor": "bottom",
        "xanchor": "right" if right else "left",
        "text": f"{words} → " if right else f" → {words}",
        "showarrow": False,
        "font": {"color": "--plan"},
    }
    return {
        "shapes": [
            {**shade, "fillcolor": "--shade", "line": {"width": 0}},
            {**line, "line": {"color": "--plan", "width": 2}},
        ],
        "annotations": [note],
    }
