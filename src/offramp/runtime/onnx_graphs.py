"""A stage of a network as one ONNX graph.

torch writes the graph. `Graph.only` cuts it down to some outputs, and `Graph.then` joins it with
the graph of the next stage.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import re
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from offramp.errors import BadNetwork, MissingExtra, OfframpError
from offramp.networks.inputs import State
from offramp.networks.network import EngineStage
from offramp.runtime.programs import program_of


def _from_scalar(self: Tensor, other: float, alpha: float = 1) -> Tensor:
    return torch.add(torch.mul(self, -alpha), other)


# `1.0 - mask` of whole numbers: torch's ONNX writer has no way to promote the type of this one
# operation
REWRITTEN: dict[Any, Any] = {torch.ops.aten.rsub.Scalar: _from_scalar}

# Errors of torch's ONNX writer that name an operator.
NO_OPERATOR = (
    r"No ONNX function found for <OpOverload\(op='([\w.:]+)'",
    r"No decompositions? registered for (?:the complex-valued )?.*?([\w]+\.[\w.]+)",
)
_WRITING = threading.RLock()  # while a graph is written, settings of torch's writer are changed
_OPERATORS: dict[Any, Any] = {}  # torch's tables of operators, by the arguments that make them
LOGGERS = (
    "torch.onnx",
    "torch.onnx._internal.exporter._registration",
    "torch.fx.experimental.symbolic_shapes",
)


@dataclass(frozen=True)
class Graph:
    """A graph with named inputs and outputs, each [B, ...] with any B.

    Attributes:
        node: of the network; the last one if the graph has several.
        reads: names of the inputs.
        writes: names of the outputs.
        model: the `onnx.ModelProto`.
    """

    node: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    model: Any

    def to_bytes(self) -> bytes:
        """The content of a file: a line of JSON, then the model."""
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
        """The graph cut down to some outputs.

        Nodes, weights and inputs that these outputs do not need are removed.

        Args:
            writes: names of the outputs to keep.
        """
        model = self._copy()
        graph = model.graph
        needed = set(writes)
        _keep(graph.output, needed)
        # Nodes come in the order of computation. Going backwards, all users of a value are seen
        # before the node that computes it.
        for node in reversed([*graph.node]):
            if needed.isdisjoint(node.output):
                graph.node.remove(node)
            else:
                needed.update(_used(node))
        _keep(graph.initializer, needed)
        _keep(graph.input, needed)
        return Graph(self.node, _names(graph.input), _names(graph.output), model)

    def then(self, after: Graph) -> Graph:
        """Join this graph with one that reads some of its outputs. The result has the outputs of
        both.
        """
        model = self._copy()
        graph = model.graph
        following = after.model.graph
        graph.node.extend(following.node)
        graph.initializer.extend(following.initializer)
        for value in following.input:
            if value.name not in self.reads and value.name not in self.writes:
                graph.input.append(value)
        graph.output.extend(following.output)
        return Graph(after.node, _names(graph.input), _names(graph.output), model)

    def renamed(self, names: Mapping[str, str]) -> Any:
        """A copy of the model with other names for values: `names` maps old to new."""
        model = self._copy()
        _rename(model.graph, names)
        return model

    def _copy(self) -> Any:
        model = type(self.model)()
        model.CopyFrom(self.model)
        return model


def _names(values: Any) -> tuple[str, ...]:
    return tuple(value.name for value in values)


def written(engine_stage: EngineStage, reads: tuple[str, ...], state: State) -> Graph:
    """Export a stage with `torch.export` and write it as ONNX, for any batch size.

    Args:
        engine_stage: the stage.
        reads: names of the tensors that it reads.
        state: named tensors [B, ...] with the shapes to export for.

    Raises:
        BadData: the stage fails on these tensors.
        BadNetwork: the stage cannot be exported, or an operator has no ONNX form.
        MissingExtra: the packages that write ONNX are not installed.
    """
    name = engine_stage.name
    require_onnx()
    with _WRITING, _quiet(), _tables_once(), torch.inference_mode(False), torch.no_grad():
        try:
            program = _rewritten(program_of(engine_stage, reads, state))
            exported = torch.onnx.export(program, dynamo=True, verbose=False)
            model = exported.model_proto  # type: ignore[union-attr]
        except OfframpError:  # rows that do not fit: the same error as with engine='torch'
            raise
        except Exception as problem:  # torch.export and its ONNX writer raise anything
            raise BadNetwork(
                f"segment {name!r} cannot be written as ONNX: {_reason(problem)}. Use "
                f"engine='torch'"
            ) from problem
    _rename_all(model.graph, name, reads, engine_stage.writes)
    return Graph(name, reads, engine_stage.writes, model)


def _rewritten(program: ExportedProgram) -> ExportedProgram:
    """The program without the operations of `REWRITTEN`.

    Most programs have none of them. These are returned as they are, because a pass over a program
    takes a third of the time of the whole export.
    """
    for module in program.graph_module.modules():  # also the branches of a `torch.cond`
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.target in REWRITTEN:
                rewritten: ExportedProgram = program.run_decompositions(REWRITTEN)
                return rewritten
    return program


@contextlib.contextmanager
def _tables_once() -> Iterator[None]:
    """While it is open, torch collects its tables of operators once and not for every use."""
    with _operators_once(), _composites_once():
        yield


@contextlib.contextmanager
def _composites_once() -> Iterator[None]:
    """While it is open, torch looks up its composite operators once.

    It looks up all 800 of them anew for each of its namespaces, which is a sixth of the work for a
    small graph. No operator is added while a graph is written, so the first time is enough. A
    version of torch without this function is left alone.
    """
    try:
        from torch._export import utils

        look_up = utils._materialize_cpp_cia_ops
    except (ImportError, AttributeError):
        yield
        return
    seen = False

    def look_up_once() -> None:
        nonlocal seen
        if not seen:
            look_up()
        seen = True

    utils._materialize_cpp_cia_ops = look_up_once
    try:
        yield
    finally:
        utils._materialize_cpp_cia_ops = look_up


@contextlib.contextmanager
def _operators_once() -> Iterator[None]:
    """While it is open, torch's ONNX writer gets its table of operators from here.

    The writer makes the table anew for every graph. It parses the source of 1,500 functions for
    that, which is half of the work for a small graph. A version of torch that makes its table
    otherwise is left alone.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        method = vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return

    def table(*args: Any, **kwargs: Any) -> Any:
        key = (args, tuple(kwargs.items()))
        if key not in _OPERATORS:
            _OPERATORS[key] = method.__get__(None, ONNXRegistry)(*args, **kwargs)
        # Copied, so that operators which someone adds stay with that one export.
        copied = copy.copy(_OPERATORS[key])
        copied.functions = {name: list(metas) for name, metas in copied.functions.items()}
        return copied

    ONNXRegistry.from_torchlib = staticmethod(table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = method  # type: ignore[method-assign]


def require_onnx() -> None:
    """Raise MissingExtra if the packages that write ONNX are not installed."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as problem:
            raise MissingExtra(package, "onnxruntime", "writing ONNX graphs") from problem


def _reason(problem: Exception) -> str:
    """Why an export failed.

    This is the operator at fault if an error in the chain of causes names it, and otherwise the
    first line of the first cause.
    """
    cause: BaseException | None = problem
    texts = list[str]()
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for text in texts:
        for pattern in NO_OPERATOR:
            match = re.search(pattern, text)
            if match:
                return f"there is no ONNX for the operator {match[1]}"
    lines = texts[-1].strip().splitlines() or [type(problem).__name__]
    return lines[0].strip().rstrip(".")


def _rename_all(graph: Any, node: str, reads: Sequence[str], writes: Sequence[str]) -> None:
    """Give values the names under which stages pass them on.

    The exporter chooses names of its own. Inputs become `reads`, outputs become `writes`, and all
    other values get the name of the node in front, so that graphs can be joined. One value can
    stand behind two outputs, or an output can be an input. A value has only one name, so every
    further output is written by an Identity node.

    Args:
        graph: changed in place.
        node: of the network.
        reads: new names of the inputs, in order.
        writes: new names of the outputs, in order.
    """
    names = dict[str, str]()  # old -> new
    for value in graph.initializer:
        names[value.name] = f"{node}:{value.name}"
    for operation in graph.node:
        operation.name = f"{node}:{operation.name}"
        for output in operation.output:
            names[output] = f"{node}:{output}"
    for value, new in zip(graph.input, reads, strict=True):
        names[value.name] = new

    has_name = {value.name for value in graph.input}
    copies = list[tuple[str, str]]()  # a value, and the further name that it needs
    for value, new in zip(graph.output, writes, strict=True):
        if value.name in has_name:
            copies.append((value.name, new))
        else:
            has_name.add(value.name)
            names[value.name] = new
    _rename(graph, names)
    for old, new in copies:
        copy = graph.node.add()
        copy.op_type = "Identity"
        copy.name = f"{node}:identity {new}"
        copy.input.append(names[old])
        copy.output.append(new)
    for value, new in zip(graph.output, writes, strict=True):
        value.name = new


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in the graphs inside it."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
    for value in (*graph.initializer, *graph.input):
        value.name = names.get(value.name, value.name)
    del graph.value_info[:]


def _used(node: Any) -> Iterator[str]:
    """All values that a node reads, also within graphs inside it."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.HasField("g"):  # the branch of an `If`, for example
            for inner in attribute.g.node:
                yield from _used(inner)
            yield from _names(attribute.g.output)


def _keep(values: Any, names: Collection[str]) -> None:
    """Remove the values with other names."""
    for value in list(values):
        if value.name not in names:
            values.remove(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the output of the exporters."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
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
