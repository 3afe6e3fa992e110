"""Topologies for tests: chains, a fork that re-joins, and a skip."""

from __future__ import annotations

from offramp.plans.topology import LEAVE, Default, Node, Topology


def chain(*names, **nodes) -> Topology:
    """A chain; keyword arguments give a node's other fields."""
    return Topology.chain([Node(name, **nodes.get(name, {})) for name in names])


PLAIN = chain("a", "b", "c")
TRUNK = chain("a", "b", "c", b={"after": ("a",)}, c={"after": ("b",)})
READING = chain("a", "b", "c", b={"gate_reads": ("a",)}, c={"exit_reads": ("b", "x/mask")})
FORK = Topology(
    (
        Node("size", ("small", LEAVE, "large")),
        Node("small", ("head",), ("size",)),
        Node("large", (LEAVE, "head"), ("size",)),
        Node("head", (LEAVE,), ("small", "large"), ("size", "large")),
    ),
    (Default("large", 0.0, (3,)),),
)
SKIP = Topology(
    (Node("a", (LEAVE, "b", "c")), Node("b", ("c",), ("a",)), Node("c", (LEAVE,), ("a", "b")))
)
