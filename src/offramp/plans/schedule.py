"""The compiled form of a topology and a plan: which stages run, the tensors that each reads and
carries, and where its rows go next. Does not import torch.

Every part of the package that needs to know what runs asks the schedule: the Runner executes it on
tensors, `trace.replay` on columns, pricing charges its stages, `export` writes it into the
manifest.

Three things do not run: an exit at which no row leaves, unless a later exit reads it; a segment
from which nothing continues (in a cascade, a whole model); an arm of a fork that no row can take.
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

# Names of tensors: "<node>" is the output of a segment, "<node>/logits" that of its exit.
LOGITS = "/logits"
SCORE = "/score"


@dataclass(frozen=True)
class Edge:
    """Where some rows of a stage go next.

    Attributes:
        to: the name of a later stage, or `LEAVE`.
        successor: the successor of the stage's node that these rows chose.
        carries: names of the tensors that later stages read; `x` stands for all inputs.
        via: the nodes on the way at which this plan runs nothing.
    """

    to: str
    successor: str
    carries: tuple[str, ...] = ()
    via: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One entry of a schedule: the segments, exit and gate that run together, and where rows go
    next.

    Attributes:
        name: the node of the exit and the gate.
        nodes: the nodes whose segments run, in order, the node of this name last.
        exit: whether its exit runs.
        gate: whether its gate decides; otherwise all rows go the same way.
        edges: where rows go, the shallow choice first; K of them with a gate, otherwise one.
        thresholds: K - 1, of all edges but the last.
        routes: the columns of the gate's scores that belong to these thresholds.
        why: why rows are answered where they leave: "gate", "end", or "deepest" if the plan ends
            before the network.
        reads: names of the tensors that must exist before the stage runs.
        writes: names of the tensors that it computes.
        along: `nodes`, and between them the nodes at which nothing runs. Empty if there are none.
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
        """Earlier nodes without an open exit, whose segments run as part of this stage."""
        return self.nodes[:-1]

    @property
    def leaves(self) -> bool:
        """Whether rows can be answered here."""
        return LEAVE in [edge.to for edge in self.edges]


@dataclass(frozen=True)
class Schedule:
    """Stages in topological order; rows start at the first. `print(schedule)` shows what runs.

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
        """The position of each stage, by its name."""
        return {stage.name: number for number, stage in enumerate(self.stages)}

    @cached_property
    def predecessors(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        """The edges that lead to each stage, as (the stage before, the successor chosen there)."""
        arriving: dict[str, tuple[tuple[str, str], ...]] = {}
        for stage in self.stages:
            arriving.setdefault(stage.name, ())
            for edge in stage.edges:
                if edge.to != LEAVE:
                    arrived = arriving.get(edge.to, ())
                    arriving[edge.to] = (*arrived, (stage.name, edge.successor))
        return arriving

    def linked(
        self, tensors: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] | None = None
    ) -> Schedule:
        """The same schedule with the tensors that each edge carries.

        An edge carries the tensors that its target reads. It also carries the tensors that the
        edges behind the target carry, unless the target computes them. This is known from the last
        stage backwards.

        Args:
            tensors: the names of the tensors that each stage reads and writes, where they are known
                better than from the topology. A segment may hand on several tensors.

        Returns:
            A new schedule.
        """
        needed: dict[str, tuple[str, ...]] = {LEAVE: ()}  # rows that leave carry nothing
        stages = list[Stage]()
        for stage in reversed(self.stages):
            if tensors is not None:
                reads, writes = tensors[stage.name]
                stage = replace(stage, reads=reads, writes=writes)
            edges = list[Edge]()
            # what an edge to this stage must carry, as a set in order
            names = dict.fromkeys(stage.reads)
            for edge in stage.edges:
                carries = needed[edge.to]
                edges.append(replace(edge, carries=carries))
                for name in carries:
                    if name not in stage.writes:
                        names[name] = None
            stages.append(replace(stage, edges=tuple(edges)))
            needed[stage.name] = tuple(names)
        return replace(self, stages=tuple(reversed(stages)))

    def joined(self) -> Schedule:
        """The same schedule in fewer stages.

        A stage without an open exit becomes part of the next one. It stays alone if its rows may
        take several ways, if other rows arrive at the next stage as well, or if both write a tensor
        of the same name.
        """
        waiting: dict[str, Stage] = {}  # stages that run as part of their successor, by its name
        home: dict[str, str] = {}  # the stage that each node has become part of
        last_writes: dict[str, tuple[str, ...]] = {}  # what the last node of each stage gives
        stages = list[Stage]()
        for stage in self.stages:
            last_writes[stage.name] = stage.writes
            if stage.name in waiting:
                stage = _together(waiting.pop(stage.name), stage)
            if self._joins_the_next(stage):
                waiting[stage.edges[0].to] = stage
            else:
                stages.append(stage)
                home.update(dict.fromkeys(stage.nodes, stage.name))
        # Edges to a node lead to the stage that it is part of now, and carry what that one reads.
        for number, stage in enumerate(stages):
            edges = [replace(edge, to=home.get(edge.to, edge.to)) for edge in stage.edges]
            stages[number] = replace(stage, edges=tuple(edges))
        linked = replace(self, stages=tuple(stages)).linked()
        shortened = [_shortened(stage, last_writes[stage.name]) for stage in linked]
        return replace(linked, stages=tuple(shortened))

    def _joins_the_next(self, stage: Stage) -> bool:
        """Whether a stage can run as part of its only successor."""
        if stage.exit or stage.gate or len(stage.edges) > 1:
            return False
        to = stage.edges[0].to
        if to == LEAVE or len(self.predecessors[to]) > 1:
            return False
        following = self.stages[self.index[to]]
        return not set(stage.writes) & set(following.writes)

    def __str__(self) -> str:
        head = f"Schedule of {len(self)} stage{'s' if len(self) > 1 else ''}"
        if self.title:
            head += f", plan {self.title!r}"
        rows = [self._cells(stage) for stage in self.stages]
        # every column but the last is as wide as its widest cell
        for column in range(4):
            width = max([len(row[column]) for row in rows])
            for row in rows:
                row[column] = row[column].ljust(width)
        lines = [head]
        for row in rows:
            lines.append("  " + "  ".join(row).rstrip())
        return "\n".join(lines)

    def _cells(self, stage: Stage) -> list[str]:
        """Name, what the stage reads, carries and decides, and whose rows arrive: a line of the
        table.
        """
        reads = "reads " + (", ".join(stage.reads) or "nothing")
        carried = dict[str, None]()  # a set in order
        for edge in stage.edges:
            carried.update(dict.fromkeys(edge.carries))
        carries = ""
        if carried:
            carries = "carries " + ", ".join(carried)
        runs = list[str]()
        if stage.passes:
            runs.append("after " + ", ".join(stage.passes))
        if stage.exit:
            runs.append("exit")
        if stage.gate:
            runs.append("gate")
        actions = "; ".join([" and ".join(runs), self._decides(stage)]).strip("; ")
        return [stage.name, reads, carries, actions, self._arrivals(stage)]

    def _decides(self, stage: Stage) -> str:
        """Which rows take which way: ">= 0.9 leave, else layer2"."""
        if not stage.gate:
            if stage.last:
                return "answers"
            return ""
        targets = [edge.to for edge in stage.edges]  # LEAVE prints as "leave"
        choices = list[str]()
        for threshold, target in zip(stage.thresholds, targets, strict=False):
            choices.append(f">= {threshold:g} {target}")
        return f"{', '.join(choices)}, else {targets[-1]}"

    def _arrivals(self, stage: Stage) -> str:
        """Whose rows arrive: "every row", "rows of layer1", "rows of a and b, together"."""
        before = self.predecessors[stage.name]
        if not before:
            return "every row"
        # several edges may come from one stage
        names = [*dict.fromkeys(name for name, _ in before)]
        if len(before) > 1:
            return f"rows of {' and '.join(names)}, together"
        ((name, successor),) = before
        # a stage whose rows go on in several ways names the way too
        going_on = [edge for edge in self.stages[self.index[name]].edges if edge.to != LEAVE]
        if len(going_on) > 1:
            return f"rows of {name}/{successor}"
        return f"rows of {name}"

    def to_json(self) -> list[dict[str, Any]]:
        """The stages as plain data. Thresholds are not in it: they belong to the plan."""
        entries = list[dict[str, Any]]()
        for stage in self.stages:
            edges = list[dict[str, Any]]()
            for edge in stage.edges:
                carries = list(edge.carries)
                edges.append({"to": edge.to, "successor": edge.successor, "carries": carries})
            entries.append(
                {
                    "name": stage.name,
                    "nodes": list(stage.nodes),
                    "exit": stage.exit,
                    "gate": stage.gate,
                    "routes": list(stage.routes),
                    "why": stage.why,
                    "reads": list(stage.reads),
                    "writes": list(stage.writes),
                    "edges": edges,
                }
            )
        return entries


