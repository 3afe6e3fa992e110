"""A network with forks as a picture (SVG inside the page), with the share of rows on every edge."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from offramp.plans.topology import LEAVE, Topology
from offramp.reporting.markup import Html, join, table, tag
from offramp.reporting.view import View
from offramp.reporting.words import percent

# pixels: the size of a box, and the distance from one box to the next
WIDE = 116
HIGH = 34
STEP_X = 170
STEP_Y = 62
MARGIN = 36  # above the drawing: room for a lane above the first row, and its label
LANE = 14  # how far above a row of boxes an edge runs that would pass behind them
BEND = 38  # pixels to the right in which such an edge comes to its lane


@dataclass(frozen=True)
class Way:
    """An edge between two nodes, and the share of all rows that took it."""

    start: str
    end: str
    share: float


def ways_of(view: View) -> list[Way]:
    """The edges of the topology, each with the share of rows that took it.

    Nodes at which the plan runs nothing pass their rows on to the next node.
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
    ways = []
    for (start, end), share in shares.items():
        ways.append(Way(start, end, share))
    return ways


def _ways_of_setting(view: View) -> list[Way]:
    """The edges of a trace that was recorded at several settings of one dial.

    The way of a row consists of the nodes that ran for it, in order.
    """
    topology = view.trace.topology
    number = view.trace.setting_of(view.plan)
    ran = {name: view.trace.columns[f"setting/{name}#{number}"] for name in topology.names}
    ways = list[Way]()
    for start in topology.nodes:
        index = topology.names.index(start.name)
        for end in start.successors:
            if end == LEAVE:
                took_N = view.replay.exit == topology.exit_index(start.name)
            else:
                # a row took this edge if both of its nodes ran and no node between them did
                took_N = ran[start.name] & ran[end]
                for between in topology.names[index + 1 : topology.names.index(end)]:
                    took_N = took_N & ~ran[between]
            share = float(np.count_nonzero(took_N)) / max(len(view.trace), 1)
            ways.append(Way(start.name, end, share))
    return ways


