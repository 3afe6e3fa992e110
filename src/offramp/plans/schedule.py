"""What a plan makes of a topology: the stages that run, what each reads and carries, and where its
rows go. No torch.

Everything that needs to know what runs asks the schedule: the Runner executes it on tensors,
`trace.replay` on columns, pricing charges its stages, `export` writes it into the manifest. An exit
that lets no row leave is not run, unless a later one reads it; nor is a segment (of a cascade: a
whole model) that nothing continues from; nor an arm of a fork that no row can take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from offramp._support.find import unknown
from offramp.errors import InvalidArgument
from offramp.plans.signature import INPUT, is_input
from offramp.plans.topology import LEAVE, Node, Topology

# "<node>" among the named tensors is what a segment gave, "<node>/logits" its exit's answer
LOGITS = "/logits"
SCORE = "/score"


@dataclass(frozen=True)
class Edge:
    """Where some rows of a stage go next.

    Attributes:
        to: the name of a later stage, or `LEAVE`.
        successor: the successor of the stage's node that these rows chose.
        carries: names of the tensors that later stages read; `x` stands for all inputs.
        via: nodes between, at which this plan runs nothing.
    """

    to: str
    successor: str
    carries: tuple[str, ...] = ()
    via: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One entry of a schedule: what runs together, and where its rows go.

    Attributes:
        name: the node whose exit and gate stand here.
        nodes: the nodes whose segments run, in order, the one of this name last.
        exit: whether its exit runs.
        gate: whether its gate decides; otherwise all rows go the same way.
        edges: where rows go, the shallow choice first; K of them with a gate, otherwise one.
        thresholds: K - 1, of all edges but the last.
        routes: the columns of the gate's scores that belong to these thresholds.
        why: why rows are answered where they leave: "gate", "end", or "deepest" where the plan ends
            before the network.
        reads: names of the tensors that must be there before.
        writes: names of the tensors that it gives.
        along: `nodes`, and between them those at which nothing runs, where there are any.
    """

    name: str
    nodes: tuple[str, ...]
    exit: bool
    gate: bool
    edges: tuple[Edge, ...]
    thresholds: tuple[float, ...] = ()
    routes: tuple[int, ...] = ()
    why: str = "end"
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    along: tuple[str, ...] = ()

    @property
    def passed(self) -> tuple[str, ...]:
        """The nodes on the path of a row through this stage."""
        return self.along or self.nodes

    @property
    def last(self) -> bool:
        """Whether every row that arrives here is answered here."""
        return not self.gate and self.edges[0].to == LEAVE

    @property
    def passes(self) -> tuple[str, ...]:
        """Nodes before the last one whose segments run along."""
        return self.nodes[:-1]

    @property
    def leaves(self) -> bool:
        """Whether rows can be answered here."""
        return any(edge.to == LEAVE for edge in self.edges)


