"""An exported graph with the ends of chosen modules, and what a cut at one of them must carry.

B is the batch symbol of the graph. T is the symbol of the length of text, where that is free.
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
    """Where a module ended.

    Attributes:
        leaves: its tensors by name, in order.
        end: the position of the last of them in the graph.
        calls: how often the module ran.
    """

    leaves: tuple[tuple[str, fx.Node], ...]
    end: int
    calls: int


@dataclass(frozen=True)
class ExportedGraph:
    """A model's graph with names for its inputs, outputs and taps, in order of execution.

    A value is *constant* if it depends on no input, except on the length T. A value is a *size* if
    it is an integer computed from B and T. Pieces compute both again wherever they need them, so
    neither is ever carried across a cut.

    Attributes:
        graph: the operations.
        inputs: placeholders by name.
        outputs: nodes by name.
        taps: the ends of the marked modules by name.
        batch: the sympy symbol B.
        length: the sympy symbol T; None where no length is free.
        guards: functions of the inputs, which raise for a T that the model does not accept.
    """

    graph: fx.GraphModule
    inputs: Mapping[str, fx.Node]
    outputs: Mapping[str, fx.Node]
    taps: Mapping[str, Tap]
    batch: Any  # a sympy.Symbol
    length: Any = None
    guards: tuple[nn.Module, ...] = ()

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """The position of every node in the order of execution."""
        return {node: index for index, node in enumerate(self.graph.graph.nodes)}

    @cached_property
    def writers(self) -> tuple[fx.Node, ...]:
        """In-place operations on values that depend on the inputs.

        Raises:
            BadNetwork: an operation writes to a buffer, so that calls depend on earlier calls.
        """
        # An operation on a constant only fills it, and gives the same in every call.
        moving = _reached(self.order, lambda node: node.op == "placeholder")
        writers = list[fx.Node]()
        for node in self.order:
            if not _in_place(node):
                continue
            base = _written(node)[-1]  # the tensor whose memory is written to
            if base.op == "get_attr" and (node in moving or _is_buffer(base)):
                name = str(base.target).removeprefix(_PREFIX)
                raise BadNetwork(
                    f"{described(node)} writes to the buffer {name!r} in every call, but a row's "
                    f"result must not depend on earlier calls; change it, {WAY_OUT}"
                )
            if node in moving:
                writers.append(node)
        return tuple(writers)

    @cached_property
    def constant(self) -> set[fx.Node]:
        """Values that depend on no input, except on T.

        A tensor depends on an input also if something that depends on the input is written to it.
        """
        written = set[fx.Node]()  # tensors that something of the inputs is written to
        for writer in self.writers:
            written.update(_written(writer))

        def starts(node: fx.Node) -> bool:
            return node.op in ("placeholder", "output") or node in written

        moving = _reached(self.order, starts, self._by_length)
        return self.order.keys() - moving

    @cached_property
    def path(self) -> set[fx.Node]:
        """Everything that the outputs depend on."""
        inside, _ = self.behind([*self.outputs.values(), *self.writers])
        return inside

    @cached_property
    def fillers(self) -> dict[fx.Node, list[fx.Node]]:
        """For every constant, the in-place operations that fill it."""
        # Such as `mask = zeros(T, T); mask.fill_(1)`: a piece that makes the mask must fill it too.
        fillers: dict[fx.Node, list[fx.Node]] = {}
        for writer in self.constant:
            if not _in_place(writer):
                continue
            inside, _ = self.behind([writer], fill=False)
            for node in inside:
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
        """Walk back from some values to everything that must run for them.

        The walk follows the inputs of each operation. It stops at placeholders and at values from
        before the cut. Constants and sizes have no place before the cut, because a piece computes
        them again.

        Args:
            ends: the values that are wanted.
            after: the position of the cut; -1 where there is none before.
            until: position after which no constant is filled; None for no limit.
            fill: whether to include the in-place operations that fill constants.

        Returns:
            The operations that must run, and the values that must be given to them.
        """
        inside = set[fx.Node]()
        given = set[fx.Node]()
        todo = list(ends)
        while todo:
            node = todo.pop()
            if node.op == "placeholder" or (self.order[node] <= after and not self.again(node)):
                given.add(node)
                continue
            if node in inside:
                continue
            inside.add(node)
            # A size is computed from B and T, and not from the nodes that the export noted for it.
            if self.size(node) is None:
                todo.extend(node.all_input_nodes)
            if fill:
                for filler in self.fillers.get(node, ()):
                    if until is None or self.order[filler] <= until:
                        todo.append(filler)
        return inside, given

    def again(self, node: fx.Node) -> bool:
        """Whether pieces compute a value again where they need it: a constant or a size."""
        if node in self.constant or self.size(node) is not None:
            return True
        # Floats and booleans that are computed from sizes only, such as sqrt(T).
        # (`sym_size` itself reads a size from a tensor, which may be before the cut.)
        sources = node.all_input_nodes
        if not _is_size(node) or node.target is _SIZE or not sources:
            return False
        return all(map(self.again, sources))

    def size(self, node: fx.Node) -> Any:
        """The sympy expression of an integer computed from B and T; None for everything else."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        expression = value.node.expr
        if expression.free_symbols <= {self.batch, self.length}:
            return expression
        return None

    def _by_length(self, node: fx.Node) -> bool:
        """Whether a node is a size that depends on T alone, or on nothing."""
        if self.length is None:
            return False
        size = self.size(node)
        return size is not None and self.batch not in size.free_symbols

    def anchor(self, nodes: Iterable[fx.Node], symbol: Any) -> tuple[fx.Node, int] | None:
        """Find a tensor of which one dimension is a symbol.

        Args:
            nodes: where to look.
            symbol: B or T.

        Returns:
            The first tensor that has it, and the index of the dimension; None where none has.
        """
        for node in nodes:
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                continue
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    return node, dim
        return None

    @cached_property
    def texts(self) -> dict[str, fx.Node]:
        """The inputs [B, T, ...] by name."""
        texts = dict[str, fx.Node]()
        for name, node in self.inputs.items():
            if self.anchor([node], self.length) is not None:
                texts[name] = node
        return texts

    def needs_length(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether a size among these nodes is computed from T."""
        if self.length is None:
            return False
        for node in nodes:
            size = self.size(node)
            if size is not None and self.length in size.free_symbols:
                return True
        return False

    def seeds(self, after: int, until: int | None = None) -> list[fx.Node]:
        """In-place operations between two positions: they must run even if nobody reads them."""
        seeds = list[fx.Node]()
        for node in self.writers:
            position = self.order[node]
            if after < position and (until is None or position <= until):
                seeds.append(node)
        return seeds

    def carried(self, end: int) -> list[fx.Node]:
        """The values that a cut at this position carries on, inputs included, in order."""
        _, given = self.behind([*self.outputs.values(), *self.seeds(end)], after=end)
        return sorted(given, key=self.order.__getitem__)

    def refused_length(self, length: int) -> str | None:
        """The condition of the model that a length of text breaks.

        Args:
            length: a value for T.

        Returns:
            A condition such as `T <= 512`; None where the model accepts the length.
        """
        inputs = [self._blank(node.meta["val"], length) for node in self.inputs.values()]
        for guard in self.guards:
            try:
                guard(*inputs)
            except AssertionError as problem:
                condition = str(problem).removeprefix("Guard failed: ")
                if "size()[1]" not in condition:
                    return None
                return re.sub(r"\S+\.size\(\)\[1\]", "T", condition)
        return None

    def _blank(self, value: Tensor, length: int) -> Tensor:
        """A tensor without values, shaped like the example, with a given length of text."""
        shape = list[int]()
        for size in value.shape:
            if not isinstance(size, torch.SymInt):
                shape.append(size)
            elif size.node.expr == self.length:
                shape.append(length)
            else:
                shape.append(size.node.hint)
        return torch.empty(shape, dtype=value.dtype, device="meta")

    def obstacle(self, node: fx.Node) -> str | None:
        """Why rows of a value cannot be selected.

        Args:
            node: of the value.

        Returns:
            A clause such as "carries 'h' of shape [9], which has no rows"; None for a tensor
            [B, ...] whose other sizes are numbers or depend on T alone.
        """
        region = region_named(node)
        if region is not None:
            return (
                f"ends inside {region}, which runs as a whole: cut after it, or end the block there"
            )
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return f"carries {node.name!r}, which is not a tensor but {self.written(value)}"

        carries = f"carries {node.name!r} of shape {self.shape_text(value)}"
        if not value.dim():
            return f"{carries}, which has no rows"
        first, *others = value.shape
        if not isinstance(first, torch.SymInt) or first.node.expr != self.batch:
            return f"{carries}, whose first dimension is {self.written(first)}, not B"
        for size in others:
            if self._by_batch(size):
                return f"{carries}, which depends on B again"
        return None

    def _by_batch(self, size: object) -> bool:
        """Whether a size depends on anything but T."""
        if not isinstance(size, torch.SymInt):
            return False
        expression = size.node.expr
        return not expression.free_symbols <= {self.length}

    def written(self, size: object) -> str:
        """A size as text, with B for the batch symbol and T for the length."""
        text = re.sub(rf"\b{self.batch}\b", "B", str(size))
        return re.sub(rf"\b{self.length}\b", "T", text)

    def shape_text(self, value: Tensor) -> str:
        """A shape as text, such as `[2*B, 3]`."""
        return f"[{', '.join(map(self.written, value.shape))}]"

    def value(self, node: fx.Node) -> tuple[str, Any]:
        """The name and the value of a parameter, buffer or constant.

        Args:
            node: of the kind get_attr.

        Returns:
            The name is the model's own, unless `fx.GraphModule` uses that name itself.
        """
        target = str(node.target)
        value: Any = self.graph
        for attribute in target.split("."):
            value = getattr(value, attribute)
        name = target.removeprefix(_PREFIX)
        if hasattr(fx.GraphModule, name.split(".")[0]):
            name = target
        return name, value


def described(node: fx.Node) -> str:
    """An operation as the user can find it: its name, and the module that runs it."""
    operation = f"the operation {node.target}"
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return operation
    path, _ = list(stack.values())[-1]  # of the innermost module
    module = str(path).removeprefix("model").removeprefix(".")
    return f"{operation} in {module!r}" if module else operation


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def _is_buffer(node: fx.Node) -> bool:
    """Whether a tensor is the model's own, and not one that the export made of a constant."""
    return str(node.target).startswith(_PREFIX)


def _written(writer: fx.Node) -> list[fx.Node]:
    """The tensor that an in-place operation writes to, then the tensor that this one is a view of,
    and so on.

    A schema marks an argument with alias information if the result shares its memory. So the walk
    follows first arguments as long as they are marked.
    """
    tensors = list[fx.Node]()
    node = writer
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.arguments:
        source = node.args[0] if node.args else None
        if node.target._schema.arguments[0].alias_info is None or not isinstance(source, fx.Node):
            break
        tensors.append(source)
        node = source
    return tensors or [writer]


def _reached(
    nodes: Iterable[fx.Node],
    starts: Callable[[fx.Node], bool],
    never: Callable[[fx.Node], bool] = lambda node: False,
) -> set[fx.Node]:
    """The nodes that depend on one that `starts`, these included.

    Nodes come in order of execution, so one pass is enough: the inputs of a node come before it.
    The dependence does not pass through nodes that are `never` reached.
    """
    reached = set[fx.Node]()
    for node in nodes:
        depends = not reached.isdisjoint(node.all_input_nodes)
        if starts(node) or (depends and not never(node)):
            reached.add(node)
    return reached
