"""Computes sizes that depend on B and T inside a piece, from the tensors that the piece reads.

Sizes are integers without rows, so they are never carried across a cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from offramp.errors import BadNetwork
from offramp.partition.graph import WAY_OUT, ExportedGraph


class SymbolicSizes:
    """Adds nodes for sizes to the graph of a piece, one node for each size.

    Args:
        source: the graph of the model.
        graph: the graph of the piece, which gets the nodes.
        given: the tensors that the piece reads, as nodes of the model -> as nodes of the piece.
    """

    def __init__(
        self, source: ExportedGraph, graph: fx.Graph, given: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.source = source
        self.graph = graph
        self.given = given
        self.nodes: dict[Any, fx.Node] = {}  # by sympy expression

    def made(self, size: Any) -> fx.Node | int:
        """The node of a size.

        Args:
            size: a sympy expression of B and T.

        Returns:
            The node, or the number itself for a size that is fixed.

        Raises:
            BadNetwork: none of the tensors that the piece reads has a dimension B (or T).
        """
        if size.is_Integer:
            return int(size)
        if size not in self.nodes:
            if size.is_Symbol:
                self.nodes[size] = self._symbol(size)
            else:
                self.nodes[size] = self._computed(size)
        return self.nodes[size]

    def _symbol(self, symbol: Any) -> fx.Node:
        """B or T itself: the size of a dimension of a tensor that the piece reads."""
        anchor = self.source.anchor(self.given, symbol)
        if anchor is None:
            raise BadNetwork(
                f"a piece needs the size {self.source.written(symbol)}, but reads no tensor that "
                f"has it; cut elsewhere, {WAY_OUT}"
            )
        tensor, dim = anchor
        return self.graph.call_function(torch.ops.aten.sym_size.int, (self.given[tensor], dim))

    def _computed(self, size: Any) -> fx.Node:
        """An expression such as 2*B: sympy evaluates it with proxies, which records the nodes."""
        # Imported here, because sympy takes longer to import than a plan takes to open.
        from torch.utils._sympy.interp import sympy_interp
        from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        env = dict[Any, fx.Proxy]()
        for symbol in size.free_symbols:
            symbol_node: Any = self.made(symbol)
            env[symbol] = fx.Proxy(symbol_node, tracer)
        node: fx.Node = sympy_interp(OptimizedPythonReferenceAnalysis, env, size).node
        return node
