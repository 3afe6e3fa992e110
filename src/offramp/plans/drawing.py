"""A topology as a tree of text. No torch.

stem
size: controller
├─ small
└─ large
head: answers
"""

from __future__ import annotations

from collections.abc import Callable

from offramp.plans.topology import LEAVE, Node, Topology

Told = Callable[[Node], str]


def tree(topology: Topology, told: Told | None = None) -> str:
    """The nodes as a tree: the ways of a fork below it, and what stands behind it again at the
    edge.

    Args:
        topology: any, also a topology.
        told: what is written behind the name of a node; by default where its rows may go.

    >>> print(tree(Topology((
    ...     Node("stem", ("size",)),
    ...     Node("size", ("small", "large"), ("stem",)),
    ...     Node("small", ("head",), ("size",)),
    ...     Node("large", ("head",), ("size",)),
    ...     Node("head", ("leave",), ("small", "large")),
    ... ))))
    stem
    size: one of 2 ways
    ├─ small
    └─ large
    head: answers
    """
    drawing = _Drawing(topology, told or _told)
    return "\n".join(drawing.lines(topology.names[0], None))


def _told(node: Node) -> str:
    if node.successors == (LEAVE,):
        return "answers"
    others = [name for name in node.successors if name != LEAVE]
    parts = list[str]()
    if node.has_exit:
        parts.append("rows may leave")
    if len(others) > 1:
        parts.append(f"one of {len(node.successors)} ways")
    return ", ".join(parts)


class _Drawing:
    """The lines of a tree."""

    def __init__(self, topology: Topology, told: Told) -> None:
        self.topology = topology
        self.told = told
        # by node those that every path from it passes which ends with it
        self.always: dict[str, set[str]] = {}
        for node in reversed(topology.nodes):
            behind = [self.always[name] for name in node.successors if name != LEAVE]
            shared = set.intersection(*behind) if behind else set[str]()
            self.always[node.name] = {node.name} | shared

    def lines(self, name: str, end: str | None) -> list[str]:
        """The nodes from one on, up to the node `end`, where these paths meet others."""
        lines = list[str]()
        while name != end:
            node = self.topology.node(name)
            said = self.told(node)
            reads = f" (reads {', '.join(node.reads)} too)" if node.reads else ""
            lines.append(f"{name}{reads}: {said}" if said else f"{name}{reads}")
            ways = [other for other in node.successors if other != LEAVE]
            if not ways:
                return lines
            if len(ways) == 1:
                name = ways[0]
                continue
            meet = self._meeting(ways)
            for number, way in enumerate(ways):
                last = number == len(ways) - 1
                own = ["(skips)"] if way == meet else self.lines(way, meet or end)
                lines += [("└─ " if last else "├─ ") + own[0]]
                lines += [("   " if last else "│  ") + line for line in own[1:]]
            if meet is None:
                return lines
            name = meet
        return lines

    def _meeting(self, ways: list[str]) -> str | None:
        """The first node at which all ways meet again that do not end before; None where none
        do.
        """
        sets = [self.always[way] for way in ways]
        going = [one for one in sets if any(one & other for other in sets if other is not one)]
        if len(going) < 2:
            return None
        shared = set.intersection(*going)
        return next((name for name in self.topology.names if name in shared), None)
