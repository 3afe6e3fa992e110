"""A node of a network as one ONNX graph: its segment, exit and gate together, for engines that compile and for export.

A graph is made when the first rows arrive, because a ladder does not know what its inputs look like, and kept while
the weights are what they were. Its inputs and outputs have the names of the tensors that segments pass on.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from offramp.chain import Step, passages
from offramp.errors import BadInput, BadNetwork, MissingExtra, OfframpError, OpenAgain
from offramp.find import find_file
from offramp.inputs import State
from offramp.network import Network, Part
from offramp.programs import program_of, read_by
from offramp.segmenting import undisturbed
from offramp.signature import INPUT
from offramp.watch import Watch

Call = Callable[[State], State]
Key = tuple[object, ...]
Kept = dict[Key, tuple[Watch, Any]]
Making = Callable[[Part, State, Kept], Call]
Pairs = Sequence[tuple[Part, Part]]
_KEPT: WeakKeyDictionary[nn.Module, dict[Key, tuple[Watch, Any]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Graph:
    """An `onnx.ModelProto` whose inputs are `reads` and whose outputs are `writes`, each [B, ...] with B free."""

    node: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    model: Any

    def only(self, writes: Sequence[str]) -> Graph:
        """The graph without what nothing in `writes` needs, inputs included."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        graph, needed = model.graph, set(writes)
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
        mine, its = model.graph, after.model.graph
        mine.node.extend(its.node)
        mine.initializer.extend(its.initializer)
        mine.input.extend(value for value in its.input if value.name not in {*self.reads, *self.writes})
        mine.output.extend(its.output)
        reads, writes = ((value.name for value in ends) for ends in (mine.input, mine.output))
        return Graph(after.node, tuple(reads), tuple(writes), model)

    def renamed(self, names: Mapping[str, str]) -> Any:
        """A copy of the model in which the tensors that it reads have other names."""
        model = type(self.model)()
        model.CopyFrom(self.model)
        _rename(model.graph, names)
        return model


def parts_of(
    network: Network,
    steps: Sequence[Step],
    device: torch.device,
    engine: str,
    compiled: Callable[[Graph], Call],
    *,
    joined: bool = True,
) -> tuple[Part, ...]:
    """The parts of an engine that turns graphs into calls on named tensors; each part is one piece, "segment".

    Steps at which a plan asks nothing are no parts of their own, if `joined`: they are in the graph of the next.
    engine: its name, with all that decides what `compiled` gives. Raises BadInput for a device that is no CPU.
    """
    if device.type != "cpu":
        raise BadInput(f"the network is on {device}, and {engine.split()[0]} runs on the cpu here; call net.to('cpu')")
    groups = passages(steps) if joined else tuple((step,) for step in steps)
    kept = _KEPT.setdefault(network, {})  # the parts hold this and not the network, which may go before them
    return tuple(
        replace(part, pieces={"segment": _Piece(part, engine, partial(_compiled, compiled, pairs, part.writes), kept)})
        for part, pairs in _passing(network, groups, device)
    )


def _compiled(compiled: Callable[[Graph], Call], pairs: Pairs, writes: Sequence[str], state: State, kept: Kept) -> Call:
    return compiled(_through(pairs, writes, state, kept))


def lazy_parts(
    network: Network, steps: Sequence[Step], device: torch.device, engine: str, made: Making
) -> tuple[Part, ...]:
    """A part per step, of calls that are made of it and the first rows, and kept while the weights are the same."""
    kept = _KEPT.setdefault(network, {})
    return tuple(
        replace(part, pieces={"segment": _Piece(part, engine, partial(made, part), kept)})
        for part in _eager(network, steps, device)
    )


def graphs_of(network: Network, steps: Sequence[Step], state: State) -> Iterator[Graph]:
    """The graphs of the parts of `steps`, for tensors such as those in `state`: {name: [B, ...]}, which grows while
    they are asked for. Raises BadNetwork, BadData.
    """
    kept = _KEPT.setdefault(network, {})
    for part, pairs in _passing(network, passages(steps), network.device()):
        yield _through(pairs, part.writes, state, kept)


def _passing(network: Network, groups: Sequence[Sequence[Step]], device: torch.device) -> Iterator[tuple[Part, Pairs]]:
    """Each group as one part, and the parts in it, each beside the same with all that stands there."""
    steps = [step for group in groups for step in group]
    full = [_whole(network, step.name) for step in steps]
    eager = zip(_eager(network, steps, device), _eager(network, full, device), strict=True)
    pairs = [tuple(islice(eager, len(group))) for group in groups]
    for number, here in enumerate(pairs):
        later = {name for rest in pairs[number + 1 :] for part, _ in rest for name in part.reads}
        yield _as_one([part for part, _ in here], later), here


def _as_one(parts: Sequence[Part], later: Collection[str]) -> Part:
    """Parts one after the other; of what the first ones write only what is read `later` comes out."""
    *before, last = parts
    reads, made = dict[str, None](), dict[str, None]()
    for part in parts:
        reads.update(dict.fromkeys(name for name in part.reads if name not in made))
        made.update(dict.fromkeys(part.writes))
    return replace(
        last,
        reads=tuple(reads),
        writes=tuple(name for name in made if name in last.writes or name in later),
        modules=tuple(dict.fromkeys(module for part in parts for module in part.modules)),
        passes=tuple(part.step.name for part in before),
    )


