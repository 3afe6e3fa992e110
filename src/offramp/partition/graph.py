"""An exported graph with the places where chosen modules end, and what a cut at such a place must
carry.

B is the batch symbol of the graph, T the symbol of the length of text where that is free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.errors import BadNetwork
from offramp.partition.regions import region_named

WAY_OUT = "or give the model as explicit stages, one module after the other"
ALIAS = torch.ops.aten.alias.default
_SIZE = torch.ops.aten.sym_size.int
_PREFIX = "model."


@dataclass(frozen=True)
class Tap:
    """Where a module ended: its tensors by name, the place of the last of them in the graph, how
    often it ran.
    """

    leaves: tuple[tuple[str, fx.Node], ...]
    end: int
    calls: int


@dataclass(frozen=True)
class ExportedGraph:
    """A model's graph, its inputs and outputs by name, and the taps, in order of execution.

    A value is *constant* when no input reaches it but by T, and a *size* when it is an integer made
    of B and T: both are made again wherever they are needed, so that neither is ever carried across
    a cut.
    """

    graph: fx.GraphModule
    inputs: Mapping[str, fx.Node]
    outputs: Mapping[str, fx.Node]
    taps: Mapping[str, Tap]
    batch: Any  # a sympy.Symbol
    length: Any = None
    # what the export found out about T: functions of the inputs that raise
    guards: tuple[nn.Module, ...] = ()

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The place of every node in the order of execution."""
        return {node: order for order, node in enumerate(self.graph.graph.nodes)}

    @cached_property
    def writers(self) -> tuple[fx.Node, ...]:
        """In-place operations on what comes from the inputs. Raises BadNetwork for one that writes
        to a buffer.
        """
        moving = _reached(self.order, lambda node: node.op == "placeholder")
        writers = tuple(node for node in self.order if _in_place(node) and node in moving)
        for node in filter(_in_place, self.order):
            if (base := _written(node)[-1]).op == "get_attr" and (
                node in moving or _is_buffer(base)
            ):
                raise BadNetwork(
                    f"{described(node)} writes to the buffer "
                    f"{str(base.target).removeprefix(_PREFIX)!r} in every call, "
                    f"expected a model without memory; change it, {WAY_OUT}"
                )
        return writers

    @cached_property
    def constant(self) -> set[fx.Node]:
        """Values that no input reaches but by T, in their making or by being written to."""
        written = {node for writer in self.writers for node in _written(writer)}
        moving = _reached(
            self.order,
            lambda node: node.op in ("placeholder", "output") or node in written,
            self._by_length,
        )
        return self.order.keys() - moving

    @cached_property
    def path(self) -> set[fx.Node]:
        """Everything that the outputs are made of."""
        return self.behind([*self.outputs.values(), *self.writers])[0]

    @cached_property
    def fillers(self) -> dict[fx.Node, list[fx.Node]]:
        """For every constant the in-place operations that fill it."""
        fillers: dict[fx.Node, list[fx.Node]] = {}
        for writer in filter(_in_place, self.constant):
            for node in self.behind([writer], fill=False)[0]:
                if node.op == "call_function":
                    fillers.setdefault(node, []).append(writer)
        return fillers

    def behind(
        self,
        ends: Iterable[fx.Node],
        *,
        after: int = -1,
        until: int | None = None,
        fill: bool = True,
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """What must run for `ends`, and what must be given to that: inputs, and values from up to
        place `after`.
        """
        inside = set[fx.Node]()
        given = set[fx.Node]()
        todo = list(ends)
        while todo:
            node = todo.pop()
            if node.op == "placeholder" or (self.order[node] <= after and not self.again(node)):
                given.add(node)
            elif node not in inside:
                inside.add(node)
                todo += [] if self.size(node) is not None else node.all_input_nodes
                fillers = self.fillers.get(node, ()) if fill else ()
                todo += [
                    filler for filler in fillers if until is None or self.order[filler] <= until
                ]
        return inside, given

    def again(self, node: fx.Node) -> bool:
        """Whether a value is made again where it is needed: a constant or a size."""
        if node in self.constant or self.size(node) is not None:
            return True
        sources = node.all_input_nodes
        return (
            _is_size(node)
            and node.target is not _SIZE
            and bool(sources)
            and all(map(self.again, sources))
        )

    def size(self, node: fx.Node) -> Any:
        """The sympy expression of an integer made of B and T; None for everything else."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        if value.node.expr.free_symbols <= {self.batch, self.length}:
            return value.node.expr
        return None

    def _by_length(self, node: fx.Node) -> bool:
        size = self.size(node) if self.length is not None else None
        return size is not None and self.batch not in size.free_symbols

    def anchor(self, nodes: Iterable[fx.Node], symbol: Any) -> tuple[fx.Node, int] | None:
        """A tensor among these of which one dimension is B, or T, and which dimension it is."""
        for node in nodes:
            value = node.meta.get("val")
            for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    return node, dim
        return None

    @cached_property
    def texts(self) -> dict[str, fx.Node]:
        """The inputs [B, T, ...] by name."""
        return {
            name: node
            for name, node in self.inputs.items()
            if self.anchor([node], self.length) is not None
        }

    def needs_length(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether a size among these is made of T."""
        return self.length is not None and any(
            (size := self.size(node)) is not None and self.length in size.free_symbols
            for node in nodes
        )

    def seeds(self, after: int, until: int | None = None) -> list[fx.Node]:
        """What runs after a place whether or not its value is asked for."""
        return [
            node
            for node in self.writers
            if after < self.order[node] and (until is None or self.order[node] <= until)
        ]

    def carried(self, end: int) -> list[fx.Node]:
        """What a cut at this place carries on, inputs included, in the order of execution."""
        given = self.behind([*self.outputs.values(), *self.seeds(end)], after=end)[1]
        return sorted(given, key=self.order.__getitem__)

    def refused_length(self, length: int) -> str | None:
        """What the model asks of T and this length breaks, such as `T <= 512`; None where it
        fits.
        """
        try:
            for guard in self.guards:
                guard(*(self._blank(node.meta["val"], length) for node in self.inputs.values()))
        except AssertionError as problem:
            said = str(problem).removeprefix("Guard failed: ")
            if "size()[1]" in said:
                return re.sub(r"\S+\.size\(\)\[1\]", "T", said)
            return None
        return None

    def _blank(self, value: Tensor, length: int) -> Tensor:
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape]
        numbers = [
            length if one == self.length else getattr(size, "node", size)
            for one, size in zip(sizes, value.shape, strict=True)
        ]
        return torch.empty(
            [one if isinstance(one, int) else one.hint for one in numbers],
            dtype=value.dtype,
            device="meta",
        )

    def obstacle(self, node: fx.Node) -> str | None:
        """Why a value cannot be compacted, row by row; None when it can: [B, numbers], or with T
        among them.
        """
        value = node.meta.get("val")
        if (region := region_named(node)) is not None:
            return (
                f"ends inside {region}, which runs as a whole: cut after it, or end the block there"
            )
        if not isinstance(value, Tensor):
            return f"carries {node.name!r}, which is no tensor but {self.written(value)}"
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape]
        if sizes and sizes[0] == self.batch and not any(self._by_batch(size) for size in sizes[1:]):
            return None
        shape = ", ".join(map(self.written, value.shape))
        if not sizes or sizes[0] == self.batch:
            return (
                f"carries {node.name!r} of shape [{shape}], which "
                f"{'depends on B again' if sizes else 'has no rows'}"
            )
        return (
            f"carries {node.name!r} of shape [{shape}], whose first dimension is "
            f"{self.written(value.shape[0])}, not B"
        )

    def _by_batch(self, size: Any) -> bool:
        return not isinstance(size, int) and not size.free_symbols <= {self.length}

    def written(self, size: object) -> str:
        """A size with the batch symbol as B and the length as T."""
        return re.sub(rf"\b{self.length}\b", "T", re.sub(rf"\b{self.batch}\b", "B", str(size)))

    def value(self, node: fx.Node) -> tuple[str, Any]:
        """Name and value of a parameter, buffer or constant; the name is the model's own."""
        target = str(node.target)
        found: Any = self.graph
        for step in target.split("."):
            found = getattr(found, step)
        plain = target.removeprefix(_PREFIX)
        return (target if hasattr(fx.GraphModule, plain.split(".")[0]) else plain), found


def described(node: fx.Node) -> str:
    """An operation as the user can find it: its name, and the module that runs it."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    inside = str(stack[-1]).removeprefix("model").removeprefix(".") if stack else ""
    return f"the operation {node.target}" + (f" in {inside!r}" if inside else "")


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _is_buffer(node: fx.Node) -> bool:
    """Whether a tensor is the model's own, and not one that the export made of a constant."""
    return str(node.target).startswith(_PREFIX)


def _written(writer: fx.Node) -> list[fx.Node]:
    """The tensor that an in-place operation writes to, and those of which it is a view,
    outwards.
    """
    found = list[fx.Node]()
    node = writer
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.arguments:
        source = node.args[0] if node.args else None
        if node.target._schema.arguments[0].alias_info is None or not isinstance(source, fx.Node):
            break
        found.append(node := source)
    return found or [writer]


def _reached(
    nodes: Iterable[fx.Node],
    start: Callable[[fx.Node], bool],
    never: Callable[[fx.Node], bool] = lambda node: False,
) -> set[fx.Node]:
    found = set[fx.Node]()
    for node in nodes:
        if start(node) or (
            any(source in found for source in node.all_input_nodes) and not never(node)
        ):
            found.add(node)
    return found
