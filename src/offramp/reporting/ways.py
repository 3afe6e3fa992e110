"""A network with forks as a picture (SVG inside the page), with the share of rows on every edge."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from offramp.plans.topology import LEAVE, Topology
from offramp.reporting.markup import Html, join, table, tag
from offramp.reporting.view import View
from offramp.reporting.words import percent

WIDE, HIGH = 116, 34  # of a box
STEP_X, STEP_Y = 190, 62  # from one box to the next


@dataclass(frozen=True)
class Way:
    """An edge between two nodes, and the share of all rows that took it."""

    start: str
    end: str
    share: float


def ways_of(view: View) -> list[Way]:
    """The edges of the topology, each with its share; nodes at which the plan runs nothing pass
    their rows on.
    """
    topology = view.trace.topology
    rows = max(len(view.trace), 1)
    shares: dict[tuple[str, str], float] = {}
    for node in topology.nodes:
        for successor in node.successors:
            shares[(node.name, successor)] = 0.0
    schedule = view.replay.schedule
    if view.trace.header.settings:
        return _ways_of_setting(view)
    entered = [*schedule.skipped, schedule.stages[0].name]
    for start, end in itertools.pairwise(entered):
        shares[(start, end)] += 1.0
    for visit in view.trace.visits(schedule):
        for index, edge in enumerate(visit.stage.edges):
            share = float(np.count_nonzero(visit.chosen == index)) / rows
            passed = [visit.stage.name, *edge.via, edge.to]
            for start, end in itertools.pairwise(passed):
                shares[(start, end)] += share
    return [Way(start, end, share) for (start, end), share in shares.items()]


def _ways_of_setting(view: View) -> list[Way]:
    """The same of a trace at settings of one dial: a row's way are the nodes that ran for it, in
    order.
    """
    topology = view.trace.topology
    number = view.trace.setting_of(view.plan)
    ran = {name: view.trace.columns[f"setting/{name}#{number}"] for name in topology.names}
    ways = list[Way]()
    for start in topology.nodes:
        index = topology.names.index(start.name)
        for end in start.successors:
            if end == LEAVE:
                rows_N = view.replay.exit == topology.exit_index(start.name)
            else:
                rows_N = ran[start.name] & ran[end]
                for between in topology.names[index + 1 : topology.names.index(end)]:
                    rows_N = rows_N & ~ran[between]
            ways.append(
                Way(start.name, end, float(np.count_nonzero(rows_N)) / max(len(view.trace), 1))
            )
    return ways


def picture(view: View) -> Html:
    """The topology from left to right: arms above each other, a thicker line where more rows go."""
    topology = view.trace.topology
    ways = ways_of(view)
    spots = _spots(topology)
    reached = {way.end for way in ways if way.share > 0} | {topology.names[0]}
    parts = list[Html]()
    width = max(x for x, _ in spots.values()) + WIDE + STEP_X // 2
    height = max(y for _, y in spots.values()) + HIGH + STEP_Y // 2
    for way in ways:
        parts.append(_line(way, spots))
    for node in topology.nodes:
        x, y = spots[node.name]
        faint = "" if node.name in reached else " faint"
        kind = " gate" if len(node.successors) > 1 else ""
        box = tag(
            "rect",
            x=str(x),
            y=str(y),
            width=str(WIDE),
            height=str(HIGH),
            rx="6",
            class_=f"node{kind}{faint}",
        )
        name = node.name if len(node.name) <= 14 else node.name[:13] + "…"
        words = tag(
            "text", name, x=str(x + WIDE // 2), y=str(y + HIGH // 2 + 5), class_=f"name{faint}"
        )
        parts += [box, words]
    drawing = tag(
        "svg",
        tag(
            "title",
            f"Ways of the rows through {len(topology.nodes)} nodes; the shares stand in the table "
            f"below",
        ),
        *parts,
        viewBox=f"0 0 {width} {height}",
        width=str(width),
        height=str(height),
        role="img",
        class_="ways",
    )
    return tag(
        "div",
        drawing,
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label="The ways of the rows",
    )


def _spots(topology: Topology) -> dict[str, tuple[int, int]]:
    """Where the box of every node stands: columns by the longest path to it, rows by arm."""
    column = {topology.names[0]: 0}
    lane: dict[str, float] = {topology.names[0]: 0.0}
    taken: dict[tuple[int, int], str] = {}
    for node in topology.nodes:
        column.setdefault(node.name, 0)
        others = [name for name in node.successors if name != LEAVE]
        for name in others:
            column[name] = max(column.get(name, 0), column[node.name] + 1)
    before: dict[str, list[str]] = {}
    for node in topology.nodes:
        for name in node.successors:
            before.setdefault(name, []).append(node.name)
    spots: dict[str, tuple[int, int]] = {}
    for node in topology.nodes:
        parents = before.get(node.name, [])
        row = 0
        if parents:
            rows = [taken_row for name in parents for taken_row in [round(lane[name])]]
            siblings = [name for name in topology.node(parents[0]).successors if name != LEAVE]
            row = min(rows) if len(parents) > 1 else rows[0] + siblings.index(node.name)
        while (column[node.name], row) in taken:
            row += 1
        taken[(column[node.name], row)] = node.name
        lane[node.name] = row
        spots[node.name] = (10 + column[node.name] * STEP_X, 10 + row * STEP_Y)
    return spots


def _line(way: Way, spots: dict[str, tuple[int, int]]) -> Html:
    """An edge with its share; rows that are answered leave to the right, downwards."""
    x, y = spots[way.start]
    x_from = x + WIDE
    y_from = y + HIGH // 2
    if way.end == LEAVE:
        x_to = x_from + 34
        y_to = y_from + 22
    else:
        x_to = spots[way.end][0]
        y_to = spots[way.end][1] + HIGH // 2
    bend = (x_to - x_from) // 2
    path = f"M {x_from} {y_from} C {x_from + bend} {y_from}, {x_to - bend} {y_to}, {x_to} {y_to}"
    thick = f"{1 + 9 * way.share:.1f}"
    faint = "" if way.share > 0 else " faint"
    ends = " out" if way.end == LEAVE else ""
    curve = tag("path", d=path, class_=f"way{ends}{faint}", stroke_width=thick)
    if way.end == LEAVE:
        spot = {"x": str(x_to + 4), "y": str(y_to + 5)}
    else:
        spot = {"x": str((x_from + x_to) // 2), "y": str((y_from + y_to) // 2 - 7)}
    return join([curve, tag("text", percent(way.share, 0), class_=f"share{ends}{faint}", **spot)])


def ways_table(view: View) -> Html:
    """The shares as figures."""
    rows = [
        (way.start, "answered" if way.end == LEAVE else way.end, percent(way.share))
        for way in ways_of(view)
    ]
    return table("Shares of all rows by way", ["from", "to", "share"], rows)
