"""Exports a model once, with the ends of chosen modules marked in its graph.

Forward hooks, which exist only during the export, put an `alias` behind each chosen module's
tensors. The alias fixes the position even where the next operation works in place, and it is
exactly the value that an eager hook sees.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp._support.sentences import first_line
from offramp.errors import BadData, BadNetwork
from offramp.networks.hooks import code_of, forward_hooks
from offramp.networks.inputs import remedy
from offramp.networks.taps import (
    FIXED,
    FIXING,
    inputs_of,
    listening,
    plain_attention,
    swapped,
    tapped,
    tensors_of,
)
from offramp.partition.graph import ALIAS, WAY_OUT, ExportedGraph, Tap, described
from offramp.partition.plainer import plainer
from offramp.partition.regions import inline_regions
from offramp.plans.signature import INPUT

# what may hold modules among the attributes of a module
HOLDERS = (nn.Module, dict, list, tuple, set, MethodType, partial)


def exported(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    marks: Mapping[str, nn.Module],
    length: Collection[str] = (),
) -> ExportedGraph:
    """Export a model once, with a dynamic batch, and mark where the modules in `marks` end.

    Args:
        model: in eval mode; it is left as it was.
        args: positional arguments of an example call. Its tensors [B, ...] are the inputs, and
            everything else is fixed.
        kwargs: keyword arguments of the same call.
        marks: modules by name.
        length: names of inputs [B, T, ...] with a dynamic T, which is the same in all of them.

    Returns:
        The graph, with inputs, outputs and taps by name.

    Raises:
        BadNetwork: the model is in training mode or cannot be exported.
        BadData: the example does not fit the model.
    """
    if any(module.training for module in model.modules()):
        raise BadNetwork("the model must be in eval mode, got training mode. Call model.eval().")
    inputs = inputs_of(args, kwargs)
    for name in length:
        if name not in inputs or inputs[name].dim() < 2:
            raise BadData(f"length must name inputs [B, T, ...] of {list(inputs)}, got {name!r}")
    free = [name in length for name in inputs]
    twin, twin_marks = _twin(model, marks)
    marked = _Marked(twin, args, kwargs or {}, twin_marks, free)
    try:
        with _quiet(), plain_attention(), torch.inference_mode(False):
            example = _two_rows(inputs)
            dynamic = list[dict[int, Any]]()  # per input: its dimensions of free size
            for any_length in free:
                dimensions = (0, 1) if any_length else (0,)
                dynamic.append(dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC))
            program = torch.export.export(
                marked, (example,), dynamic_shapes=(dynamic,), strict=False
            )
            graph = program.module()
    except Exception as problem:
        raise _why_not(model, args, kwargs or {}, problem, text=any(free)) from problem
    assert isinstance(graph, fx.GraphModule)
    return _read(graph, tuple(inputs), marked.notes, free)


def _twin(
    model: nn.Module, marks: Mapping[str, nn.Module]
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a model with the same parameters and buffers, and the marked modules in it.

    During an export torch puts fake tensors in place of a module's parameters, and calls modules
    through a tracer. The model itself may be serving in another thread. A model that cannot be
    copied is returned as it is.
    """
    if any(map(_is_bound, model.modules())):
        return model, dict(marks)
    # Everything that holds no modules is shared: tensors, locks, tokenizers, large tables.
    copies: dict[int, Any] = {}  # id of an object -> its copy, as `deepcopy` keeps them
    for tensor in (*model.parameters(), *model.buffers()):
        copies[id(tensor)] = tensor
    for module in model.modules():
        for value in vars(module).values():
            if not isinstance(value, HOLDERS):
                copies[id(value)] = value
    try:
        twin = copy.deepcopy(model, copies)
    except Exception:  # a list of locks or of open files cannot be copied
        return model, dict(marks)
    return twin, {name: copies.get(id(module), module) for name, module in marks.items()}


def _is_bound(module: nn.Module) -> bool:
    """Whether a function that was put on a module may lead to the model itself, and not to a copy.

    A copy of a module has the same functions, with the same variables around them.
    """
    functions = [vars(module).get("forward")]
    for _, hook in forward_hooks(module):
        functions.append(hook)
    return any(getattr(function, "__closure__", None) for function in functions)


