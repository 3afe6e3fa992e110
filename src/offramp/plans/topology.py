"""Which decision points of a network may follow each other: a chain, forks, and forks that re-join.
Does not import torch.

The network, its traces and its plans share one topology. `plan.schedule(topology)` gives the part
of it that a plan runs.
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
MOST_PATHS = 16  # recorded paths per node: each gives every row an answer of its own

Path = tuple[str, ...]  # names of nodes, from the first one on


@dataclass(frozen=True)
class Node:
    """A decision point: a segment and, under the same name, an exit, a gate, or both.

    Attributes:
        name: of the node.
        successors: where its rows may go next, the shallow choice first. `LEAVE` is one of them if
            the node has an exit. A node with K > 1 successors has a gate that gives K - 1 scores.
        after: the nodes whose segment this one may continue from; empty if it reads the raw input.
            If there are several (paths re-join here), the segment reads the output of the last of
            them on a row's path.
        exit_reads: earlier exits whose logits its exit needs, and inputs (`x/mask`).
        gate_reads: earlier exits whose logits its gate needs, and inputs.
        reads: earlier nodes whose output the segment takes as further arguments. A node that did
            not run for a row has a declared `Default`.
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
        """The name of the tensor that the segment continues from. None for the raw input."""
        if not self.after:
            return None
        return "|".join(self.after)


@dataclass(frozen=True)
class Default:
    """The value that is read of a node that did not run for a row, because it is on another path.

    Attributes:
        exit: the node whose logits (or output) are read where it ran.
        value: of each number where it did not run.
        shape: of one row, such as (10,).
        output: whether the output of the node's segment is read by other segments. Otherwise the
            logits of its exit are read.
    """

    exit: str
    value: float
    shape: tuple[int, ...]
    output: bool = False


