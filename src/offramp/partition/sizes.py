"""Sizes made of B and T, made again in a piece from the tensors that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from offramp.errors import BadNetwork
from offramp.partition.graph import WAY_OUT, ExportedGraph


class SymbolicSizes:
    """The nodes of sizes in a piece's graph, each made once; `given`: the tensors that it reads ->
    its own nodes.
    """

    def __init__(
        self, source: ExportedGraph, graph: fx.Graph, given: Mapping[fx.Node, fx.Node]
    ) -> None:
        self.source = source
        self.graph = graph
        self.given = given
        self.found: dict[Any, fx.Node] = {}

    def made(self, size: Any) -> fx.Node | int:
        """The node of a size, from its sympy expression."""
        if size.is_Integer:
            return int(size)
        if size not in self.found:
            self.found[size] = self._symbol(size) if size.is_Symbol else self._computed(size)
        return self.found[size]

    def _symbol(self, symbol: Any) -> fx.Node:
        anchor = self.source.anchor(self.given, symbol)
        if anchor is None:
            said = self.source.written(symbol)
            raise BadNetwork(
                f"a piece needs {said}, and nothing that it is given has it; cut elsewhere, "
                f"{WAY_OUT}"
            )
        return self.graph.call_function(
            torch.ops.aten.sym_size.int, (self.given[anchor[0]], anchor[1])
        )

    def _computed(self, size: Any) -> fx.Node:
        # Imported here, because sympy takes longer to import than a plan takes to open.
        from torch.utils._sympy.interp import sympy_interp
        from torch.utils._sympy.reference import OptimizedPythonReferenceAnalysis

        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        env = {symbol: fx.Proxy(self.made(symbol), tracer) for symbol in size.free_symbols}  # type: ignore[arg-type]
        node: fx.Node = sympy_interp(OptimizedPythonReferenceAnalysis, env, size).node
        return node
