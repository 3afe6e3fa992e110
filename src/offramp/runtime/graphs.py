"""The stages of a schedule as graphs, for engines that compile and for export.

A graph holds the segments of a stage with its exit and gate. Its inputs and outputs have the names
of the tensors that stages pass on.

Graphs are made when the first rows arrive, because a ladder does not know the shape of its inputs
before. How a stage is compiled once per shape:

1. `parts_of` gives stages whose only function is a `_CompiledStage`.
2. A `_CompiledStage` looks up the shapes and types of the rows in its own dict.
3. A new shape may have been compiled for another Runner of the same network: `_once` looks in
   `compiled_of(network)`, and compiles otherwise. What it keeps is valid while the modules of the
   stage are unchanged.
4. The graph to compile comes from the cache on disk, or from `_through`, which joins the graphs of
   the stage's nodes. These come from the cache on disk too, or are written now. So whatever else
   is made of a network, such as one graph of the plan, finds its nodes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import nn

from offramp._support import cache as disk
from offramp._support.cache import edition
from offramp.errors import BadData, BadNetwork, InvalidArgument, StaleRunner
from offramp.networks.code_marks import cache_of, code_marks
from offramp.networks.compiled import Compiled, compiled_of
from offramp.networks.inputs import State
from offramp.networks.members import outside_torch
from offramp.networks.network import EngineStage, Network, trial_rows
from offramp.plans.schedule import Edge, Schedule, Stage, full_schedule
from offramp.plans.signature import INPUT
from offramp.runtime.engine import kind_of
from offramp.runtime.lean import CompiledPiece, OnArrays, Wanted, inputs_of
from offramp.runtime.onnx_graphs import Graph, require_onnx, written
from offramp.runtime.programs import read_by
from offramp.runtime.staleness import ChangeDetector

Call = Callable[[State], State]
Key = tuple[object, ...]
# the tensors that a stage reads: name, type, shape of a row
Rows = tuple[tuple[str, torch.dtype, tuple[int | None, ...]], ...]
Made = TypeVar("Made")
Making = Callable[[EngineStage, State, str], Call]  # the text is a key for the cache on disk
Pairs = Sequence[tuple[EngineStage, EngineStage]]


def parts_of(
    network: Network,
    schedule: Schedule,
    device: torch.device,
    engine: str,
    compiled: Callable[[Graph], Call],
    *,
    joined: bool = True,
) -> tuple[EngineStage, ...]:
    """The stages of a schedule for an engine that turns graphs into calls on named tensors.

    Args:
        network: in eval mode, on the CPU.
        schedule: the stages to run.
        device: of the network.
        engine: the engine's name, with everything that decides what `compiled` returns.
        compiled: turns a graph into a call.
        joined: whether a stage without an open exit becomes part of the next one's graph.

    Returns:
        Stages with one function each, named "segment".

    Raises:
        InvalidArgument: the device is not a CPU.
        BadNetwork: a member computes outside of torch.
    """
    _require_torch(network)
    if device.type != "cpu":
        raise InvalidArgument(
            f"the network must be on the cpu for {engine.split()[0]}, got {device}. "
            f"Call net.to('cpu')"
        )
    # The stages hold `kept` and not the network, so that the network can be freed before them.
    kept = cache_of(network)
    marks = network_marks(network)
    network_ref = ref(network)
    stages_key = f"parts {marks()} {schedule!r} {joined}"
    in_torch = list[tuple[EngineStage, Pairs]]()

    def stages_in_torch() -> list[tuple[EngineStage, Pairs]]:
        """The stages in torch, from which graphs are written. The model is taken apart only when
        some graph is not on disk.
        """
        if not in_torch:
            living = network_ref()
            assert living is not None, "the stages outlive the network"
            in_torch.extend(_passing(living, schedule, device, joined=joined))
        return in_torch

    def compiled_stage(number: int, engine_stage: EngineStage) -> EngineStage:
        def make(state: State) -> Call:
            key = f"part {_stage_key(marks(), engine_stage, state)}"

            def write() -> Graph:
                _, pairs = stages_in_torch()[number]
                return _through(pairs, engine_stage.writes, state, kept, marks)

            return compiled(kept_graph(key, write))

        function = _CompiledStage(engine_stage, engine, make, kept)
        return replace(engine_stage, functions={"segment": function})

    engine_stages = _remembered(network, stages_key)
    if engine_stages is None:
        engine_stages = [engine_stage for engine_stage, _ in stages_in_torch()]
        _remember(network, stages_key, engine_stages)
    return tuple(map(compiled_stage, range(len(engine_stages)), engine_stages))


def _remember(network: Network, key: str, engine_stages: Sequence[EngineStage]) -> None:
    """Keep on disk what the stages read, write and depend on. The next process then need not take
    the model apart.
    """
    names = {module: name for name, module in network.named_modules()}
    described = list[Any]()
    for engine_stage in engine_stages:
        modules = list[str]()
        for module in engine_stage.modules:
            if module not in names:
                return
            modules.append(names[module])
        free = {name: [*dims] for name, dims in engine_stage.free.items()}
        described.append([asdict(engine_stage.stage), modules, free])
    disk.write(key, json.dumps(described).encode())


def _remembered(network: Network, key: str) -> list[EngineStage] | None:
    """The stages that `_remember` kept, without functions; None if nothing valid is kept."""
    content = disk.read(key)
    if content is None:
        return None
    modules = dict(network.named_modules())
    engine_stages = list[EngineStage]()
    try:
        for fields, names, free in json.loads(content):
            stage = _stage_from(fields)
            dims = {name: tuple(value) for name, value in free.items()}
            own_modules = tuple(modules[name] for name in names)
            engine_stages.append(EngineStage(stage, own_modules, {}, dims))
    except (ValueError, TypeError, KeyError, AttributeError):  # we did not write this file
        return None
    return engine_stages


def _stage_from(fields: dict[str, Any]) -> Stage:
    """A stage from the fields that `asdict` gave and JSON stored: lists become tuples again."""
    edges = list[Edge]()
    for edge in fields.pop("edges"):
        carries = tuple(edge["carries"])
        via = tuple(edge["via"])
        edges.append(Edge(edge["to"], edge["successor"], carries, via))
    plain = dict[str, Any]()
    for name, value in fields.items():
        plain[name] = tuple(value) if isinstance(value, list) else value
    return Stage(edges=tuple(edges), **plain)


def network_marks(
    network: Network, packages: Sequence[str] = ("torch", "onnx", "onnxscript")
) -> Callable[[], str]:
    """A function that returns the key of what is compiled of this network, for the cache on disk.

    The key has the weights, the configuration, the user's code, the versions of packages, and the
    source files of all classes of modules. The function does not keep the network alive.

    Args:
        network: that is compiled.
        packages: that compile; by default those that write graphs.
    """
    network_ref = ref(network)

    def marks() -> str:
        living = network_ref()
        assert living is not None, "the stages outlive the network"
        kinds = {type(module) for module in living.modules()}
        sources = list[str]()
        for kind in sorted(kinds, key=lambda kind: kind.__qualname__):
            sources.append(f"{kind.__module__}.{kind.__qualname__} {_source(kind)}")
        versions = [edition()]
        for package in packages:
            versions.append(f"{package} {version(package)}")
        identity = [living.fingerprint(), living.precision(), code_marks(living)]
        return str([*identity, versions, sources])

    return marks


def _stage_key(marks: str, engine_stage: EngineStage, state: State) -> str:
    """What a compiled stage depends on: the network, the stage, and the shapes of its rows."""
    shapes = list[tuple[object, ...]]()
    for name, dtype, shape in _rows_of(engine_stage, state):
        shapes.append((name, str(dtype), shape))
    return f"{marks} {engine_stage.stage.nodes} {engine_stage.writes} {shapes}"


def _source(kind: type) -> str:
    """Size and time of the file that defines a class; empty for a class without a file."""
    try:
        state = Path(inspect.getfile(kind)).stat()
    except (TypeError, OSError):
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"


def kept_graph(key: str, make: Callable[[], Graph]) -> Graph:
    """A graph from the cache on disk, or made now and kept there."""
    require_onnx()
    content = disk.read(key)
    if content is not None:
        graph = Graph.from_bytes(content)
        if graph is not None:  # None for a damaged file
            return graph
    graph = make()
    with contextlib.suppress(ValueError):  # larger than a protobuf message can be
        disk.write(key, graph.to_bytes())
    return graph


def _require_torch(network: Network) -> None:
    """Raise BadNetwork if a member computes outside of torch and cannot become a graph."""
    for member in network.members:
        kind = outside_torch(network.model_of(member).modules())
        if kind is not None:
            raise BadNetwork(
                f"member {member.name!r} is {kind}, which cannot be written as a graph. "
                f"Use engine='torch'"
            )


def lazy_parts(
    network: Network, schedule: Schedule, device: torch.device, engine: str, made: Making
) -> tuple[EngineStage, ...]:
    """One stage of an engine per stage of the schedule, compiled when the first rows arrive.

    Args:
        network: in eval mode.
        schedule: what is to run.
        device: of the network.
        engine: the engine's name, with everything that decides what `made` returns.
        made: compiles a stage for rows of the shapes in a state. Its third argument names the
            engine and everything else that the result depends on.

    Raises:
        BadNetwork: a member computes outside of torch.
    """
    _require_torch(network)
    kept = cache_of(network)
    marks = network_marks(network, ("torch",))

    def compiled_stage(engine_stage: EngineStage) -> EngineStage:
        def make(state: State) -> Call:
            key = f"{engine} {_stage_key(marks(), engine_stage, state)}"
            return made(engine_stage, state, key)

        function = _CompiledStage(engine_stage, engine, make, kept)
        return replace(engine_stage, functions={"segment": function})

    return tuple(map(compiled_stage, _eager(network, schedule, device)))


def graphs_of(network: Network, schedule: Schedule, state: State) -> Iterator[Graph]:
    """The graph of each stage of a schedule.

    Args:
        network: in eval mode.
        schedule: what is to run.
        state: tensors {name: [B, ...]} such as the graphs will read. It grows while the graphs are
            taken.

    Raises:
        BadNetwork: a member computes outside of torch, or has an operator without an ONNX form.
        BadData: the network fails on these tensors.
    """
    _require_torch(network)
    kept = cache_of(network)
    marks = network_marks(network)
    for engine_stage, pairs in _passing(network, schedule, network.device(), joined=True):
        yield _through(pairs, engine_stage.writes, state, kept, marks)


def linked(schedule: Schedule, engine_stages: Sequence[EngineStage]) -> tuple[EngineStage, ...]:
    """The stages of an engine, with the tensors that each edge carries.

    Which tensors these are follows from what the engine's stages really read and write.
    """
    tensors = {}
    for engine_stage in engine_stages:
        tensors[engine_stage.name] = (engine_stage.reads, engine_stage.writes)
    stages = schedule.linked(tensors).stages
    linked_stages = list[EngineStage]()
    for engine_stage, stage in zip(engine_stages, stages, strict=True):
        linked_stages.append(replace(engine_stage, stage=stage))
    return tuple(linked_stages)


def schedule_of(schedule: Schedule, engine_stages: Sequence[EngineStage]) -> Schedule:
    """The schedule that an engine's stages run: with their tensors, and with joined stages."""
    return replace(schedule, stages=tuple(engine_stage.stage for engine_stage in engine_stages))