@dataclass(frozen=True)
class Topology:
    """Nodes in topological order: every row starts at the first one, and each successor comes
    later.

    Attributes:
        nodes: the decision points.
        defaults: of nodes that are read by nodes on paths that do not pass them.

    Raises:
        BadNetwork: a name is not allowed, a successor is not a later node, no row can reach a node,
            or a node reads something that no path to it gives.
    """

    nodes: tuple[Node, ...]
    defaults: tuple[Default, ...] = ()

    @staticmethod
    def chain(nodes: Sequence[Node]) -> Topology:
        """Make a chain: an exit at each node, and after it the next node.

        Args:
            nodes: from shallow to deep. Their successors are filled in.

        Returns:
            The topology.
        """
        chained = []
        for number, node in enumerate(nodes):
            successors: tuple[str, ...] = (LEAVE,)
            if number + 1 < len(nodes):
                successors = (LEAVE, nodes[number + 1].name)
            chained.append(replace(node, successors=successors))
        return Topology(tuple(chained))

    def __post_init__(self) -> None:
        self._require_names()
        index = self._index
        arrivals = {self.names[0]}  # the nodes that rows can reach
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
            self._require_earlier(node)
            arrivals.update(node.successors)
        for name in self.names:
            if name not in arrivals:
                raise BadNetwork(
                    f"no row can reach the node {name!r}; make it a successor of an earlier one"
                )
        if not self.is_chain:
            self._require_writers()

    def _require_names(self) -> None:
        """Raise BadNetwork for too many nodes, and for names that are not allowed."""
        names = [node.name for node in self.nodes]
        if not names or len(set(names)) != len(names):
            raise BadNetwork(
                f"a network must have at least one node, and each its own name: {names}"
            )
        if len(names) > MOST_NODES:
            raise BadNetwork(
                f"there are {len(names):,} nodes, expected at most {MOST_NODES:,}; cut fewer places"
            )
        for name in names:
            if not isinstance(name, str) or not name or not name.isprintable():
                raise BadNetwork(f"the name of a node must be printable characters, got {name!r}")
        if LEAVE in names:
            raise BadNetwork(
                f"a node must not be called {LEAVE!r}: this means that rows are answered"
            )

    def _require_earlier(self, node: Node) -> None:
        """Raise BadNetwork where a node reads something that is not an earlier node."""
        number = self._index[node.name]
        read = [*node.after, *node.reads]
        for other in (*node.exit_reads, *node.gate_reads):
            if not is_input(other):  # exits and gates may read inputs of the network too
                read.append(other)
        for other in read:
            if self._index.get(other, number) >= number:
                raise BadNetwork(
                    f"node {node.name!r} reads {other!r}, which is not an earlier node of "
                    f"{[*self.names]}"
                )

    def _require_writers(self) -> None:
        """Raise BadNetwork where rows reach a node on a path that does not give what it reads."""
        # A reader needs a default only if some path to it does not pass the node that it reads.
        logits_defaults = set()
        output_defaults = set()
        for default in self.defaults:
            if default.output and default.exit not in self.names:
                raise BadNetwork(
                    f"a default must be declared of one of the nodes {self.names}, got "
                    f"{default.exit!r}"
                )
            if not default.output and default.exit not in self.exits:
                raise BadNetwork(
                    f"a default must be declared of one of the exits {self.exits}, got "
                    f"{default.exit!r}"
                )
            if default.output:
                output_defaults.add(default.exit)
            else:
                logits_defaults.add(default.exit)
        for node in self.nodes:
            passed = self._always_before[node.name]
            for other in (*node.exit_reads, *node.gate_reads):
                if is_input(other):
                    continue
                if other not in self.exits:
                    raise BadNetwork(
                        f"node {node.name!r} reads the exit of {other!r}, which does not have one"
                    )
                if other not in passed and other not in logits_defaults:
                    raise BadNetwork(
                        f"node {node.name!r} reads {other!r}, which not every path to it passes; "
                        f"declare a Default"
                    )
            for other in node.reads:
                if other not in passed and other not in output_defaults:
                    raise BadNetwork(
                        f"node {node.name!r} reads the output of {other!r}, which not every path "
                        f"to it passes; declare a default for it"
                    )
            if node.after and self._reached_without(node):
                raise BadNetwork(
                    f"node {node.name!r} continues from {' or '.join(node.after)}, and there is a "
                    f"path to it that passes none of them"
                )

    def _reached_without(self, node: Node) -> bool:
        """Whether a path leads to a node that passes none of those in its `after`."""
        # Walk from the first node to all successors, and never enter a node in `after`.
        avoided = set(node.after)
        reached = {self.names[0]} - avoided
        for other in self.nodes:
            if other.name in reached:
                reached.update(set(other.successors) - avoided)
        return node.name in reached

    @cached_property
    def _index(self) -> dict[str, int]:
        return {node.name: index for index, node in enumerate(self.nodes)}

    @cached_property
    def _always_before(self) -> dict[str, set[str]]:
        """For each node, the nodes that every path to it passes."""
        # A node is passed on every path if it is passed on the paths through each predecessor. The
        # order is topological, so a set is complete when its node's turn comes.
        passed_to: dict[str, set[str]] = {self.nodes[0].name: set()}
        for node in self.nodes:
            passed = passed_to.get(node.name, set()) | {node.name}
            for other in node.successors:
                if other in passed_to:
                    passed_to[other] = passed_to[other] & passed
                else:
                    passed_to[other] = passed
        return passed_to

    @cached_property
    def is_chain(self) -> bool:
        """Whether there are exits along one line and nothing else, as in `cut` and `ladder`."""
        if self.defaults:
            return False
        for number, node in enumerate(self.nodes):
            if len(node.after) > 1 or node.reads:
                return False
            # each node has an exit, and is followed by the next node
            successors = (LEAVE, *self.names[number + 1 : number + 2])
            if node.successors != successors:
                return False
        return True

    @cached_property
    def exits(self) -> tuple[str, ...]:
        """Names of all exits, shallow to deep."""
        return tuple(node.name for node in self.nodes if node.has_exit)

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """Names of all gates, shallow to deep: the nodes with several successors."""
        return tuple(node.name for node in self.nodes if len(node.successors) > 1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all nodes, in topological order."""
        return tuple(node.name for node in self.nodes)

    def node(self, name: str) -> Node:
        """The node of a name. Raises UnknownName, which names the nearest."""
        if name not in self._index:
            raise unknown(name, self.names, "node of this network")
        return self.nodes[self._index[name]]

    def exit_index(self, name: str) -> int:
        """The position of an exit in `exits`. Raises UnknownName, which names the nearest."""
        if name not in self.exits:
            raise unknown(name, self.exits, "exit of this network")
        return self.exits.index(name)

    def written_by(self, name: str) -> tuple[str, ...]:
        """The names of a segment's output: its own, and those that it shares with other arms.

        Args:
            name: of a node.

        Returns:
            Names of tensors, the node's own first.
        """
        sources = {name: None}  # a set in order
        for node in self.nodes:
            if len(node.after) > 1 and name in node.after and node.source is not None:
                sources[node.source] = None
        return tuple(sources)

    # The answer for a row depends on its path, so traces have columns for each path to a node.

    @cached_property
    def paths(self) -> Mapping[str, tuple[Path, ...]]:
        """All paths to each node, the node itself at their end.

        Raises:
            BadNetwork: more than sixteen paths lead to a node.
        """
        paths_to: dict[str, list[Path]] = {name: [] for name in self.names}
        first = self.names[0]
        paths_to[first].append((first,))
        for node in self.nodes:
            paths = paths_to[node.name]
            if len(paths) > MOST_PATHS:
                raise BadNetwork(
                    f"{len(paths)} paths lead to {node.name!r}, expected at most {MOST_PATHS}, "
                    f"because each of them is recorded"
                )
            for other in node.successors:
                if other == LEAVE:
                    continue
                for path in paths:
                    paths_to[other].append((*path, other))
        return {name: tuple(paths) for name, paths in paths_to.items()}

    @cached_property
    def has_many_paths(self) -> bool:
        """Whether there are too many paths to record. Then a trace is recorded at settings of a
        dial.
        """
        # Count the paths without making them: their number may double at every fork.
        count = dict.fromkeys(self.names, 0)
        count[self.names[0]] = 1
        for node in self.nodes:
            for other in node.successors:
                if other != LEAVE:
                    count[other] += count[node.name]
        return max(count.values()) > MOST_PATHS

    @cached_property
    def recorded_paths(self) -> Mapping[str, tuple[Path, ...]]:
        """The recorded paths to each node: all of them, or the most expensive one if there are too
        many.
        """
        if not self.has_many_paths:
            return self.paths
        path = self.reference_path(self.exits[-1])
        return {name: (path[: number + 1],) for number, name in enumerate(path)}

    def label(self, path: Path) -> str:
        """The name of a path's last node among the columns of a trace.

        Args:
            path: one of `recorded_paths`.

        Returns:
            The name of the node; if several paths lead to it, with the number of the path:
            "head#1".
        """
        name = path[-1]
        paths = self.recorded_paths[name]
        if len(paths) == 1:
            return name
        return f"{name}#{paths.index(path)}"

    @cached_property
    def exit_labels(self) -> tuple[str, ...]:
        """The labels of all exits, one for each path that leads there. In a chain these are
        `exits`.
        """
        if self.is_chain:
            return self.exits
        return self._labels_of(self.exits)

    @cached_property
    def gate_labels(self) -> tuple[str, ...]:
        """The labels of all gates, one for each path that leads there. In a chain these are
        `gates`.
        """
        if self.is_chain:
            return self.gates
        return self._labels_of(self.gates)

    def _labels_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The labels of some nodes, one for each recorded path to them."""
        labels = list[str]()
        for name in names:
            for path in self.recorded_paths.get(name, ()):
                labels.append(self.label(path))
        return tuple(labels)

    def reference_path(self, name: str) -> Path:
        """The most expensive path to a node: every gate on the way takes its last successor.

        Args:
            name: of a node.

        Returns:
            The names of the nodes on the path, this one last.

        Raises:
            BadNetwork: the network has many paths, and the most expensive one does not pass the
                node.
        """
        if self.has_many_paths:  # too many to compare: follow the last successors
            path = [self.names[0]]
            while path[-1] != name:
                later = self.node(path[-1]).successors[-1]
                if later == LEAVE:
                    raise BadNetwork(f"the most expensive path ends before it comes to {name!r}")
                path.append(later)
            return tuple(path)

        def choices(path: Path) -> list[int]:
            numbers = []
            for node, following in pairwise(path):
                numbers.append(self.node(node).successors.index(following))
            return numbers

        # successors are ordered from the shallow choice to the deep one, so the largest numbers win
        return max(self.paths[name], key=choices)

    def score_columns(self, label: str) -> tuple[str, ...]:
        """The columns of a trace that hold a gate's scores: one, or one for each route.

        Args:
            label: of a gate, as in `gate_labels`.
        """
        # "head#1" is the gate "head" on path 1
        gate = label if label in self._index else label.rpartition("#")[0]
        if self.routes(gate) == 1:
            return (f"score/{label}",)
        return tuple(f"score/{label}@{route}" for route in range(self.routes(gate)))

    def routes(self, gate: str) -> int:
        """The number of scores of a gate: one fewer than it has successors."""
        return len(self.node(gate).successors) - 1

    def require_chain(self, what: str) -> None:
        """Raise BadNetwork if there are forks.

        Args:
            what: the subject of the sentence, such as "a table of all scores".
        """
        if not self.is_chain:
            raise BadNetwork(f"{what} works along a chain of exits, and this network has forks")

    def to_json(self) -> list[dict[str, Any]]:
        """The nodes as plain data.

        A chain is written as the first edition wrote it, because fingerprints depend on it.
        """
        if self.is_chain:
            return self._chain_to_json()
        bodies = []
        for node in self.nodes:
            body = asdict(node)
            if not body["reads"]:
                del body["reads"]
            bodies.append(body)
        if self.defaults:
            bodies[0]["defaults"] = [asdict(default) for default in self.defaults]
        return bodies

    def _chain_to_json(self) -> list[dict[str, Any]]:
        """The nodes of a chain, each with one successor and at most one node before it."""
        bodies = []
        for node, following in zip(self.nodes, [*self.names[1:], None], strict=True):
            bodies.append(
                {
                    "name": node.name,
                    "successor": following,
                    "after": node.after[0] if node.after else None,
                    "exit_reads": node.exit_reads,
                    "gate_reads": node.gate_reads,
                }
            )
        return bodies

    @staticmethod
    def from_json(nodes: list[Mapping[str, Any]]) -> Topology:
        """Read the topology that `to_json` gave, in the form of either edition.

        Args:
            nodes: plain data.

        Returns:
            The topology.

        Raises:
            InvalidArgument: a field is missing or has another type.
            BadNetwork: the nodes do not make a network.
        """
        try:
            defaults = list[Default]()
            for body in nodes[0].get("defaults", ()) if nodes else ():
                is_output = bool(body.get("output", False))
                shape = tuple(body["shape"])
                defaults.append(Default(body["exit"], float(body["value"]), shape, is_output))
            return Topology(tuple(map(_node_from, nodes)), tuple(defaults))
        except (AttributeError, TypeError, KeyError, ValueError) as problem:
            if isinstance(problem, BadNetwork):
                raise
            raise InvalidArgument(
                f"nodes must have name, successors, after and reads, got {nodes!r}"
            ) from problem


def _node_from(body: Mapping[str, Any]) -> Node:
    """One node, in the form of either edition."""
    reads = {key: tuple(body[key]) for key in ("exit_reads", "gate_reads")}
    if "successor" not in body:
        reads["reads"] = tuple(body.get("reads", ()))
        return Node(body["name"], tuple(body["successors"]), tuple(body["after"]), **reads)
    # the first edition wrote chains only: one successor besides leaving, one node before
    if set(body) != {"name", "successor", "after", *reads}:
        raise KeyError("fields")
    following = () if body["successor"] is None else (body["successor"],)
    after = () if body["after"] is None else (body["after"],)
    return Node(body["name"], (LEAVE, *following), after, **reads)
