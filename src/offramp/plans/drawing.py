"""A topology as a tree of text. Does not import torch.

stem
size: controller
├─ small
└─ large
head: answers
"""

from __future__ import annotations

from collections.abc import Callable

from offramp.plans.topology import LEAVE, Node, Topology

Describe = Callable[[Node], str]


def tree(topology: Topology, describe: Describe | None = None) -> str:
    """Draw the nodes as a tree.

    The ways of a fork stand below it, one level deeper. The nodes after the point where they meet
    again stand at the left edge again.

    Args:
        topology: of any network.
        describe: the text behind the name of a node; by default where its rows may go.

    Returns:
        The lines of the tree.

    Example:
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
    drawing = _Drawing(topology, describe or _where_rows_go)
    return "\n".join(drawing.lines(topology.names[0], None))


def _where_rows_go(node: Node) -> str:
    """The default text behind a node."""
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

    def __init__(self, topology: Topology, describe: Describe) -> None:
        self.topology = topology
        self.describe = describe
        # For each node: itself and the nodes that every path from it passes. The successors of a
        # node come later in the topology, so the sets are known when it is their turn.
        self.always: dict[str, set[str]] = {}
        for node in reversed(topology.nodes):
            behind = [self.always[name] for name in _onward(node)]
            shared = set.intersection(*behind) if behind else set[str]()
            self.always[node.name] = {node.name} | shared

    def lines(self, name: str, end: str | None) -> list[str]:
        """The lines of the nodes from `name` on, up to the node `end`, where paths meet again."""
        lines = list[str]()
        while name != end:
            node = self.topology.node(name)
            lines.append(self._line(node))
            ways = _onward(node)
            if not ways:
                return lines
            if len(ways) == 1:
                name = ways[0]
                continue
            # A fork: draw each way up to the node where they meet, then go on from that node.
            meet = self._meeting(ways)
            for way in ways:
                if way == meet:
                    branch = ["(skips)"]
                else:
                    branch = self.lines(way, meet or end)
                lines += _indented(branch, is_last=way == ways[-1])
            if meet is None:  # every way ends on its own
                return lines
            name = meet
        return lines

    def _line(self, node: Node) -> str:
        """One node: its name, the other nodes that it reads, and its description."""
        line = node.name
        if node.reads:
            line += f" (reads {', '.join(node.reads)} too)"
        description = self.describe(node)
        if description:
            line += f": {description}"
        return line

    def _meeting(self, ways: list[str]) -> str | None:
        """The first node at which the ways of a fork meet again; None where they do not.

        A way that shares no node with any other ends on its own and does not count.
        """
        going_on = []
        for way in ways:
            others = [self.always[other] for other in ways if other != way]
            if self.always[way] & set[str]().union(*others):
                going_on.append(self.always[way])
        if len(going_on) < 2:
            return None
        # the names are in topological order: the first shared one is where the ways meet
        shared = set.intersection(*going_on)
        for name in self.topology.names:
            if name in shared:
                return name
        return None


def _onward(node: Node) -> list[str]:
    """The successors of a node that are nodes."""
    return [name for name in node.successors if name != LEAVE]


def _indented(branch: list[str], *, is_last: bool) -> list[str]:
    """The lines of one way, with the marks of a tree before them."""
    head = "└─ " if is_last else "├─ "
    rest = "   " if is_last else "│  "
    lines = [head + branch[0]]
    for line in branch[1:]:
        lines.append(rest + line)
    return lines