def _passing(
    network: Network, schedule: Schedule, device: torch.device, *, joined: bool
) -> Iterator[tuple[EngineStage, Pairs]]:
    """Each stage, with the pairs of its nodes that its graph is written from.

    A pair is the node as the plan runs it, and the same node with its exit and gate in any case.
    The graph of the full node is made once and serves every plan: `only` cuts it down.
    """
    as_planned = _by_name(_eager(network, schedule, device))
    full_stages = tuple(_full(network, stage) for stage in schedule.stages)
    full = _by_name(_eager(network, replace(schedule, stages=full_stages), device))
    run = schedule_of(schedule, [*as_planned.values()])
    if joined:
        run = run.joined()
    for stage in run.stages:
        planned = [as_planned[name] for name in stage.nodes]
        whole = [full[name] for name in stage.nodes]
        yield _as_one(stage, planned), list(zip(planned, whole, strict=True))


def _by_name(engine_stages: Sequence[EngineStage]) -> dict[str, EngineStage]:
    return {engine_stage.name: engine_stage for engine_stage in engine_stages}


def _as_one(stage: Stage, engine_stages: Sequence[EngineStage]) -> EngineStage:
    """Several stages that follow each other, as one."""
    modules = dict[nn.Module, None]()  # a set in order
    free = dict[str, tuple[int, ...]]()
    for engine_stage in engine_stages:
        modules.update(dict.fromkeys(engine_stage.modules))
        free.update(engine_stage.free)
    return replace(engine_stages[-1], stage=stage, modules=tuple(modules), free=free)


