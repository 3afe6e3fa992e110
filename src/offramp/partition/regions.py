"""Context managers in a model's forward: the export keeps what runs inside as a graph of its own.

`with torch.no_grad():` and a switched-off autocast change nothing while a network runs, so their
operations are put where the region stood and can be cut like all others. An active autocast changes
the precision of what is inside and stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(graph: fx.GraphModule) -> None:
    """Put the operations of every region that changes no value where the region stands, innermost
    regions included.
    """
    todo = list(graph.graph.nodes)
    while todo:
        node = todo.pop()
        inner, operands = _region(node)
        if inner is None or _casts(node):
            continue
        todo += _inline(graph, node, getattr(graph, str(inner.target)), operands)
        if not inner.users:
            graph.graph.erase_node(inner)


def region_named(node: fx.Node) -> str | None:
    """The context manager whose region a node is, as the user wrote it; None for any other node."""
    if not _casts(node):
        return None
    device = node.args[0]
    dtype = node.args[1]
    return f"`with torch.autocast({str(device)!r}, {dtype})`"


def _casts(node: fx.Node) -> bool:
    return node.target is AUTOCAST and bool(node.args[2])


def _region(node: fx.Node) -> tuple[fx.Node | None, tuple[Any, ...]]:
    """The node that holds a region's graph, and what the region is given."""
    if node.target is GRAD:
        before = 1
    elif node.target is AUTOCAST:
        before = 4
    else:
        return None, ()
    inner = node.args[before]
    assert isinstance(inner, fx.Node)
    return inner, tuple(node.args[before + 1 :])


def _inline(
    graph: fx.GraphModule, region: fx.Node, inner: fx.GraphModule, operands: tuple[Any, ...]
) -> list[fx.Node]:
    """Copy a region's operations before it and let them take its place; the copies, among them
    regions inside it.
    """
    copied: dict[fx.Node, Any] = {}
    given = iter(operands)
    results: Any = ()
    with graph.graph.inserting_before(region):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copied[node] = next(given)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], copied.__getitem__)
            elif node.op == "get_attr":
                copied[node] = graph.graph.get_attr(_moved(graph, inner, str(node.target)))
                copied[node].meta.update(node.meta)
            else:
                copied[node] = graph.graph.node_copy(node, copied.__getitem__)
    for user in list(region.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(region)
    return [
        node
        for node in copied.values()
        if isinstance(node, fx.Node) and _region(node)[0] is not None
    ]


def _moved(graph: fx.GraphModule, inner: fx.GraphModule, name: str) -> str:
    """A region's own attribute under a free name in the graph around it."""
    free = next(f"{name}_{n}" for n in range(10_000) if not hasattr(graph, f"{name}_{n}"))
    setattr(graph, free, getattr(inner, name))
    return free
