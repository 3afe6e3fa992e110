"""Which decision points of a network may follow each other: a chain, forks, and forks that re-join.
No torch.

One topology stands in the network, in the trace and in every plan. `plan.schedule(topology)` says
what of it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from offramp._support.find import unknown
from offramp.errors import BadNetwork, InvalidArgument
from offramp.plans.signature import is_input

LEAVE = "leave"  # the successor of rows that are answered at a node
MOST_NODES = 2000
MOST_PATHS = 16  # that are recorded: each of them gives every row an answer of its own

Path = tuple[str, ...]  # names of nodes, from the first one on


@dataclass(frozen=True)
class Node:
    """A decision point: a segment and, under the same name, an exit, a gate, or both.

    Attributes:
        name: its name.
        successors: where its rows may go next, the shallow choice first. `LEAVE` is one of them
            where an exit stands. A node with K > 1 successors has a gate that gives K - 1 scores.
        after: the nodes whose segment this one may continue from; empty where it reads the raw
            input. With several of them (paths re-join here) the segment reads what the last of them
            on a row's path gave.
        exit_reads: earlier exits whose logits its exit needs, and inputs (`x/mask`).
        gate_reads: earlier exits whose logits its gate needs, and inputs.
        reads: earlier nodes whose output the segment takes as well, as further arguments. One that
            did not run for a row has a declared `Default`.
    """

    name: str
    successors: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    exit_reads: tuple[str, ...] = ()
    gate_reads: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def has_exit(self) -> bool:
        """Whether rows can be answered here."""
        return LEAVE in self.successors

    @property
    def source(self) -> str | None:
        """The name of the tensor that the segment continues from: whoever wrote it. None for the
        raw input.
        """
        return "|".join(self.after) if self.after else None


@dataclass(frozen=True)
class Default:
    """What is read of a node that did not run for a row, because it stands on another path.

    Attributes:
        exit: the node whose logits (or output) stand for themselves where it ran.
        value: of each number where it did not.
        shape: of a row of them, such as (10,).
        output: whether it is the output of the node's segment, which other segments read, and not
            its exit's logits.
    """

    exit: str
    value: float
    shape: tuple[int, ...]
    output: bool = False


@dataclass(frozen=True)
class Topology:
    """Nodes in topological order: every row starts at the first one, and each successor stands
    later.

    Attributes:
        nodes: the decision points.
        defaults: of exits that are read by nodes which can be reached without them.

    Raises:
        BadNetwork: names that are no names, a successor that is not a later node, a node that no
            row can reach, or something is read that no path to the reader gives.
    """

    nodes: tuple[Node, ...]
    defaults: tuple[Default, ...] = ()

    @staticmethod
    def chain(nodes: Sequence[Node]) -> Topology:
        """The chain of these nodes: an exit at each, and after it the next one. Their successors
        are filled in.
        """
        names = [node.name for node in nodes]
        following: list[tuple[str, ...]] = [(LEAVE, name) for name in names[1:]]
        if names:
            following.append((LEAVE,))
        return Topology(
            tuple(
                replace(node, successors=after)
                for node, after in zip(nodes, following, strict=True)
            )
        )

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not names or len(set(names)) != len(names):
            raise BadNetwork(
                f"nodes are {names}; a network needs at least one, and names of their own"
            )
        if len(names) > MOST_NODES:
            raise BadNetwork(
                f"there are {len(names):,} nodes, expected at most {MOST_NODES:,}; cut fewer places"
            )
        for name in names:
            if not isinstance(name, str) or not name or not name.isprintable():
                raise BadNetwork(
                    f"a node is called {name!r}, expected printable characters; name it otherwise"
                )
        if LEAVE in names:
            raise BadNetwork(
                f"a node is called {LEAVE!r}, which means that rows are answered; name it otherwise"
            )
        index = self._index
        arrivals = {names[0]}
        for number, node in enumerate(self.nodes):
            if not node.successors or len(set(node.successors)) != len(node.successors):
                raise BadNetwork(
                    f"node {node.name!r} must have successors that differ, got {node.successors}"
                )
            for other in node.successors:
                if other != LEAVE and index.get(other, -1) <= number:
                    raise BadNetwork(
                        f"the successors of node {node.name!r} must be later nodes, got {other!r}"
                    )
            for other in (*node.after, *node.reads, *node.exit_reads, *node.gate_reads):
                of_segment = other in node.after or other in node.reads
                if index.get(other, number) >= number and (of_segment or not is_input(other)):
                    raise BadNetwork(
                        f"node {node.name!r} reads {other!r}, which is no earlier node of {names}"
                    )
            arrivals.update(node.successors)
        if missing := [name for name in names if name not in arrivals]:
            raise BadNetwork(
                f"no row can reach the node {missing[0]!r}; make it a successor of an earlier one"
            )
        if not self.is_chain:
            self._require_writers()

    def _require_writers(self) -> None:
        """Raise BadNetwork where a node can be reached on a path that does not give what it
        reads.
        """
        given = {one.exit for one in self.defaults if not one.output}
        outputs = {one.exit for one in self.defaults if one.output}
        for one in self.defaults:
            if one.output and one.exit not in self.names:
                raise BadNetwork(
                    f"a default is declared of {one.exit!r}, expected one of the nodes {self.names}"
                )
            if not one.output and one.exit not in self.exits:
                raise BadNetwork(
                    f"a default is declared of {one.exit!r}, expected one of the exits {self.exits}"
                )
        for node in self.nodes:
            always = self._always_before[node.name]
            for other in (*node.exit_reads, *node.gate_reads):
                if is_input(other):
                    continue
                if other not in self.exits:
                    raise BadNetwork(
                        f"node {node.name!r} reads the exit of {other!r}, where none stands"
                    )
                if other not in always and other not in given:
                    raise BadNetwork(
                        f"node {node.name!r} reads {other!r}, which not every path to it passes; "
                        f"declare a Default"
                    )
            for other in node.reads:
                if other not in always and other not in outputs:
                    raise BadNetwork(
                        f"node {node.name!r} reads the output of {other!r}, which not every path "
                        f"to it passes; "
                        "declare a default for it"
                    )
            if node.after and self._reached_without(node):
                raise BadNetwork(
                    f"node {node.name!r} continues from {' or '.join(node.after)}, and there is a "
                    f"path to it that "
                    "passes none of them"
                )

    def _reached_without(self, node: Node) -> bool:
        """Whether a path leads to a node that passes none of those in its `after`."""
        reached = {self.names[0]} - set(node.after)
        for other in self.nodes:
            if other.name in reached:
                reached.update(set(other.successors) - set(node.after))
        return node.name in reached

    @cached_property
    def _index(self) -> dict[str, int]:
        return {node.name: index for index, node in enumerate(self.nodes)}

    @cached_property
    def _always_before(self) -> dict[str, set[str]]:
        """By node those that every path to it passes."""
        found: dict[str, set[str]] = {self.nodes[0].name: set()}
        for node in self.nodes:
            passed = found.get(node.name, set()) | {node.name}
            for other in node.successors:
                found[other] = found[other] & passed if other in found else passed
        return found

    @cached_property
    def is_chain(self) -> bool:
        """Whether there are exits along one line and nothing else, as `cut` and `ladder` make
        it.
        """
        names = [node.name for node in self.nodes]
        wanted = [(LEAVE, name) for name in names[1:]] + [(LEAVE,)]
        single = all(len(node.after) <= 1 and not node.reads for node in self.nodes)
        return single and not self.defaults and [node.successors for node in self.nodes] == wanted

    @cached_property
    def exits(self) -> tuple[str, ...]:
        """Names of all exits, shallow to deep."""
        return tuple(node.name for node in self.nodes if node.has_exit)

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """Names of all gates, shallow to deep: of the nodes with several successors."""
        return tuple(node.name for node in self.nodes if len(node.successors) > 1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all nodes, in topological order."""
        return tuple(node.name for node in self.nodes)

    def node(self, name: str) -> Node:
        """A node by its name. Raises UnknownName with the nearest."""
        if name not in self._index:
            raise unknown(name, self.names, "node of this network")
        return self.nodes[self._index[name]]

    def exit_index(self, name: str) -> int:
        """The index of an exit. Raises UnknownName with the nearest."""
        if name not in self.exits:
            raise unknown(name, self.exits, "exit of this network")
        return self.exits.index(name)

    def written_by(self, name: str) -> tuple[str, ...]:
        """The names under which a segment's output is known: its own, and those that it shares with
        other arms.
        """
        shared = [node.source for node in self.nodes if len(node.after) > 1 and name in node.after]
        return (name, *dict.fromkeys(source for source in shared if source is not None))

    # What is recorded: an answer depends on the path that a row took.

    @cached_property
    def paths(self) -> Mapping[str, tuple[Path, ...]]:
        """By node all paths that lead to it, itself included. Raises BadNetwork for more than
        sixteen.
        """
        found: dict[str, list[Path]] = {name: [] for name in self.names}
        found[self.names[0]].append((self.names[0],))
        for node in self.nodes:
            if len(found[node.name]) > MOST_PATHS:
                raise BadNetwork(
                    f"{len(found[node.name])} paths lead to {node.name!r}, expected at most "
                    f"{MOST_PATHS}, each of "
                    "which is recorded"
                )
            for other in node.successors:
                if other != LEAVE:
                    found[other] += [(*path, other) for path in found[node.name]]
        return {name: tuple(paths) for name, paths in found.items()}

    @cached_property
    def has_many_paths(self) -> bool:
        """Whether there are more paths than are recorded: then a trace is recorded at settings of
        one dial.
        """
        count = dict.fromkeys(self.names, 0)
        count[self.names[0]] = 1
        for node in self.nodes:
            for other in node.successors:
                if other != LEAVE:
                    count[other] += count[node.name]
        return max(count.values()) > MOST_PATHS

    @cached_property
    def recorded_paths(self) -> Mapping[str, tuple[Path, ...]]:
        """By node the paths that are recorded: all of them, or of too many the dearest alone."""
        if not self.has_many_paths:
            return self.paths
        path = self.reference_path(self.exits[-1])
        return {name: (path[: number + 1],) for number, name in enumerate(path)}

    def label(self, path: Path) -> str:
        """What the last node of a path is called among the columns of a trace: with several paths,
        by number.
        """
        name = path[-1]
        paths = self.recorded_paths[name]
        return name if len(paths) == 1 else f"{name}#{paths.index(path)}"

    @cached_property
    def exit_labels(self) -> tuple[str, ...]:
        """The labels of all exits, each once for every path that leads there; of a chain its
        exits.
        """
        if self.is_chain:
            return self.exits
        found = list[str]()
        for name in self.exits:
            found += [self.label(path) for path in self.recorded_paths.get(name, ())]
        return tuple(found)

    @cached_property
    def gate_labels(self) -> tuple[str, ...]:
        """The labels of all gates, each once for every path that leads there; of a chain its
        gates.
        """
        if self.is_chain:
            return self.gates
        found = list[str]()
        for name in self.gates:
            found += [self.label(path) for path in self.recorded_paths.get(name, ())]
        return tuple(found)

    def reference_path(self, name: str) -> Path:
        """The path to a node that rows take where every gate on the way sends them to its last
        successor.
        """

        if self.has_many_paths:
            path = [self.names[0]]
            while path[-1] != name:
                later = self.node(path[-1]).successors[-1]
                if later == LEAVE:
                    raise BadNetwork(f"the dearest path ends before it comes to {name!r}")
                path.append(later)
            return tuple(path)

        def choices(path: Path) -> list[int]:
            return [self.node(one).successors.index(other) for one, other in pairwise(path)]

        return max(self.paths[name], key=choices)

    def score_columns(self, label: str) -> tuple[str, ...]:
        """The columns of a trace that hold a gate's scores: one, or with more than two successors
        one per route.
        """
        gate = label if label in self._index else label.rpartition("#")[0]
        if self.routes(gate) == 1:
            return (f"score/{label}",)
        return tuple(f"score/{label}@{route}" for route in range(self.routes(gate)))

    def routes(self, gate: str) -> int:
        """How many scores a gate gives: one fewer than it has successors."""
        return len(self.node(gate).successors) - 1

    def require_chain(self, what: str) -> None:
        """Raise BadNetwork where there are forks. what: what cannot be done with them."""
        if not self.is_chain:
            raise BadNetwork(f"{what} works along a chain of exits, and this network has forks")

    def to_json(self) -> list[dict[str, Any]]:
        """The nodes as plain data. A chain is written as the first edition wrote it: fingerprints
        depend on it.
        """
        if not self.is_chain:
            found = [asdict(node) for node in self.nodes]
            for body in found:
                if not body["reads"]:
                    del body["reads"]
            if self.defaults:
                found[0]["defaults"] = [asdict(one) for one in self.defaults]
            return found
        return [
            {
                "name": node.name,
                "successor": following,
                "after": node.after[0] if node.after else None,
                "exit_reads": node.exit_reads,
                "gate_reads": node.gate_reads,
            }
            for node, following in zip(self.nodes, [*self.names[1:], None], strict=True)
        ]

    @staticmethod
    def from_json(nodes: list[Mapping[str, Any]]) -> Topology:
        """The topology written by `to_json`, of either edition. Raises InvalidArgument,
        BadNetwork.
        """
        try:
            made = tuple(_node_from(node) for node in nodes)
            defaults = nodes[0].get("defaults", ()) if nodes else ()
            rest = list[Default]()
            for one in defaults:
                output = bool(one.get("output", False))
                rest.append(Default(one["exit"], float(one["value"]), tuple(one["shape"]), output))
            return Topology(made, tuple(rest))
        except (AttributeError, TypeError, KeyError, ValueError) as problem:
            if isinstance(problem, BadNetwork):
                raise
            raise InvalidArgument(
                f"nodes are written as {nodes!r}, expected name, successors, after and reads"
            ) from problem


def _node_from(body: Mapping[str, Any]) -> Node:
    reads = {key: tuple(body[key]) for key in ("exit_reads", "gate_reads")}
    if "successor" not in body:
        reads["reads"] = tuple(body.get("reads", ()))
        return Node(body["name"], tuple(body["successors"]), tuple(body["after"]), **reads)
    if set(body) != {"name", "successor", "after", *reads}:
        raise KeyError("fields")
    following = () if body["successor"] is None else (body["successor"],)
    after = () if body["after"] is None else (body["after"],)
    return Node(body["name"], (LEAVE, *following), after, **reads)
