"""One `torch.export` of a model, with the ends of chosen modules marked in its graph.

Forward hooks that live only while the export runs put an `alias` behind each chosen module's
tensors: that fixes the place even where the next operation works in place, and names exactly the
value that an eager hook sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.errors import BadData, BadNetwork
from offramp.networks.inputs import remedy
from offramp.networks.taps import inputs_of, listening, plain_attention, swapped, tapped, tensors_of
from offramp.partition.graph import ALIAS, WAY_OUT, ExportedGraph, Tap, described
from offramp.partition.plainer import plainer
from offramp.partition.regions import inline_regions
from offramp.plans.signature import INPUT


def exported(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    marks: Mapping[str, nn.Module],
    length: Collection[str] = (),
) -> ExportedGraph:
    """Export a model once, in eval mode, with a dynamic batch; mark where the modules in `marks`
    end.

    Tensors among the arguments are inputs [B, ...], those named in `length` [B, T, ...] with T free
    and one and the same; everything else is fixed. The model is left as it was.
    Raises BadNetwork when the model is in training mode or cannot be exported, BadData when the
    example does not fit.
    """
    if any(module.training for module in model.modules()):
        raise BadNetwork(
            "the model is in training mode, expected eval mode; call model.eval() first"
        )
    inputs = inputs_of(args, kwargs)
    if unfit := [name for name in length if name not in inputs or inputs[name].dim() < 2]:
        raise BadData(
            f"{unfit[0]!r} is to be of any length, expected an input [B, T, ...] of "
            f"{list(inputs)}; name such"
        )
    free = [name in length for name in inputs]
    marked = _Marked(model, args, kwargs or {}, marks, free)
    try:
        with _quiet(), plain_attention(), torch.inference_mode(False):
            example = _two_rows(inputs)
            dynamic = (
                [
                    dict.fromkeys((0, 1) if any_length else (0,), torch.export.Dim.DYNAMIC)
                    for any_length in free
                ],
            )
            graph = torch.export.export(
                marked, (example,), dynamic_shapes=dynamic, strict=False
            ).module()
    except Exception as problem:
        raise _why_not(model, args, kwargs or {}, problem, text=any(free)) from problem
    assert isinstance(graph, fx.GraphModule)
    return _read(graph, tuple(inputs), marked.notes, free)


def _two_rows(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Copies with two rows or more, and not as many as another size has: the export would take them
    for one.
    """
    rows = len(next(iter(inputs.values())))
    sizes = {size for tensor in inputs.values() for size in tensor.shape[1:]}
    times = next(
        times
        for times in range(1, 99)
        if rows * times > 1 and (times > 8 or rows * times not in sizes)
    )
    return [
        torch.cat([x] * times).detach() if times > 1 else x.detach().clone()
        for x in inputs.values()
    ]


@dataclasses.dataclass
class _Notes:
    """What a forward of `_Marked` gave, in order: names of outputs, (module, leaf) of marks,
    modules that ran.

    An object of its own, because torch sets the attributes of a module back after the export.
    """

    outputs: list[str] = dataclasses.field(default_factory=list)
    marks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)


class _Marked(nn.Module):
    """A model that also returns the tensors of marked modules, each through an `alias` of its
    own.
    """

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
        found = list[Tensor]()
        notes.marks.clear()
        notes.calls.clear()

        def mark(name: str, output: object) -> None:
            notes.calls.append(name)
            for leaf, tensor in tapped(output, name).items():
                notes.marks.append((name, leaf))
                found.append(ALIAS(tensor))

        require: Callable[[bool], None] = torch._check
        for tensor in tensors[1:]:
            require(tensor.shape[0] == tensors[0].shape[0])
        texts = [tensor for tensor, free in zip(tensors, self.free, strict=True) if free]
        for text in texts[1:]:
            require(text.shape[1] == texts[0].shape[1])
        own, named = swapped(args, kwargs, tensors)
        with listening(marks, mark):
            outputs = tensors_of(self.model(*own, **named), "y")
        notes.outputs[:] = outputs
        return [*outputs.values(), *found]