def _two_rows(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Copies of the example with at least two rows, and with a number of rows that is unique.

    The export treats equal sizes as one symbol. So if the batch is as large as another dimension,
    the rows are repeated until it differs, at most nine times.
    """
    rows = len(next(iter(inputs.values())))
    sizes = set[int]()
    for tensor in inputs.values():
        sizes.update(tensor.shape[1:])
    times = 1
    while rows * times < 2 or (times <= 8 and rows * times in sizes):
        times += 1
    copies = list[Tensor]()
    for tensor in inputs.values():
        if times == 1:
            copies.append(tensor.detach().clone())
        else:
            copies.append(torch.cat([tensor] * times).detach())  # [B, ...] -> [times * B, ...]
    return copies


@dataclasses.dataclass
class _Notes:
    """Names that a forward of `_Marked` noted. A separate object, because after the export torch
    resets the attributes of a module.

    Attributes:
        outputs: names of the model's outputs, in order.
        marks: (module, leaf) of every marked tensor, in order.
        calls: names of the modules that ran, once for every call.
    """

    outputs: list[str] = dataclasses.field(default_factory=list)
    marks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)


class _Marked(nn.Module):
    """A model that also returns the tensors of the marked modules, each through its own `alias`."""

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        marks: Mapping[str, nn.Module],
        free: Sequence[bool],
    ) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.given = (tuple(args), dict(kwargs), dict(marks))
        self.free = tuple(free)
        self.notes = _Notes()

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs, marks = self.given
        notes = self.notes
        notes.marks.clear()
        notes.calls.clear()
        marked = list[Tensor]()

        def mark(name: str, output: object) -> None:
            notes.calls.append(name)
            for leaf, tensor in tapped(output, name).items():
                notes.marks.append((name, leaf))
                marked.append(ALIAS(tensor))

        # One symbol B for all inputs, and one symbol T for all texts.
        require: Callable[[bool], None] = torch._check
        for tensor in tensors[1:]:
            require(tensor.shape[0] == tensors[0].shape[0])
        first_text: Tensor | None = None
        for tensor, free in zip(tensors, self.free, strict=True):
            if not free:
                continue
            if first_text is None:
                first_text = tensor
            else:
                require(tensor.shape[1] == first_text.shape[1])

        positional, keywords = swapped(args, kwargs, tensors)
        with listening(marks, mark):
            outputs = tensors_of(self.model(*positional, **keywords), "y")
        notes.outputs[:] = outputs
        return [*outputs.values(), *marked]


def _read(
    graph: fx.GraphModule, names: tuple[str, ...], notes: _Notes, free: Sequence[bool]
) -> ExportedGraph:
    """The graph with names for its inputs, outputs and taps. Raises BadNetwork."""
    guards = _without_guards(graph)
    inline_regions(graph)
    plainer(graph.graph)
    nodes = list(graph.graph.nodes)
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    inputs = dict(zip(names, placeholders, strict=True))

    # `_Marked` returns the outputs of the model first, then the marked tensors.
    results = list(nodes[-1].args[0])
    outputs = dict(zip(notes.outputs, results, strict=False))
    marks = results[len(outputs) :]
    taps = _taps(notes, marks, {node: index for index, node in enumerate(nodes)})

    rows = placeholders[0].meta["val"].shape[0]
    batch = _symbol(rows)
    if batch is None:
        raise BadNetwork(
            f"the model fixes its batch size to {rows}, but must accept any; remove that, {WAY_OUT}"
        )
    length = None
    if any(free):
        text = placeholders[free.index(True)].meta["val"].shape[1]
        length = _symbol(text)
        if length is None:
            raise BadNetwork(
                f"the model fixes the length of its text to {text}, but must accept any. Leave "
                f"out length=."
            )
    result = ExportedGraph(graph, inputs, outputs, taps, batch, length, guards)

    # Outputs without rows cannot be part of an answer.
    by_row = dict[str, fx.Node]()
    for name, node in outputs.items():
        if isinstance(node, fx.Node) and not result.obstacle(node):
            by_row[name] = node
    if not by_row:
        raise BadNetwork(
            f"{_lost(result)}the model gives no tensor [B, ...]. Wrap it so that it returns logits "
            f"or features."
        )
    return dataclasses.replace(result, outputs=by_row)


def _without_guards(graph: fx.GraphModule) -> tuple[nn.Module, ...]:
    """Take torch's own checks of the inputs out of the graph, and return them."""
    guards = list[nn.Module]()
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and not node.users:
            guards.append(graph.get_submodule(str(node.target)))
            graph.graph.erase_node(node)
    return tuple(guards)


def _taps(notes: _Notes, marks: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> dict[str, Tap]:
    """The taps by module, in the order in which the modules first ran."""
    leaves: dict[str, list[tuple[str, fx.Node]]] = {}
    for name in notes.calls:  # also of a module that gives no tensor
        leaves[name] = []
    last = dict.fromkeys(leaves, -1)
    for (name, leaf), mark in zip(notes.marks, marks, strict=True):
        tensor = mark.args[0]  # `mark` is the alias behind it
        assert isinstance(tensor, fx.Node)
        leaves[name].append((leaf, tensor))
        last[name] = order[mark]
    taps = dict[str, Tap]()
    for name in leaves:
        taps[name] = Tap(tuple(leaves[name]), last[name], notes.calls.count(name))
    return taps


def _lost(source: ExportedGraph) -> str:
    """The first operation on the way to the output whose result is no longer row by row."""
    ends = list[fx.Node]()
    for output in source.outputs.values():
        if isinstance(output, fx.Node):  # and not a constant such as None
            ends.append(output)
    behind, _ = source.behind(ends)
    for node in sorted(behind, key=source.order.__getitem__):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or source.obstacle(node) is None:
            continue
        # This one has no rows. Did one of its inputs still have them?
        for input_node in node.all_input_nodes:
            if source.obstacle(input_node) is None:
                return f"{described(node)} gives shape {source.shape_text(value)}, and "
    return ""


def _symbol(size: object) -> Any:
    """The symbol of a free size; None for a number, and for a computed size such as 2*B."""
    if not isinstance(size, torch.SymInt):
        return None
    expression = size.node.expr
    return expression if expression.is_Symbol else None


def _why_not(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    problem: Exception,
    *,
    text: bool,
) -> BadData | BadNetwork:
    """The error to raise for an export that failed: the cause, and what to do about it."""
    # If the eager model fails too, then the example is wrong, and not the export.
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as eager_problem:
        tensors = dict[str, Tensor]()
        for number, value in enumerate((*args, *kwargs.values())):
            if isinstance(value, Tensor):
                tensors[f"{INPUT}/{number}"] = value
        way = remedy(tensors, eager_problem, "give a batch of its shape and type")
        return BadData(
            f"the model fails on the example: {first_line(eager_problem).rstrip('.;')}; {way}"
        )

    message = str(problem)
    if FIXED in message:
        if text and ".size()[0]" not in message:
            fixed = "fixes the length of the text (as int(x.shape[1]) does; x.shape[1] does not)"
        else:
            fixed = f"fixes the batch size {FIXING}"
        who = code_of(model.named_modules())
        return BadNetwork(f"the model cannot be exported: {who} {fixed}; remove that, {WAY_OUT}")
    if "data-dependent" in message:
        why = "its code branches on values of the data"
    else:
        why = first_line(problem).rstrip(".;")
    return BadNetwork(f"the model cannot be exported: {why}{_where(problem)}; change it, {WAY_OUT}")


def _where(problem: Exception) -> str:
    """The innermost line of the model's own code, such as its `if h.sum() > 0:`.

    It is the last frame of the traceback that is neither in torch nor in this package.
    """
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        if frame.filename.startswith(libraries):
            continue
        return f", at `{frame.line}` ({frame.filename}:{frame.lineno})" if frame.line else ""
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """While it is open, torch prints nothing about exports, in particular failed ones."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
