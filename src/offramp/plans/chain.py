"""The nodes of a network in order, and what a plan makes of them run.

One chain stands in the network, in the trace and in every plan, so that all three agree about which parts are
run and charged: an exit closed by +inf is neither, unless a later one reads it; nor is a segment (in a ladder: a
whole rung) whose exits are all closed, unless a later segment continues from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offramp._support.find import unknown
from offramp.errors import BadInput, BadNetwork
from offramp.plans.signature import is_input

MOST_NODES = 2000


@dataclass(frozen=True)
class Node:
    """A decision point: a segment, its exit, and (but for the last) a gate, all under one name.

    `after` names the node whose segment this one continues from; None reads the raw input, as a rung does.
    `exit_reads` and `gate_reads` name earlier exits whose logits the exit or the gate needs, and inputs (`x/mask`).
    """

    name: str
    successor: str | None
    after: str | None = None
    exit_reads: tuple[str, ...] = ()
    gate_reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """What runs at a node under one plan, besides its segment. `last`: everything that arrives answers here."""

    name: str
    exit: bool
    gate: bool
    last: bool


def passages(steps: Sequence[Step]) -> tuple[tuple[Step, ...], ...]:
    """Steps in groups, each up to the next one that has an exit or a gate: inside of a group nothing is decided."""
    groups, group = list[tuple[Step, ...]](), list[Step]()
    for step in steps:
        group.append(step)
        if step.exit or step.gate or step.last:
            groups.append(tuple(group))
            group = []
    return tuple(groups)


@dataclass(frozen=True)
class Chain:
    """Nodes in the order in which a sample meets them; today each has one successor, the next."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if not names or len(set(names)) != len(names):
            raise BadNetwork(f"nodes are {names}; a network needs at least one, and names of their own")
        if len(names) > MOST_NODES:
            raise BadNetwork(f"there are {len(names):,} nodes, expected at most {MOST_NODES:,}; cut fewer places")
        if odd := [name for name in names if not isinstance(name, str) or not name or not name.isprintable()]:
            raise BadNetwork(f"a node is called {odd[0]!r}, expected printable characters; name it otherwise")
        if [node.successor for node in self.nodes] != [*names[1:], None]:
            raise BadNetwork(f"nodes {names} are no chain; today each node's successor is the next one")
        for place, node in enumerate(self.nodes):
            for other in (node.after, *node.exit_reads, *node.gate_reads):
                if other is not None and other not in names[:place] and not is_input(other):
                    raise BadNetwork(f"node {node.name!r} reads {other!r}, which is no earlier node of {names}")

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of all exits, shallow to deep."""
        return tuple(node.name for node in self.nodes)

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of all gates: every node's but the last."""
        return self.exits[:-1]

    def place(self, name: str) -> int:
        """The index of an exit. Raises UnknownName with the nearest."""
        if name not in self.exits:
            raise unknown(name, self.exits, "exit of this network")
        return self.exits.index(name)

    def walk(self, open_gates: Collection[str], deepest: str | None = None) -> tuple[Step, ...]:
        """The steps of a plan whose gates in `open_gates` may let samples leave, and that ends at `deepest`."""
        last = self.nodes[-1].name if deepest is None else self.exits[self.place(deepest)]
        reach = self.nodes[: self.place(last) + 1]
        gates = {node.name for node in reach if node.name in open_gates and node.name != last}
        exits, segments = gates | {last}, set[str]()
        for node in reversed(reach):
            if node.name in gates:
                exits.update(node.gate_reads)
            if node.name in exits:
                exits.update(node.exit_reads)
                segments.add(node.name)
            if node.name in segments and node.after is not None:
                segments.add(node.after)
        return tuple(
            Step(node.name, node.name in exits, node.name in gates, node.name == last)
            for node in reach
            if node.name in segments
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The nodes as plain data."""
        return [asdict(node) for node in self.nodes]

    @staticmethod
    def from_json(nodes: list[Mapping[str, Any]]) -> Chain:
        """The chain written by `to_json`."""
        try:
            reads = ("exit_reads", "gate_reads")
            return Chain(tuple(Node(**{**node, **{key: tuple(node[key]) for key in reads}}) for node in nodes))
        except (TypeError, KeyError) as problem:
            raise BadInput(f"nodes are written as {nodes!r}, expected name, successor, after and reads") from problem
