"""Handles context managers in a model's forward, whose content the export puts in its own graph.

`with torch.no_grad():` and a disabled autocast change nothing while a network runs. Their
operations are moved into the surrounding graph and can be cut like all others. An active autocast
changes the precision of the operations inside, so it stays a single operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(graph: fx.GraphModule) -> None:
    """Move the operations of every region that changes no value into the surrounding graph.

    Args:
        graph: of an exported model; it is changed in place. Regions inside regions are moved too.
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
    """The active autocast that a node stands for, as the user wrote it; None for other nodes."""
    if not _casts(node):
        return None
    device = node.args[0]
    dtype = node.args[1]
    return f"`with torch.autocast({str(device)!r}, {dtype})`"


def _casts(node: fx.Node) -> bool:
    """Whether a node is an active autocast, whose operations must stay together."""
    return node.target is AUTOCAST and bool(node.args[2])


def _region(node: fx.Node) -> tuple[fx.Node | None, tuple[Any, ...]]:
    """The node that refers to a region's graph, and the inputs of the region; None for others."""
    # Before the graph torch passes the arguments of the context manager: one for the gradient mode,
    # four for autocast.
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
    """Replace a region by copies of its operations; those copies that are regions themselves."""
    copied: dict[fx.Node, Any] = {}
    remaining = iter(operands)
    results: Any = ()
    with graph.graph.inserting_before(region):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copied[node] = next(remaining)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], copied.__getitem__)
            elif node.op == "get_attr":
                copied[node] = graph.graph.get_attr(_moved(graph, inner, str(node.target)))
                copied[node].meta.update(node.meta)
            else:
                copied[node] = graph.graph.node_copy(node, copied.__getitem__)
    # A region gives a tuple, so every user of it picks one item, `region[index]`.
    for user in list(region.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(region)
    inner_regions = list[fx.Node]()
    for node in copied.values():
        if isinstance(node, fx.Node) and _region(node)[0] is not None:
            inner_regions.append(node)
    return inner_regions


def _moved(graph: fx.GraphModule, inner: fx.GraphModule, name: str) -> str:
    """Copy an attribute of a region to the surrounding graph; its new name there."""
    number = 0
    while hasattr(graph, f"{name}_{number}"):
        number += 1
    free = f"{name}_{number}"
    setattr(graph, free, getattr(inner, name))
    return free