def compiled(
    topology: Topology,
    thresholds: Mapping[str, Sequence[float]],
    max_exit: str | None = None,
    title: str = "",
) -> Schedule:
    """The schedule of a topology under thresholds.

    Args:
        topology: decision points and their successors.
        thresholds: by gate, K - 1 thresholds for K successors; +inf closes a way. A gate that is
            not named stays closed: its rows take the last successor.
        max_exit: an exit that answers every row that arrives there.
        title: of the printed schedule.

    Returns:
        The schedule, with the tensors that each edge carries.

    Raises:
        UnknownName: there is no gate or exit of this name.
        InvalidArgument: a gate must have another number of thresholds.
    """
    for name, values in thresholds.items():
        if name not in topology.gates:
            raise unknown(name, topology.gates, "gate of this network")
        scores = topology.routes(name)
        if len(values) != scores:
            noun = "threshold" if scores == 1 else "thresholds"
            raise InvalidArgument(
                f"gate {name!r} must have {scores} {noun}, one per score, got {len(values)}"
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
        edges = [_edge(node.successors[route], ways, segments, topology) for route in routes]
        limits = thresholds.get(node.name, ())
        has_exit = node.name in exits
        has_gate = len(routes) > 1
        # the last way takes the rest: it has no threshold
        stage_thresholds = [float(limits[route]) for route in routes[:-1]]
        if has_gate:
            why = "gate"
        elif len(node.successors) > 1:
            why = "deepest"  # the network goes on here, and the plan does not
        else:
            why = "end"
        stages.append(
            Stage(
                name=node.name,
                nodes=(node.name,),
                exit=has_exit,
                gate=has_gate,
                edges=tuple(edges),
                thresholds=tuple(stage_thresholds),
                routes=routes[:-1],
                why=why,
                reads=_reads(node, exit_=has_exit, gate=has_gate),
                writes=_writes(topology, node, exit_=has_exit, gate=has_gate),
            )
        )
    start = _edge(topology.names[0], ways, segments, topology)
    return Schedule(tuple(stages), title, start.via).linked()


def full_schedule(topology: Topology) -> Schedule:
    """The schedule in which every exit and every gate runs, as recording needs it."""
    open_to_all = {}
    for gate in topology.gates:
        open_to_all[gate] = (-math.inf,) * topology.routes(gate)
    return compiled(topology, open_to_all)


def alone(name: str) -> Schedule:
    """A schedule of one segment without exit and gate, to time a plain network."""
    leave = Edge(LEAVE, LEAVE)
    stage = Stage(name, (name,), exit=False, gate=False, edges=(leave,), reads=(INPUT,))
    return Schedule((stage,))


def _ways(
    topology: Topology, thresholds: Mapping[str, Sequence[float]], max_exit: str | None
) -> dict[str, tuple[int, ...]]:
    """For each node that rows can reach: the numbers of the successors that they can take."""
    # The order is topological: when it is a node's turn, all nodes that lead to it are done.
    reached = {topology.names[0]}
    ways: dict[str, tuple[int, ...]] = {}
    for node in topology.nodes:
        if node.name not in reached:
            continue
        last = len(node.successors) - 1
        if node.name == max_exit:
            routes = [node.successors.index(LEAVE)]
        else:
            routes = []
            for route, limit in enumerate(thresholds.get(node.name, ())):
                if limit < math.inf:
                    routes.append(route)
            routes.append(last)
        ways[node.name] = tuple(routes)
        for route in routes:
            reached.add(node.successors[route])
    return ways


def _needed(topology: Topology, ways: Mapping[str, tuple[int, ...]]) -> tuple[set[str], set[str]]:
    """The nodes whose exit runs, and those whose segment runs.

    Walks from the last node back: a node that runs needs what it reads, from earlier nodes.
    """
    exits = set[str]()
    segments = set[str]()
    for node in reversed(topology.nodes):
        if node.name not in ways:
            continue
        targets = [node.successors[route] for route in ways[node.name]]
        has_gate = len(targets) > 1
        # a gate scores the logits of its node's exit, also where no row can leave
        if LEAVE in targets or (has_gate and node.has_exit):
            exits.add(node.name)
        if has_gate:
            segments.add(node.name)
            exits.update(ways.keys() & set(node.gate_reads))
        if node.name in exits:
            segments.add(node.name)
            exits.update(ways.keys() & set(node.exit_reads))
        if node.name in segments:
            segments.update(ways.keys() & {*node.after, *node.reads})
    return exits, segments


def _edge(
    successor: str, ways: Mapping[str, tuple[int, ...]], segments: set[str], topology: Topology
) -> Edge:
    """Where rows that choose a successor arrive: the next node at which something runs."""
    to = successor
    via = list[str]()
    while to != LEAVE and to not in segments:
        via.append(to)
        # exactly one way: a node with a gate has a segment that runs
        (route,) = ways[to]
        to = topology.node(to).successors[route]
    return Edge(to, successor, via=tuple(via))


def _reads(node: Node, *, exit_: bool, gate: bool) -> tuple[str, ...]:
    """The names of the tensors that a node reads, as far as its topology is known."""
    names = [node.source or INPUT, *node.reads]
    earlier = list[str]()
    if exit_:
        earlier += node.exit_reads
    if gate:
        earlier += node.gate_reads
    for name in earlier:
        names.append(name if is_input(name) else name + LOGITS)
    return tuple(dict.fromkeys(names))


def _writes(topology: Topology, node: Node, *, exit_: bool, gate: bool) -> tuple[str, ...]:
    """The names of the tensors that a node computes, as far as its topology is known."""
    names = [*topology.written_by(node.name)]
    if exit_:
        names.append(node.name + LOGITS)
    if gate:
        names.append(node.name + SCORE)
    return tuple(names)


def _together(before: Stage, stage: Stage) -> Stage:
    """Two stages as one. The first has no exit and no gate."""
    # what the first computes need not exist before
    reads = dict.fromkeys(before.reads)  # a set in order
    for name in stage.reads:
        if name not in before.writes:
            reads[name] = None
    writes = dict.fromkeys([*before.writes, *stage.writes])
    along = (*before.passed, *before.edges[0].via, *stage.passed)
    nodes = (*before.nodes, *stage.nodes)
    return replace(stage, nodes=nodes, reads=tuple(reads), writes=tuple(writes), along=along)


def _shortened(stage: Stage, last_writes: Sequence[str]) -> Stage:
    """A joined stage that writes only what its last node computes and later stages read."""
    needed = set(last_writes)
    for edge in stage.edges:
        needed.update(edge.carries)
    writes = [name for name in stage.writes if name in needed]
    return replace(stage, writes=tuple(writes))