def _read(
    graph: fx.GraphModule, inputs: tuple[str, ...], notes: _Notes, free: Sequence[bool]
) -> ExportedGraph:
    guards: list[nn.Module] = []
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and not node.users:
            guards.append(graph.get_submodule(str(node.target)))
            graph.graph.erase_node(node)  # torch's own check of its inputs
    inline_regions(graph)
    plainer(graph.graph)
    nodes = list(graph.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    found = dict(zip(inputs, (node for node in nodes if node.op == "placeholder"), strict=True))
    ends = list(nodes[-1].args[0])
    outputs = dict(zip(notes.outputs, ends, strict=False))
    leaves: dict[str, list[tuple[str, fx.Node]]] = {name: [] for name in dict.fromkeys(notes.calls)}
    last = dict.fromkeys(leaves, -1)
    for (name, leaf), mark in zip(notes.marks, ends[len(outputs) :], strict=True):
        leaves[name].append((leaf, mark.args[0]))
        last[name] = order[mark]
    taps = {name: Tap(tuple(leaves[name]), last[name], notes.calls.count(name)) for name in leaves}
    rows = next(iter(found.values())).meta["val"].shape[0]
    symbol = _symbol(rows)
    if symbol is None:
        raise BadNetwork(
            f"the model fixes its batch size to {rows}, expected any; remove that, {WAY_OUT}"
        )
    texts = [
        node.meta["val"].shape[1]
        for node, any_length in zip(found.values(), free, strict=True)
        if any_length
    ]
    if texts and _symbol(texts[0]) is None:
        raise BadNetwork(
            f"the model fixes the length of its text to {texts[0]}, expected any; leave out length="
        )
    result = ExportedGraph(
        graph, found, outputs, taps, symbol, _symbol(texts[0]) if texts else None, tuple(guards)
    )
    keep = {
        name: node
        for name, node in outputs.items()
        if isinstance(node, fx.Node) and not result.obstacle(node)
    }
    if not keep:
        raise BadNetwork(
            f"{_lost(result)}the model gives no tensor [B, ...], expected logits or features; "
            f"wrap it so that it does"
        )
    return dataclasses.replace(result, outputs=keep)


def _lost(source: ExportedGraph) -> str:
    """The first operation on the way to the output after which rows are no longer one by one."""
    behind = source.behind(node for node in source.outputs.values() if isinstance(node, fx.Node))[0]
    for node in sorted(behind, key=source.order.__getitem__):
        had = any(source.obstacle(one) is None for one in node.all_input_nodes)
        if (
            had
            and isinstance(value := node.meta.get("val"), Tensor)
            and source.obstacle(node) is not None
        ):
            return (
                f"{described(node)} gives shape "
                f"[{', '.join(map(source.written, value.shape))}], and "
            )
    return ""


def _symbol(size: object) -> Any:
    """The symbol that a free size is; None for a number, and for what is computed."""
    found = size.node.expr if isinstance(size, torch.SymInt) else None
    return found if getattr(found, "is_Symbol", False) else None


def _why_not(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    problem: Exception,
    *,
    text: bool,
) -> BadData | BadNetwork:
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as own:
        inputs = {
            f"{INPUT}/{number}": value for number, value in enumerate((*args, *kwargs.values()))
        }
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        way = remedy(tensors, own, "give a batch of its shape and type")
        return BadData(f"the model fails on the example: {_first_line(own)}; {way}")
    said = str(problem)
    if "specialized it to be a constant" in said:
        if text and ".size()[0]" not in said:
            what = "fixes the length of the text"
        else:
            what = "fixes the batch size"
        return BadNetwork(f"the model cannot be exported: its code {what}; remove that, {WAY_OUT}")
    if "data-dependent" in said:
        why = "its code branches on values of the data"
    else:
        why = _first_line(problem)
    return BadNetwork(f"the model cannot be exported: {why}{_where(problem)}; change it, {WAY_OUT}")


def _where(problem: Exception) -> str:
    """The innermost line that is neither torch's nor ours, such as a model's `if h.sum() > 0:`."""
    house = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    lines = [
        frame
        for frame in traceback.extract_tb(problem.__traceback__)
        if not frame.filename.startswith(house)
    ]
    if lines and lines[-1].line:
        return f", at `{lines[-1].line}` ({lines[-1].filename}:{lines[-1].lineno})"
    return ""


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch prints about exports, above all about those that fail."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
