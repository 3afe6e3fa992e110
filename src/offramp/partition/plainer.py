"""Rewrites constants that were made like a tensor so that they no longer need that tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

ATEN = torch.ops.aten
# `x.new_ones(size)` and its kin, and the operation that does the same without x.
LIKE: dict[object, Callable[..., Any]] = {
    ATEN.new_ones.default: ATEN.ones.default,
    ATEN.new_zeros.default: ATEN.zeros.default,
    ATEN.new_full.default: ATEN.full.default,
}


def plainer(graph: fx.Graph) -> None:
    """Replace `x.new_ones(size)` by `ones(size)`, which a piece can make where it needs it.

    Models make masks over positions this way. Without the change a mask would depend on x and have
    to be carried across every cut. That is impossible, because it has no dimension of rows.

    Args:
        graph: of an exported model; it is changed in place.
    """
    for node in list(graph.nodes):
        operation = LIKE.get(node.target)
        if operation is None:
            continue
        # Only type and device of x matter, and the export knows both.
        value = node.meta["val"]
        with graph.inserting_before(node):
            keywords = {**node.kwargs, "dtype": value.dtype, "device": value.device}
            constant = graph.call_function(operation, tuple(node.args[1:]), keywords)
        constant.meta.update(node.meta)
        node.replace_all_uses_with(constant)
        graph.erase_node(node)