def picture(view: View) -> Html:
    """The topology from left to right, with its arms above each other.

    A line is thicker if more rows take it. Nodes that no row reaches are pale.
    """
    topology = view.trace.topology
    spots = _spots(topology)
    reached = {topology.names[0]}
    parts: list[Html] = []
    for way in ways_of(view):
        if _passes_boxes(way, spots):
            parts.append(_detour(way, spots))
        else:
            parts.append(_line(way, spots))
        if way.share > 0:
            reached.add(way.end)
    width = 0
    height = 0
    for x, y in spots.values():
        width = max(width, x + WIDE + STEP_X // 2)
        height = max(height, y + HIGH + STEP_Y // 2)
    for node in topology.nodes:
        x, y = spots[node.name]
        faint = ""
        if node.name not in reached:
            faint = " faint"
        kind = ""
        if len(node.successors) > 1:
            kind = " gate"
        box = tag(
            "rect",
            x=str(x),
            y=str(y),
            width=str(WIDE),
            height=str(HIGH),
            rx="6",
            class_=f"node{kind}{faint}",
        )
        name = node.name
        if len(name) > 14:  # more characters than fit in a box
            name = name[:13] + "…"
        words = tag(
            "text", name, x=str(x + WIDE // 2), y=str(y + HIGH // 2 + 5), class_=f"name{faint}"
        )
        parts += [box, words]
    drawing = tag(
        "svg",
        tag(
            "title",
            f"Ways of the rows through {len(topology.nodes)} nodes; the table below has the shares",
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
    """The position (x, y) of the box of every node, in pixels.

    The column of a node is the length of the longest path to it. The first arm of a fork stays in
    the row of the fork, and each further arm goes one row lower. Where arms meet again, the node
    takes the highest of their rows. A box that would cover another one moves down.
    """
    # Nodes are in the order in which they run, so the column of a node is final once all nodes
    # before it have been visited.
    columns = {topology.names[0]: 0}
    parents: dict[str, list[str]] = {}
    for node in topology.nodes:
        columns.setdefault(node.name, 0)
        for name in node.successors:
            parents.setdefault(name, []).append(node.name)
            if name != LEAVE:
                columns[name] = max(columns.get(name, 0), columns[node.name] + 1)
    rows = {topology.names[0]: 0}
    occupied: set[tuple[int, int]] = set()
    spots: dict[str, tuple[int, int]] = {}
    for node in topology.nodes:
        sources = parents.get(node.name, [])
        row = 0
        if len(sources) == 1:
            fork = topology.node(sources[0])
            arms = [name for name in fork.successors if name != LEAVE]
            row = rows[fork.name] + arms.index(node.name)
        elif sources:
            row = min(rows[name] for name in sources)
        column = columns[node.name]
        while (column, row) in occupied:
            row += 1
        occupied.add((column, row))
        rows[node.name] = row
        spots[node.name] = (10 + column * STEP_X, MARGIN + row * STEP_Y)
    return spots


def _passes_boxes(way: Way, spots: dict[str, tuple[int, int]]) -> bool:
    """Whether a straight edge would pass behind the box of another node."""
    if way.end == LEAVE:
        return False
    x_start, y_start = spots[way.start]
    x_end, y_end = spots[way.end]
    for x, y in spots.values():
        if x_start < x < x_end:
            share = (x - x_start) / (x_end - x_start)
            if abs(y_start + share * (y_end - y_start) - y) < HIGH:
                return True
    return False


def _detour(way: Way, spots: dict[str, tuple[int, int]]) -> Html:
    """An edge above the boxes of its row: up into a lane, along it, and to its end."""
    x, y = spots[way.start]
    x_from = x + WIDE
    y_from = y + HIGH // 2
    x_to, y_to = spots[way.end]
    lane = min(y, y_to) - LANE
    y_to += HIGH // 2
    path = (
        f"M {x_from} {y_from} C {x_from + BEND // 2} {y_from}, {x_from + BEND // 2} {lane}, "
        f"{x_from + BEND} {lane} L {x_to - BEND} {lane} C {x_to - BEND // 2} {lane}, "
        f"{x_to - BEND // 2} {y_to}, {x_to} {y_to}"
    )
    faint = "" if way.share > 0 else " faint"
    curve = tag("path", d=path, class_=f"way{faint}", stroke_width=f"{1 + 9 * way.share:.1f}")
    spot = {"x": str((x_from + x_to) // 2), "y": str(lane - 4)}
    return join([curve, tag("text", percent(way.share, 0), class_=f"share{faint}", **spot)])


def _line(way: Way, spots: dict[str, tuple[int, int]]) -> Html:
    """An edge with its share. Rows that leave the network go down to the right."""
    x, y = spots[way.start]
    x_from = x + WIDE
    y_from = y + HIGH // 2
    if way.end == LEAVE:
        x_to = x_from + 34
        y_to = y_from + 22
    else:
        x_to = spots[way.end][0]
        y_to = spots[way.end][1] + HIGH // 2
    # a Bézier curve that starts and ends horizontally
    bend = (x_to - x_from) // 2
    path = f"M {x_from} {y_from} C {x_from + bend} {y_from}, {x_to - bend} {y_to}, {x_to} {y_to}"
    thick = f"{1 + 9 * way.share:.1f}"
    faint = " faint"
    if way.share > 0:
        faint = ""
    ends = ""
    if way.end == LEAVE:
        ends = " out"
    curve = tag("path", d=path, class_=f"way{ends}{faint}", stroke_width=thick)
    if way.end == LEAVE:
        spot = {"x": str(x_to + 4), "y": str(y_to + 5)}
    else:
        spot = {"x": str((x_from + x_to) // 2), "y": str((y_from + y_to) // 2 - 7)}
    return join([curve, tag("text", percent(way.share, 0), class_=f"share{ends}{faint}", **spot)])


def ways_table(view: View) -> Html:
    """The shares as figures."""
    rows = []
    for way in ways_of(view):
        end = way.end
        if end == LEAVE:
            end = "answered"
        rows.append((way.start, end, percent(way.share)))
    return table("Shares of all rows by way", ["from", "to", "share"], rows)
