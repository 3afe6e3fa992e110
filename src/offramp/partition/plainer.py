"""A graph in which constants that were made like a tensor no longer need that tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

ATEN = torch.ops.aten
LIKE: dict[object, Callable[..., Any]] = {
    ATEN.new_ones.default: ATEN.ones.default,
    ATEN.new_zeros.default: ATEN.zeros.default,
    ATEN.new_full.default: ATEN.full.default,
}


def plainer(graph: fx.Graph) -> None:
    """`x.new_ones(size)` takes nothing of x but its type: written as `ones(size)`, it is made where
    it is needed.

    Masks over positions are made so, and would else be carried across every cut, which they cannot:
    they have no rows.
    """
    for node in list(graph.nodes):
        if (make := LIKE.get(node.target)) is None:
            continue
        value = node.meta["val"]
        with graph.inserting_before(node):
            kinds = {"dtype": value.dtype, "device": value.device}
            made = graph.call_function(make, tuple(node.args[1:]), {**node.kwargs, **kinds})
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