def _torch_parts(
    network: Network, schedule: Schedule, device: torch.device
) -> tuple[EngineStage, ...]:
    return kind_of("torch")().open(network, schedule, device)


def _eager(network: Network, schedule: Schedule, device: torch.device) -> tuple[EngineStage, ...]:
    """The stages in torch, which know the dimensions that follow the length of a text."""
    engine_stages = _torch_parts(network, schedule, device)
    if not _texts_of(network):
        return engine_stages
    free = compiled_of(network).once("free dims", lambda: free_dims(network, device))
    with_free = list[EngineStage]()
    for engine_stage in engine_stages:
        dims = {name: free[name] for name in read_by(engine_stage, free)}
        with_free.append(replace(engine_stage, free=dims))
    return tuple(with_free)


def free_dims(network: Network, device: torch.device) -> dict[str, tuple[int, ...]]:
    """By tensor, the dimensions other than the batch that follow the length of a text.

    The network runs on texts of several lengths. A dimension whose size differs between the runs
    follows the length.
    """
    rows = trial_rows(network)
    free = _texts_of(network)
    texts = [name for name in rows if name in free]
    now = rows[texts[0]].shape[1]
    engine_stages = _torch_parts(network, full_schedule(network.topology), device)
    runs = list[State]()
    for length in (now, now - 1, now + 1, now // 2, 2 * now):
        state = dict(rows)
        for name in texts:
            twice = torch.cat([rows[name], rows[name]], 1)  # [B, 2 T, ...]
            state[name] = twice[:, :length]
        with contextlib.suppress(BadData), torch.inference_mode():  # some models take few lengths
            for engine_stage in engine_stages:
                engine_stage.call(state)
            runs.append(state)
    first, *others = runs
    dims = dict[str, tuple[int, ...]]()
    for name, value in first.items():
        dims[name] = _differing(name, value, others)
    return dims


def _texts_of(network: Network) -> set[str]:
    """The inputs whose length is free."""
    texts = set[str]()
    for member in network.members:
        texts.update(member.length)
    return texts


def _differing(name: str, value: torch.Tensor, others: Sequence[State]) -> tuple[int, ...]:
    """The dimensions after the batch in which a tensor has other sizes in other runs."""
    dims = list[int]()
    for dim in range(1, value.dim()):
        for other in others:
            if other[name].shape[dim] != value.shape[dim]:
                dims.append(dim)
                break
    return tuple(dims)


def _full(network: Network, stage: Stage) -> Stage:
    """A stage with its exit and gate, also where a plan leaves them out."""
    return replace(stage, exit=stage.name in network.exits, gate=stage.name in network.gates)


class _CompiledStage(CompiledPiece):
    """A stage that is compiled once for each combination of shapes and types that arrives.

    Args:
        engine_stage: what is compiled.
        engine: the engine's name, part of the key under which calls are kept.
        make: compiles the stage for rows like those in a state.
        kept: what was compiled of the network so far, by any Runner.
    """

    def __init__(
        self, engine_stage: EngineStage, engine: str, make: Callable[[State], Call], kept: Compiled
    ) -> None:
        self.engine_stage = engine_stage
        self.make = make
        self.kept = kept
        self.what: Key = (engine, engine_stage.name, engine_stage.stage.passes, engine_stage.writes)
        self.calls: dict[Rows, Call] = {}
        self.sealed = False

    def __call__(self, state: State) -> State:
        key = _rows_of(self.engine_stage, state)
        call = self.calls.get(key)
        if call is None:
            if self.sealed:
                raise BadData(self._refusal(key))
            call = _once(self.kept, (*self.what, *key), self.engine_stage, lambda: self.make(state))
            self.calls[key] = call
        return call(state)

    def seal(self) -> None:
        """Compile nothing from now on. Rows of other shapes are refused."""
        self.sealed = True

    def compiled_for(self) -> list[dict[str, Wanted]]:
        """What this stage reads, by name, for each kind of rows that it was compiled for."""
        return list(map(_wanted, self.calls))

    def on_arrays(self) -> OnArrays | None:
        """The call on NumPy arrays. None if the engine has no such call, or if the stage was
        compiled for several kinds of rows.
        """
        if len(self.calls) != 1:
            return None
        ((key, call),) = self.calls.items()
        run = getattr(call, "run", None)
        if run is None:
            return None
        inputs = inputs_of(_wanted(key))
        return OnArrays(call.reads, call.writes, run, inputs)  # type: ignore[attr-defined]

    def _refusal(self, key: Rows) -> str:
        known: Rows = next(iter(self.calls), ())
        return (
            f"segment {self.engine_stage.name!r} was compiled for rows of "
            f"{_in_words(known) or 'no kind'}, got {_in_words(key)}. Nothing is compiled while "
            "serving. Use open(..., example=x) with rows like these"
        )


def _wanted(key: Rows) -> dict[str, Wanted]:
    return {name: Wanted(dtype, shape) for name, dtype, shape in key}


def _in_words(key: Rows) -> str:
    """For a message: "x float32 [3, 32, 32], mask int64 [any]"."""
    kinds = list[str]()
    for name, dtype, shape in key:
        sizes = ["any" if size is None else str(size) for size in shape]
        kinds.append(f"{name} {str(dtype).removeprefix('torch.')} [{', '.join(sizes)}]")
    return ", ".join(kinds)


def _rows_of(engine_stage: EngineStage, state: State) -> Rows:
    """Names, types and shapes of the rows that a stage reads from a state."""
    rows = list[tuple[str, torch.dtype, tuple[int | None, ...]]]()
    for name in read_by(engine_stage, state):
        rows.append((name, state[name].dtype, _shape(engine_stage, name, state)))
    return tuple(rows)


def _shape(engine_stage: EngineStage, name: str, state: State) -> tuple[int | None, ...]:
    """The shape of a row; None for a dimension that follows the length of a text."""
    free = engine_stage.free.get(name)
    if not free:
        return tuple(state[name].shape[1:])
    shape = list[int | None](state[name].shape)
    for dim in free:  # dimension 0 is the batch
        shape[dim] = None
    return tuple(shape[1:])


@dataclass(frozen=True)
class _Cached(Generic[Made]):
    """Something made from a stage, and what tells whether the stage's modules have changed since.

    Attributes:
        made: a graph or a call.
        detector: notices changes of the modules.
        modules: weak references to them.
    """

    made: Made
    detector: ChangeDetector
    modules: tuple[ref[nn.Module], ...]

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        """Whether it was made from these modules, and they are unchanged."""
        if len(self.modules) != len(modules):
            return False
        for module_ref, module in zip(self.modules, modules, strict=True):
            if module_ref() is not module:
                return False
        try:
            self.detector.check()
        except StaleRunner:
            return False
        return True


def _once(kept: Compiled, key: Key, engine_stage: EngineStage, make: Callable[[], Made]) -> Made:
    """What is kept under this key, or made now if nothing is kept or the modules have changed."""

    def make_cached() -> _Cached[Made]:
        # The detector comes first, so that a change while `make` runs is noticed.
        detector = ChangeDetector(engine_stage.modules, deep=False)
        return _Cached(make(), detector, tuple(map(ref, engine_stage.modules)))

    def fits(cached: _Cached[Made]) -> bool:
        return cached.fits(engine_stage.modules)

    return kept.once(key, make_cached, fits).made


def _through(
    pairs: Pairs, writes: Sequence[str], state: State, kept: Compiled, marks: Callable[[], str]
) -> Graph:
    """One graph of several nodes that follow each other; it gives `writes`.

    Each node's graph needs example tensors of what it reads. Those between two nodes are computed
    in torch, on up to four rows.
    """
    rows = {name: value[:4].clone() for name, value in state.items()}
    (node, full), *others = pairs  # the first pair, and those that follow
    graph = _graph(node, full, rows, kept, marks)
    for following, full in others:
        with torch.no_grad():
            node.call(rows)
        graph = graph.then(_graph(following, full, rows, kept, marks))
        node = following
    return graph.only(writes) if others else graph


def _graph(
    engine_stage: EngineStage,
    full: EngineStage,
    state: State,
    kept: Compiled,
    marks: Callable[[], str],
) -> Graph:
    """The graph of one node: that of the full node, cut down to what the plan needs."""
    for name in full.reads:
        if name != INPUT and name not in state:
            # The exit or gate reads an earlier exit that the plan does not run.
            full = engine_stage
            break
    reads = read_by(full, state)
    key = ("graph", engine_stage.name, *full.writes, *_rows_of(full, state))

    def from_disk() -> Graph:
        require_onnx()
        key_on_disk = f"node {_stage_key(marks(), full, state)}"
        return kept_graph(key_on_disk, lambda: written(full, reads, state))

    graph: Graph = _once(kept, key, full, from_disk)
    if full.writes == engine_stage.writes:
        return graph
    return graph.only(engine_stage.writes)