@dataclass(frozen=True)
class Schedule:
    """Stages in topological order; rows start at the first. `print(schedule)` tells what will run.

    Attributes:
        stages: what runs.
        title: the plan in a few words.
        skipped: the nodes before the first stage, at which this plan runs nothing.
    """

    stages: tuple[Stage, ...]
    title: str = ""
    skipped: tuple[str, ...] = ()

    def __iter__(self) -> Any:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The place of every stage by its name."""
        return {stage.name: number for number, stage in enumerate(self.stages)}

    @cached_property
    def predecessors(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """By stage the edges that lead there: the name of the stage before, and the successor
        chosen in it.
        """
        found: dict[str, list[tuple[str, str]]] = {stage.name: [] for stage in self.stages}
        for stage in self.stages:
            for edge in stage.edges:
                if edge.to != LEAVE:
                    found[edge.to].append((stage.name, edge.successor))
        return {name: tuple(edges) for name, edges in found.items()}

    def linked(
        self, tensors: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] | None = None
    ) -> Schedule:
        """The same with what every edge carries: what some later stage reads and nothing before it
        gives anew.

        Args:
            tensors: by stage the names of the tensors that it reads and that it writes, where they
                are known better than from the topology: a segment may hand on more than one tensor.
        """
        needed: dict[str, tuple[str, ...]] = {LEAVE: ()}
        stages = list[Stage]()
        for stage in reversed(self.stages):
            if tensors is not None:
                stage = replace(stage, reads=tensors[stage.name][0], writes=tensors[stage.name][1])
            edges = tuple(replace(edge, carries=needed[edge.to]) for edge in stage.edges)
            stages.append(replace(stage, edges=edges))
            before = dict.fromkeys(stage.reads)
            for edge in edges:
                before.update(
                    dict.fromkeys(name for name in edge.carries if name not in stage.writes)
                )
            needed[stage.name] = tuple(before)
        return replace(self, stages=tuple(reversed(stages)))

    def joined(self) -> Schedule:
        """The same in fewer stages: where nothing is asked, a segment runs together with the next
        one.
        """
        waiting: dict[str, Stage] = {}  # stages that run as part of their successor, by its name
        home: dict[str, str] = {}  # by stage the name of the one that it became part of
        stages = list[Stage]()
        own: dict[str, tuple[str, ...]] = {}  # what the last segment, exit and gate of a stage give
        for stage in self.stages:
            own[stage.name] = stage.writes
            if stage.name in waiting:
                stage = _together(waiting.pop(stage.name), stage)
            (first, *others) = stage.edges
            alone = first.to != LEAVE and len(self.predecessors[first.to]) == 1
            clash = alone and set(stage.writes) & set(self.stages[self.index[first.to]].writes)
            if stage.exit or stage.gate or others or not alone or clash:
                stages.append(stage)
                home.update(dict.fromkeys(stage.nodes, stage.name))
            else:
                waiting[first.to] = stage
        for number, stage in enumerate(stages):
            edges = tuple(replace(edge, to=home.get(edge.to, edge.to)) for edge in stage.edges)
            stages[number] = replace(stage, edges=edges)
        linked = replace(self, stages=tuple(stages)).linked()
        return replace(
            linked, stages=tuple(_shortened(stage, own[stage.name]) for stage in linked.stages)
        )

    def __str__(self) -> str:
        titled = f", plan {self.title!r}" if self.title else ""
        lines = [f"Schedule of {len(self)} stage{'s' if len(self) > 1 else ''}{titled}"]
        rows = [[stage.name, *self._told(stage)] for stage in self.stages]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            padded = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)]
            lines.append("  " + "  ".join([*padded, row[4]]).rstrip())
        return "\n".join(lines)

    def _told(self, stage: Stage) -> list[str]:
        """What a stage reads, carries and decides, and whose rows arrive."""
        runs = [kind for kind, here in (("exit", stage.exit), ("gate", stage.gate)) if here]
        carried = dict.fromkeys(name for edge in stage.edges for name in edge.carries)
        reads = "reads " + (", ".join(stage.reads) or "nothing")
        carries = "carries " + ", ".join(carried) if carried else ""
        if stage.passes:
            runs.insert(0, "after " + ", ".join(stage.passes))
        if stage.gate:
            targets = ["leave" if edge.to == LEAVE else edge.to for edge in stage.edges]
            choices = [f">= {t:g} {to}" for t, to in zip(stage.thresholds, targets, strict=False)]
            decides = f"{', '.join(choices)}, else {targets[-1]}"
        else:
            decides = "answers" if stage.last else ""
        before = self.predecessors[stage.name]
        if not before:
            whose = "every row"
        elif len(before) == 1:
            name, successor = before[0]
            edges = self.stages[self.index[name]].edges
            of_gate = sum(edge.to != LEAVE for edge in edges) > 1
            whose = f"rows of {name}/{successor}" if of_gate else f"rows of {name}"
        else:
            names = [
                name if name not in [n for n, _ in before[:at]] else ""
                for at, (name, _) in enumerate(before)
            ]
            whose = f"rows of {' and '.join(filter(None, names))}, together"
        return [reads, carries, "; ".join([" and ".join(runs), decides]).strip("; "), whose]

    def to_json(self) -> list[dict[str, Any]]:
        """The stages as plain data. Thresholds are not in it: they are the plan's."""
        return [
            {
                "name": stage.name,
                "nodes": list(stage.nodes),
                "exit": stage.exit,
                "gate": stage.gate,
                "routes": list(stage.routes),
                "why": stage.why,
                "reads": list(stage.reads),
                "writes": list(stage.writes),
                "edges": [
                    {"to": edge.to, "successor": edge.successor, "carries": list(edge.carries)}
                    for edge in stage.edges
                ],
            }
            for stage in self.stages
        ]


def compiled(
    topology: Topology,
    thresholds: Mapping[str, Sequence[float]],
    max_exit: str | None = None,
    title: str = "",
) -> Schedule:
    """The schedule of thresholds: gates that are not named stay closed, and their rows take the
    last successor.

    Args:
        topology: decision points and their successors.
        thresholds: K - 1 by gate with K successors; +inf closes a way.
        deepest: an exit that answers whatever arrives there.
        title: of the printed schedule.

    Raises:
        UnknownName: no such gate or exit.
        InvalidArgument: another number of thresholds than the gate has scores.
    """
    for name, values in thresholds.items():
        if name not in topology.gates:
            raise unknown(name, topology.gates, "gate of this network")
        if len(values) != topology.routes(name):
            raise InvalidArgument(
                f"gate {name!r} has {len(values)} thresholds, expected {topology.routes(name)}, "
                f"one per score"
            )
    if max_exit is not None:
        topology.exit_index(max_exit)
    ways = _ways(topology, thresholds, max_exit)
    exits, segments = _needed(topology, ways)
    stages = list[Stage]()
    for node in topology.nodes:
        if node.name not in segments:
            continue
        routes = ways[node.name]
        gate = len(routes) > 1
        edges = tuple(_edge(node.successors[route], ways, segments, topology) for route in routes)
        limits = thresholds.get(node.name, ())
        why = "gate"
        if not gate:
            why = "deepest" if len(node.successors) > 1 else "end"
        stages.append(
            Stage(
                name=node.name,
                nodes=(node.name,),
                exit=node.name in exits,
                gate=gate,
                edges=edges,
                thresholds=tuple(float(limits[route]) for route in routes[:-1]),
                routes=routes[:-1],
                why=why,
                reads=_reads(node, exit_=node.name in exits, gate=gate),
                writes=_writes(topology, node, exit_=node.name in exits, gate=gate),
            )
        )
    start = _edge(topology.names[0], ways, segments, topology)
    return Schedule(tuple(stages), title, start.via).linked()


