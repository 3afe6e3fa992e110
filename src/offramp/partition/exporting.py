"""One `torch.export` of a model, with the ends of chosen modules marked in its graph.

Forward hooks that live only while the export runs put an `alias` behind each chosen module's tensors: that fixes the
place even where the next operation works in place, and names exactly the value that an eager hook sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from offramp.errors import BadData, BadNetwork
from offramp.partition.graph import ALIAS, WAY_OUT, Exported, Tap
from offramp.taps import inputs_of, listening, plain_attention, swapped, tapped, tensors_of


def exported(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None, marks: Mapping[str, nn.Module]
) -> Exported:
    """Export a model once, in eval mode, with a dynamic batch; mark where the modules in `marks` end.

    Tensors among the arguments are inputs [B, ...]; everything else is fixed. The model is left as it was.
    Raises BadNetwork when the model is in training mode or cannot be exported, BadData when the example does not fit.
    """
    if any(module.training for module in model.modules()):
        raise BadNetwork("the model is in training mode, expected eval mode; call model.eval() first")
    inputs = inputs_of(args, kwargs)
    marked = _Marked(model, args, kwargs or {}, marks)
    try:
        with _quiet(), plain_attention(), torch.inference_mode(False):
            example = [torch.cat([x, x]).detach() if len(x) == 1 else x.detach().clone() for x in inputs.values()]
            dynamic = ([{0: torch.export.Dim.DYNAMIC} for _ in example],)
            graph = torch.export.export(marked, (example,), dynamic_shapes=dynamic, strict=False).module()
    except Exception as problem:
        raise _why_not(model, args, kwargs or {}, problem) from problem
    assert isinstance(graph, fx.GraphModule)
    return _read(graph, tuple(inputs), marked.notes)


@dataclasses.dataclass
class _Notes:
    """What a forward of `_Marked` gave, in order: names of outputs, (module, leaf) of marks, modules that ran.

    An object of its own, because torch sets the attributes of a module back after the export.
    """

    outputs: list[str] = dataclasses.field(default_factory=list)
    marks: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    calls: list[str] = dataclasses.field(default_factory=list)


class _Marked(nn.Module):
    """A model that also returns the tensors of marked modules, each through an `alias` of its own."""

    def __init__(
        self, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], marks: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.given = (tuple(args), dict(kwargs), dict(marks))
        self.notes = _Notes()

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs, marks = self.given
        notes, found = self.notes, list[Tensor]()
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
        own, named = swapped(args, kwargs, tensors)
        with listening(marks, mark):
            outputs = tensors_of(self.model(*own, **named), "y")
        notes.outputs[:] = outputs
        return [*outputs.values(), *found]


def _read(graph: fx.GraphModule, inputs: tuple[str, ...], notes: _Notes) -> Exported:
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.graph.erase_node(node)  # torch's own check of its inputs
    nodes = list(graph.graph.nodes)
    place = {node: number for number, node in enumerate(nodes)}
    found = dict(zip(inputs, (node for node in nodes if node.op == "placeholder"), strict=True))
    ends = list(nodes[-1].args[0])
    outputs = dict(zip(notes.outputs, ends, strict=False))
    leaves: dict[str, list[tuple[str, fx.Node]]] = {name: [] for name in dict.fromkeys(notes.calls)}
    last = dict.fromkeys(leaves, -1)
    for (name, leaf), mark in zip(notes.marks, ends[len(outputs) :], strict=True):
        leaves[name].append((leaf, mark.args[0]))
        last[name] = place[mark]
    taps = {name: Tap(tuple(leaves[name]), last[name], notes.calls.count(name)) for name in leaves}
    rows = next(iter(found.values())).meta["val"].shape[0]
    symbol = rows.node.expr if isinstance(rows, torch.SymInt) else None
    if not getattr(symbol, "is_Symbol", False):
        raise BadNetwork(f"the model fixes its batch size to {rows}, expected any; remove that, {WAY_OUT}")
    result = Exported(graph, found, outputs, taps, symbol)
    keep = {name: node for name, node in outputs.items() if isinstance(node, fx.Node) and not result.obstacle(node)}
    if not keep:
        raise BadNetwork("the model gives no tensor [B, ...], expected logits or features; wrap it so that it does")
    return dataclasses.replace(result, outputs=keep)


def _why_not(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], problem: Exception
) -> BadData | BadNetwork:
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as own:
        return BadData(f"the model fails on the example: {_first_line(own)}; give a batch of its shape and type")
    text = str(problem)
    if "specialized it to be a constant" in text:
        return BadNetwork(f"the model cannot be exported: its code fixes the batch size; remove that, {WAY_OUT}")
    why = "its code branches on values of the data" if "data-dependent" in text else _first_line(problem)
    return BadNetwork(f"the model cannot be exported: {why}{_where(problem)}; change it, {WAY_OUT}")


def _where(problem: Exception) -> str:
    """The innermost line that is neither torch's nor ours, such as a model's `if h.sum() > 0:`."""
    house = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    lines = [frame for frame in traceback.extract_tb(problem.__traceback__) if not frame.filename.startswith(house)]
    return f", at `{lines[-1].line}` ({lines[-1].filename}:{lines[-1].lineno})" if lines and lines[-1].line else ""


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".;")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch prints about exports, above all about those that fail."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