def _eager(network: Network, steps: Sequence[Step], device: torch.device) -> tuple[Part, ...]:
    found: tuple[Part, ...] = find_file("engines", "torch").open(network, steps, device)
    return found


def _whole(network: Network, name: str) -> Step:
    """A node with all that stands there: what a step does not run is taken out of that graph again."""
    return Step(name, exit=True, gate=name in network.gates, last=name not in network.gates)


class _Piece:
    """A part compiled for the shapes and types that arrive, once for each."""

    def __init__(self, part: Part, engine: str, made: Callable[[State, Kept], Call], kept: Kept) -> None:
        self.part, self.engine, self.made, self.kept = part, engine, made, kept
        self.calls: dict[Key, Call] = {}

    def __call__(self, state: State) -> State:
        names = read_by(self.part, state)
        key = tuple((name, state[name].dtype, state[name].shape[1:]) for name in names)
        call = self.calls.get(key)
        if call is None:
            call = self.calls[key] = self._compiled(key, state)
        return call(state)

    def _compiled(self, key: Key, state: State) -> Call:
        what = (self.engine, self.part.step.name, self.part.passes, self.part.writes, *key)
        found: Call = _remembered(self.kept, what, self.part, lambda: self.made(state, self.kept))
        return found


def _remembered(kept: Kept, key: Key, part: Part, make: Callable[[], Any]) -> Any:
    """What was made under this key, made again when the modules of the part have changed since."""
    with undisturbed():
        if key in kept:
            with contextlib.suppress(OpenAgain):
                kept[key][0].check()
                return kept[key][1]
        watch = Watch(part.modules, deep=False)
        kept[key] = watch, make()
        return kept[key][1]


def _through(pairs: Pairs, writes: Sequence[str], state: State, kept: Kept) -> Graph:
    """The graphs of parts as one that gives `writes`; what stands between them is computed in torch."""
    ((part, full), *others), rows = pairs, {name: value[:4].clone() for name, value in state.items()}
    found = _graph(part, full, rows, kept)
    for after, full in others:
        with torch.no_grad():
            part.call(rows)
        found, part = found.then(_graph(after, full, rows, kept)), after
    return found.only(writes) if others else found


def _graph(part: Part, full: Part, state: State, kept: Kept) -> Graph:
    step = part.step
    if any(name not in state for name in full.reads if name != INPUT):
        full = part  # a plan that does not run an earlier exit has nothing for the exit or gate that would read it
    reads = read_by(full, state)
    key = ("graph", step.name, *full.writes, *((name, state[name].dtype, state[name].shape[1:]) for name in reads))
    whole: Graph = _remembered(kept, key, full, lambda: _exported(full, reads, state))
    return whole if full is part or full.writes == part.writes else whole.only(part.writes)


def _exported(part: Part, reads: tuple[str, ...], state: State) -> Graph:
    """One `torch.export` of a part with a dynamic batch, written as ONNX. Raises BadData, BadNetwork, MissingExtra."""
    name = part.step.name
    require_onnx()
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        try:
            program = program_of(part, reads, state)
            model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]
        except OfframpError:  # rows that do not fit are told as the eager engine tells it
            raise
        except Exception as problem:  # torch.export and its ONNX writer raise anything
            raise BadNetwork(
                f"segment {name!r} cannot be written as ONNX: {_told(problem)}; run it with engine='torch'"
            ) from problem
    _rename_all(model.graph, name, reads, part.writes)
    return Graph(name, reads, part.writes, model)


def require_onnx() -> None:
    """Raise MissingExtra without the packages that write ONNX."""
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as problem:
            raise MissingExtra(package, "onnxruntime", "writing ONNX graphs") from problem


def _told(problem: Exception) -> str:
    """The operator that is at fault where it is named anywhere in the chain of causes, else the first line."""
    cause: BaseException | None = problem
    texts = []
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    for text in texts:
        if found := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text) or re.search(
            r"No decompositions? registered for (?:the complex-valued )?.*?([\w]+\.[\w.]+)", text
        ):
            return f"there is no ONNX for the operator {found[1]}"
    return next((line.strip() for line in texts[-1].splitlines() if line.strip()), type(problem).__name__).rstrip(".")


def _rename_all(graph: Any, node: str, reads: Sequence[str], writes: Sequence[str]) -> None:
    """Tensors that are passed on get their own names, everything inside gets the node's before it.

    A value that is given back twice, or as it came, gets an Identity for each name but one.
    """
    for each in graph.node:
        each.name = f"{node}:{each.name}"  # for graphs that are put together
    known = [*(value.name for value in graph.initializer), *(out for each in graph.node for out in each.output)]
    names = {name: f"{node}:{name}" for name in known}
    names |= dict(zip((value.name for value in graph.input), reads, strict=True))
    taken, copies = {value.name for value in graph.input}, list[tuple[str, str]]()
    for value, new in zip(graph.output, writes, strict=True):
        if value.name in taken:
            copies.append((value.name, new))
        else:
            taken.add(value.name)
            names[value.name] = new
    _rename(graph, names)
    for end, new in copies:
        copy = graph.node.add()
        copy.op_type, copy.name = "Identity", f"{node}:identity {new}"
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
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")
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