def full_schedule(topology: Topology) -> Schedule:
    """The schedule in which every exit and every gate runs, as recording needs it."""
    return compiled(
        topology, {gate: (-math.inf,) * topology.routes(gate) for gate in topology.gates}
    )


def alone(name: str) -> Schedule:
    """The segment of one node and nothing else, as a schedule: what a plain network is timed by."""
    return Schedule(
        (Stage(name, (name,), exit=False, gate=False, edges=(Edge(LEAVE, LEAVE),), reads=(INPUT,)),)
    )


def _ways(
    topology: Topology, thresholds: Mapping[str, Sequence[float]], max_exit: str | None
) -> dict[str, tuple[int, ...]]:
    """By node that rows can reach the numbers of the successors that they can take."""
    reached = {topology.names[0]}
    ways: dict[str, tuple[int, ...]] = {}
    for node in topology.nodes:
        if node.name not in reached:
            continue
        last = len(node.successors) - 1
        closed = (math.inf,) * last
        values = thresholds.get(node.name, closed)
        taken = [route for route, value in enumerate(values) if value < math.inf]
        ways[node.name] = (*taken, last)
        if node.name == max_exit:
            ways[node.name] = (node.successors.index(LEAVE),)
        reached.update(node.successors[route] for route in ways[node.name])
    return ways


def _needed(topology: Topology, ways: Mapping[str, tuple[int, ...]]) -> tuple[set[str], set[str]]:
    """The nodes whose exit runs, and those whose segment runs: looked for from the deepest node
    back.
    """
    exits = set[str]()
    segments = set[str]()
    for node in reversed(topology.nodes):
        if node.name not in ways:
            continue
        gate = len(ways[node.name]) > 1
        leaves = any(node.successors[route] == LEAVE for route in ways[node.name])
        if leaves or (gate and node.has_exit):
            exits.add(node.name)
        if gate:
            segments.add(node.name)
            exits.update(name for name in node.gate_reads if name in ways)
        if node.name in exits:
            segments.add(node.name)
            exits.update(name for name in node.exit_reads if name in ways)
        if node.name in segments:
            segments.update(name for name in (*node.after, *node.reads) if name in ways)
    return exits, segments


def _edge(
    successor: str, ways: Mapping[str, tuple[int, ...]], segments: set[str], topology: Topology
) -> Edge:
    """Where rows that choose a successor really go: a node at which nothing runs hands them on."""
    to = successor
    via = list[str]()
    while to != LEAVE and to not in segments:
        via.append(to)
        (route,) = ways[to]  # with a gate its segment would run
        to = topology.node(to).successors[route]
    return Edge(to, successor, via=tuple(via))


def _reads(node: Node, *, exit_: bool, gate: bool) -> tuple[str, ...]:
    """The names of what a node reads, as far as its topology tells."""
    names = [node.source or INPUT, *node.reads]
    for runs, reads in ((exit_, node.exit_reads), (gate, node.gate_reads)):
        if runs:
            names += [name if is_input(name) else name + LOGITS for name in reads]
    return tuple(dict.fromkeys(names))


def _writes(topology: Topology, node: Node, *, exit_: bool, gate: bool) -> tuple[str, ...]:
    """The names of what a node gives, as far as its topology tells."""
    ends = [node.name + end for end, runs in ((LOGITS, exit_), (SCORE, gate)) if runs]
    return (*topology.written_by(node.name), *ends)


def _together(before: Stage, stage: Stage) -> Stage:
    """Two stages of which the first asks nothing, as one."""
    reads = dict.fromkeys(
        [*before.reads, *(name for name in stage.reads if name not in before.writes)]
    )
    writes = dict.fromkeys([*before.writes, *stage.writes])
    along = (*before.passed, *before.edges[0].via, *stage.passed)
    nodes = (*before.nodes, *stage.nodes)
    return replace(stage, nodes=nodes, reads=tuple(reads), writes=tuple(writes), along=along)


def _shortened(stage: Stage, own: Sequence[str]) -> Stage:
    """A joined stage that gives only what its last node gives and what later stages read."""
    carried = {name for edge in stage.edges for name in edge.carries}
    return replace(
        stage, writes=tuple(name for name in stage.writes if name in own or name in carried)
    )
