"""A part of a network as one ONNX graph: written by torch, cut down to what is asked for, joined
with the next.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import BadNetwork, MissingExtra, OfframpError
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.runtime.programs import program_of


def _from_scalar(self: Tensor, other: float, alpha: float = 1) -> Tensor:
    return torch.add(torch.mul(self, -alpha), other)


# `1.0 - mask` of whole numbers: torch's ONNX writer has no way to promote the type of this one
# operation
REWRITTEN: dict[Any, Any] = {torch.ops.aten.rsub.Scalar: _from_scalar}


@dataclass(frozen=True)
class Graph:
    """An `onnx.ModelProto` whose inputs are `reads` and whose outputs are `writes`, each [B, ...]
    with B free.
    """

    node: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    model: Any

    def to_bytes(self) -> bytes:
        """As a file holds it: a line of JSON, then the model."""
        head = json.dumps([self.node, self.reads, self.writes]).encode()
        return head + b"\n" + bytes(self.model.SerializeToString())

    @staticmethod
    def from_bytes(content: bytes) -> Graph | None:
        """The graph of `to_bytes`; None for anything else."""
        import onnx

        head, _, body = content.partition(b"\n")
        try:
            node, reads, writes = json.loads(head)
            return Graph(str(node), tuple(reads), tuple(writes), onnx.load_model_from_string(body))
        except Exception:  # JSON and protobuf raise errors that share no class
            return None

    def only(self, writes: Sequence[str]) -> Graph:
        """The graph without what nothing in `writes` needs, inputs included."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        graph = model.graph
        needed = set(writes)
        _keep(graph.output, needed)
        for node in reversed([*graph.node]):
            if needed.isdisjoint(node.output):
                graph.node.remove(node)
            else:
                needed.update(_used(node))
        _keep(graph.initializer, needed)
        _keep(graph.input, needed)
        reads = tuple(value.name for value in graph.input)
        return Graph(self.node, reads, tuple(value.name for value in graph.output), model)

    def then(self, after: Graph) -> Graph:
        """Both as one, where `after` goes on from what this one writes."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        mine = model.graph
        its = after.model.graph
        mine.node.extend(its.node)
        mine.initializer.extend(its.initializer)
        mine.input.extend(
            value for value in its.input if value.name not in {*self.reads, *self.writes}
        )
        mine.output.extend(its.output)
        reads, writes = ((value.name for value in ends) for ends in (mine.input, mine.output))
        return Graph(after.node, tuple(reads), tuple(writes), model)

    def renamed(self, names: Mapping[str, str]) -> Any:
        """A copy of the model in which the tensors that it reads have other names."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        _rename(model.graph, names)
        return model


def written(engine_stage: EngineStage, reads: tuple[str, ...], state: State) -> Graph:
    """One `torch.export` of a part with a dynamic batch, written as ONNX. Raises BadData,
    BadNetwork, MissingExtra.
    """
    name = engine_stage.name
    require_onnx()
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        try:
            program = program_of(engine_stage, reads, state).run_decompositions(REWRITTEN)
            model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]
        except OfframpError:  # rows that do not fit are told as the eager engine tells it
            raise
        except Exception as problem:  # torch.export and its ONNX writer raise anything
            raise BadNetwork(
                f"segment {name!r} cannot be written as ONNX: {_told(problem)}; run it with "
                f"engine='torch'"
            ) from problem
    _rename_all(model.graph, name, reads, engine_stage.writes)
    return Graph(name, reads, engine_stage.writes, model)


def require_onnx() -> None:
    """Raise MissingExtra without the packages that write ONNX."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as problem:
            raise MissingExtra(package, "onnxruntime", "writing ONNX graphs") from problem


def _told(problem: Exception) -> str:
    """The operator that is at fault where it is named anywhere in the chain of causes, else the
    first line.
    """
    cause: BaseException | None = problem
    texts = []
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for text in texts:
        if found := re.search(
            r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text
        ) or re.search(
            r"No decompositions? registered for (?:the complex-valued )?.*?([\w]+\.[\w.]+)", text
        ):
            return f"there is no ONNX for the operator {found[1]}"
    return next(
        (line.strip() for line in texts[-1].splitlines() if line.strip()), type(problem).__name__
    ).rstrip(".")


def _rename_all(graph: Any, node: str, reads: Sequence[str], writes: Sequence[str]) -> None:
    """Tensors that are passed on get their own names, everything inside gets the node's before it.

    A value that is given back twice, or as it came, gets an Identity for each name but one.
    """
    for each in graph.node:
        each.name = f"{node}:{each.name}"  # for graphs that are put together
    known = [
        *(value.name for value in graph.initializer),
        *(out for each in graph.node for out in each.output),
    ]
    names = {name: f"{node}:{name}" for name in known}
    names |= dict(zip((value.name for value in graph.input), reads, strict=True))
    taken = {value.name for value in graph.input}
    copies = list[tuple[str, str]]()
    for value, new in zip(graph.output, writes, strict=True):
        if value.name in taken:
            copies.append((value.name, new))
        else:
            taken.add(value.name)
            names[value.name] = new
    _rename(graph, names)
    for end, new in copies:
        copy = graph.node.add()
        copy.op_type = "Identity"
        copy.name = f"{node}:identity {new}"
        copy.input.append(names[end])
        copy.output.append(new)
    for value, new in zip(graph.output, writes, strict=True):
        value.name = new


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in the graphs inside it."""
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
    for value in (*graph.initializer, *graph.input):
        value.name = names.get(value.name, value.name)
    del graph.value_info[:]


def _used(node: Any) -> Iterator[str]:
    """All values that a node reads, those of graphs inside it included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                yield from _used(inner)
            yield from (value.name for value in attribute.g.output)


def _keep(values: Any, names: Collection[str]) -> None:
    for value in [each for each in values if each.name not in names]:
        values.remove(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what the exporters print."""
    names = (
        "torch.onnx",
        "torch.onnx._internal.exporter._registration",
        "torch.fx.experimental.symbolic_shapes",
    )
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
