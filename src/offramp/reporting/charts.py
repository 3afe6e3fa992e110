"""The charts of a report as plain data for plotly.js.

Colours are names of CSS variables; page.js replaces them by the colours of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
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
    """Escaped text. Plotly interprets a few HTML tags in labels, so names must not hold any."""
    return escape(words, quote=False)


def figure(name: str, *choices: Mapping[str, Any]) -> Figure:
    """A chart as plain data.

    Args:
        name: of the box on the page in which the chart is drawn.
        *choices: data and layout for plotly. A reader switches between several choices.
    """
    return {"id": name, "choices": list(choices)}


def frontier_chart(
    view: View, others: Sequence[Dot], lines: Mapping[Unit, Sequence[Dot]]
) -> Figure:
    """Quality against mean cost, one choice per unit."""
    chosen = view.dot("this plan", view.plan)
    plain = view.plain_dot()
    statics = view.statics()
    word = view.word
    choices = []
    for unit in view.units:
        choices.append(_plane(unit, word, chosen, plain, statics, others, lines))
    return figure("frontier-chart", *choices)


def _plane(
    unit: Unit,
    word: str,
    chosen: Dot,
    plain: Dot,
    statics: Sequence[Dot],
    others: Sequence[Dot],
    lines: Mapping[Unit, Sequence[Dot]],
) -> Figure:
    """The chart for one unit of cost. Later traces are drawn over earlier ones, the plan last."""
    dots = partial(_dots, unit, word)
    small = {"size": 3}
    steps = {"width": 2, "shape": "hv"}
    square = {"color": "--static", "size": 9, "symbol": "square"}
    dotted = {"width": 1, "dash": "dot"}
    diamond = {"size": 12, "symbol": "diamond"}
    star = {"size": 17, "symbol": "star"}
    traces = [
        dots(lines[unit], "found by search", "--frontier", small, line=steps),
        dots(statics, "static networks", "--static", square, line=dotted, named=True),
    ]
    for index, dot in enumerate(others):
        other = {"size": 11, "symbol": SYMBOLS[index % len(SYMBOLS)]}
        traces.append(dots([dot], safe(dot.name), "--other", other))
    traces.append(dots([plain], "plain network", "--ink", diamond))
    traces.append(dots([chosen], "this plan", "--plan", star))
    title = f"mean cost in {unit_name(unit)}, plain network = 100%"
    layout = {
        "xaxis": {"title": {"text": title}, **SHARE},
        "yaxis": {"title": {"text": word}, "tickformat": ".1%"},
        "showlegend": True,
        "hovermode": "closest",
    }
    # a trace without points would still have a line in the legend
    return {"data": [trace for trace in traces if trace["x"]], "layout": layout}


def _dots(
    unit: Unit,
    word: str,
    dots: Sequence[Dot],
    name: str,
    color: str,
    marker: Mapping[str, Any],
    *,
    line: Mapping[str, Any] | None = None,
    named: bool = False,
) -> Figure:
    """Dots as one trace, with a line through them and their names next to them where wanted."""
    mode = "markers"
    if line:
        mode += "+lines"
    names = None
    if named:
        mode += "+text"
        names = [safe(dot.name) for dot in dots]
    costs = []
    qualities = []
    hover = []
    for dot in dots:
        costs.append(dot.costs[unit])
        qualities.append(dot.quality)
        how = safe(dot.how).replace("; ", "<br>")
        hover.append(
            f"<b>{safe(dot.name)}</b><br>{how}<br>"
            f"{word} {percent(dot.quality, 2)}<br>cost {percent(dot.costs[unit])} of plain"
        )
    return {
        "type": "scatter",
        "mode": mode,
        "name": name,
        "x": costs,
        "y": qualities,
        "text": names,
        # The last name is centred, so that it stays inside the plot.
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
    """Shares of rows as bars, accuracies of the exits as marks.

    Args:
        view: a trace under a plan.
        shares: of the rows that leave at each exit [E].
        here: accuracy of each exit on the rows that leave there [E]; None if there are none.
        all_rows: accuracy of each exit on all rows [E].
    """
    names = list(map(safe, view.trace.topology.exits))
    word = "agree"
    if view.labelled:
        word = "right"
    diamond = {"symbol": "diamond", "size": 12, "color": "--plan"}
    dash = {"symbol": "line-ew-open", "size": 28, "line": {"width": 3}, "color": "--ink"}
    marks: tuple[tuple[str, Sequence[float | None], Figure], ...] = (
        (f"{word}, of the rows that leave here", here, diamond),
        (f"{word}, of all rows", all_rows, dash),
    )
    # Bars for the shares, and marks over them.
    bars = {
        "type": "bar",
        "name": "share of rows that leave here",
        "x": names,
        "y": list(shares),
        "text": list(map(percent, shares)),
        "textposition": "auto",
        "insidetextanchor": "start",
        "width": 0.55,
        "marker": {"color": "--bar"},
        "textfont": {"color": "--ink"},
        "hovertemplate": "%{x}<br>%{y:.1%} of the rows leave here<extra></extra>",
    }
    dots = []
    for name, values, marker in marks:
        dots.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": names,
                "y": list(values),
                "marker": marker,
                "hovertemplate": f"%{{x}}<br>%{{y:.2%}} {name}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"type": "category"},
        "yaxis": {**SHARE, "range": [0, 1.06]},
        "showlegend": True,
    }
    return figure("exits-chart", {"data": [bars, *dots], "layout": layout})


def gate_chart(view: View, name: str, gate: str, bins: Sequence[Bin]) -> Figure:
    """How often an exit is right, from low to high scores of its gate.

    Args:
        view: a trace under a plan.
        name: of the box on the page.
        gate: the node of the gate.
        bins: of its scores.
    """
    word = "agrees"
    axis = "agreement"
    if view.labelled:
        word = "right"
        axis = "right"
    middle = []
    right = []
    reference_right = []
    hover = []
    lowest = 1.0  # every whisker and every diamond must be on the chart
    for bin_ in bins:
        middle.append((bin_.start + bin_.end) / 2)
        right.append(bin_.right)
        reference_right.append(bin_.reference)
        lowest = min(lowest, bin_.interval[0], bin_.reference)
        hover.append(
            f"scores {bin_.low:.4g} to {bin_.high:.4g}<br>{bin_.rows:,} rows<br>"
            f"{safe(gate)} {word} for {percent(bin_.right)}<br>{safe(view.reference)} {word} for "
            f"{percent(bin_.reference)}"
        )
    # A line through the bins with their intervals, and the reference on the same rows.
    line = {
        "type": "scatter",
        "mode": "markers+lines",
        "name": safe(gate),
        "x": middle,
        "y": right,
        "error_y": _whiskers(bins),
        "marker": {"color": "--frontier", "size": 8},
        "line": {"color": "--frontier", "width": 1.5},
        "hovertext": hover,
        "hoverinfo": "text",
    }
    reference = {
        "type": "scatter",
        "mode": "markers",
        "name": safe(view.reference),
        "x": middle,
        "y": reference_right,
        "marker": {"color": "--ink", "size": 7, "symbol": "diamond-open"},
        "hovertext": hover,
        "hoverinfo": "text",
    }
    layout = {
        "xaxis": {
            "title": {"text": "rows, from the least to the most sure"},
            "tickformat": ".0%",
            "range": [0, 1],
        },
        "yaxis": {
            "title": {"text": axis},
            "tickformat": ".0%",
        },
        "showlegend": True,
        **_threshold(view, gate),
    }
    layout["yaxis"]["range"] = [max(0.0, lowest - 0.05), 1.03]
    traces = [line]
    if view.labelled:  # without labels the reference always agrees with itself
        traces.append(reference)
    return figure(name, {"data": traces, "layout": layout})


def _whiskers(bins: Sequence[Bin]) -> Figure:
    """The intervals of the bins as distances above and below the share of right answers."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [bin_.interval[1] - bin_.right for bin_ in bins],
        "arrayminus": [bin_.right - bin_.interval[0] for bin_ in bins],
        "color": "--frontier",
        "thickness": 1.2,
        "width": 3,
    }


def _threshold(view: View, gate: str) -> Figure:
    """The threshold as a line, and a shade over the rows that leave at the gate."""
    if gate not in view.open_gates:
        return {}
    start = 1 - float(view.leaving(gate).mean())  # rows are in order of their score
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
    note = {
        "x": start,
        "y": 0.03,
        "yref": "paper",
        "yanchor": "bottom",
        "xanchor": "left",
        "text": f" → {words}",
        "showarrow": False,
        "font": {"color": "--plan"},
    }
    if start > 0.5:  # on the other side of the line there is not enough room
        note["xanchor"] = "right"
        note["text"] = f"{words} → "
    return {
        "shapes": [
            {**shade, "fillcolor": "--shade", "line": {"width": 0}},
            {**line, "line": {"color": "--plan", "width": 2}},
        ],
        "annotations": [note],
    }
