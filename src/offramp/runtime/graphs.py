"""Nodes of a network as graphs: segment, exit and gate together, for engines that compile and for
export.

A graph is made when the first rows arrive, because a ladder does not know what its inputs look
like, and kept while the weights are what they were. Its inputs and outputs have the names of the
tensors that segments pass on.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import is_
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import nn

from offramp._support import cache as disk
from offramp._support.cache import edition
from offramp.errors import BadData, BadNetwork, InvalidArgument, StaleRunner
from offramp.networks.compiled import Compiled, compiled_of
from offramp.networks.inputs import State
from offramp.networks.members import outside_torch
from offramp.networks.network import EngineStage, Network, trial_rows
from offramp.plans.schedule import Edge, Schedule, Stage, full_schedule
from offramp.plans.signature import INPUT
from offramp.runtime.code_marks import code_marks
from offramp.runtime.engine import kind_of
from offramp.runtime.lean import CompiledPiece, OnArrays, Wanted, inputs_of
from offramp.runtime.onnx_graphs import Graph, require_onnx, written
from offramp.runtime.programs import read_by
from offramp.runtime.staleness import ChangeDetector

Call = Callable[[State], State]
Key = tuple[object, ...]
# what a part reads: name, type, shape of a row
Rows = tuple[tuple[str, torch.dtype, tuple[int | None, ...]], ...]
Made = TypeVar("Made")
Making = Callable[[EngineStage, State], Call]
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
    """The parts of an engine that turns graphs into calls on named tensors; each part is one piece,
    "segment".

    Stages at which a plan asks nothing are no parts of their own, if `joined`: they are in the
    graph of the next.
    engine: its name, with all that decides what `compiled` gives. Raises InvalidArgument for a
    device that is no CPU.
    """
    _require_torch(network)
    if device.type != "cpu":
        raise InvalidArgument(
            f"the network is on {device}, and {engine.split()[0]} runs on the cpu here; call "
            f"net.to('cpu')"
        )
    kept = compiled_of(network)  # the parts hold this and not the network, which may go before them
    marks = network_marks(network)
    known = f"parts {marks()} {schedule!r} {joined}"
    whose = ref(network)
    passing = list[tuple[EngineStage, Pairs]]()

    def computed() -> list[tuple[EngineStage, Pairs]]:
        """The parts in torch, from which graphs are written: taken apart only when some graph is
        not on disk.
        """
        if not passing:
            found = whose()
            assert found is not None, "its parts outlive the network"
            passing.extend(_passing(found, schedule, device, joined=joined))
        return passing

    engine_stages = _remembered(network, known)
    if engine_stages is None:
        engine_stages = [engine_stage for engine_stage, _ in computed()]
        _remember(network, known, engine_stages)

    def lazy(number: int, engine_stage: EngineStage) -> EngineStage:
        def make(state: State) -> Call:
            shapes = []
            for name in read_by(engine_stage, state):
                shapes.append((name, str(state[name].dtype), _shape(engine_stage, name, state)))
            key = f"part {marks()} {engine_stage.stage.nodes} {engine_stage.writes} {shapes}"
            return compiled(
                kept_graph(
                    key, lambda: _through(computed()[number][1], engine_stage.writes, state, kept)
                )
            )

        return replace(
            engine_stage, functions={"segment": _CompiledStage(engine_stage, engine, make, kept)}
        )

    return tuple(lazy(number, engine_stage) for number, engine_stage in enumerate(engine_stages))


def _remember(network: Network, key: str, engine_stages: Sequence[EngineStage]) -> None:
    """Keep on disk what parts read, write and watch, so that the next process need not take the
    model apart.
    """
    names = {module: name for name, module in network.named_modules()}
    found = list[Any]()
    for engine_stage in engine_stages:
        if not all(module in names for module in engine_stage.modules):
            return
        free = {name: [*dims] for name, dims in engine_stage.free.items()}
        found.append(
            [asdict(engine_stage.stage), [names[module] for module in engine_stage.modules], free]
        )
    disk.write(key, json.dumps(found).encode())


def _remembered(network: Network, key: str) -> list[EngineStage] | None:
    """The parts of `_remember` without their pieces; None where nothing is kept that fits."""
    content = disk.read(key)
    if content is None:
        return None
    modules = dict(network.named_modules())
    engine_stages = list[EngineStage]()
    try:
        for fields, names, free in json.loads(content):
            edges = list[Edge]()
            for edge in fields.pop("edges"):
                edges.append(
                    Edge(edge["to"], edge["successor"], tuple(edge["carries"]), tuple(edge["via"]))
                )
            plain = dict[str, Any]()
            for name, value in fields.items():
                plain[name] = tuple(value) if isinstance(value, list) else value
            stage = Stage(edges=tuple(edges), **plain)
            dims = {name: tuple(value) for name, value in free.items()}
            engine_stages.append(
                EngineStage(stage, tuple(modules[name] for name in names), {}, dims)
            )
    except (ValueError, TypeError, KeyError, AttributeError):  # it was not written by us
        return None
    return engine_stages


def network_marks(network: Network) -> Callable[[], str]:
    """A function that gives all by which graphs of this network are known on disk; it does not keep
    the network.

    Weights, configuration, the user's code, the versions of what writes graphs, and the sources of
    all classes of modules, as far as files tell.
    """
    whose = ref(network)

    def marks() -> str:
        found = whose()
        assert found is not None, "its parts outlive the network"
        kinds = sorted(
            {type(module) for module in found.modules()}, key=lambda kind: kind.__qualname__
        )
        sources = [f"{kind.__module__}.{kind.__qualname__} {_source(kind)}" for kind in kinds]
        versions = [
            edition(),
            *(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript")),
        ]
        return str([found.fingerprint(), found.precision(), code_marks(found), versions, sources])

    return marks


def _source(kind: type) -> str:
    """The state of the file that a class is written in; nothing for what has no file."""
    try:
        state = Path(inspect.getfile(kind)).stat()
    except (TypeError, OSError):
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"


def kept_graph(key: str, make: Callable[[], Graph]) -> Graph:
    """A graph from the cache on disk, or made now and kept there."""
    require_onnx()
    found = disk.read(key)
    if found is not None and (graph := Graph.from_bytes(found)) is not None:
        return graph
    graph = make()
    with contextlib.suppress(ValueError):  # more than one message of protobuf can hold
        disk.write(key, graph.to_bytes())
    return graph


def _require_torch(network: Network) -> None:
    """Raise BadNetwork for a member that computes outside of torch: there is nothing to write as a
    graph.
    """
    for member in network.members:
        kind = outside_torch(network.model_of(member).modules())
        if kind is not None:
            raise BadNetwork(
                f"member {member.name!r} is {kind}, which cannot be written as a graph; use "
                f"engine='torch'"
            )


def lazy_parts(
    network: Network, schedule: Schedule, device: torch.device, engine: str, made: Making
) -> tuple[EngineStage, ...]:
    """A part per stage, of calls that are made of it and the first rows, and kept while the weights
    are the same.
    """
    _require_torch(network)
    kept = compiled_of(network)
    return tuple(
        replace(
            engine_stage,
            functions={
                "segment": _CompiledStage(engine_stage, engine, partial(made, engine_stage), kept)
            },
        )
        for engine_stage in _eager(network, schedule, device)
    )


def graphs_of(network: Network, schedule: Schedule, state: State) -> Iterator[Graph]:
    """The graphs of the parts of a schedule, for tensors such as those in `state`: {name: [B,
    ...]}, which grows while they are asked for. Raises BadNetwork, BadData.
    """
    _require_torch(network)
    kept = compiled_of(network)
    for engine_stage, pairs in _passing(network, schedule, network.device(), joined=True):
        yield _through(pairs, engine_stage.writes, state, kept)


def linked(schedule: Schedule, engine_stages: Sequence[EngineStage]) -> tuple[EngineStage, ...]:
    """Parts that know what their edges carry, by the names of the tensors that they really read and
    write.
    """
    tensors = {
        engine_stage.name: (engine_stage.reads, engine_stage.writes)
        for engine_stage in engine_stages
    }
    stages = schedule.linked(tensors).stages
    return tuple(
        replace(engine_stage, stage=stage)
        for engine_stage, stage in zip(engine_stages, stages, strict=True)
    )


def schedule_of(schedule: Schedule, engine_stages: Sequence[EngineStage]) -> Schedule:
    """The schedule that parts run: with the tensors of an engine, and with the stages that it
    joined.
    """
    return replace(schedule, stages=tuple(engine_stage.stage for engine_stage in engine_stages))


def _passing(
    network: Network, schedule: Schedule, device: torch.device, *, joined: bool
) -> Iterator[tuple[EngineStage, Pairs]]:
    """Each stage as one part, and the parts of its nodes, each beside the same with all that stands
    there.
    """
    eager = {engine_stage.name: engine_stage for engine_stage in _eager(network, schedule, device)}
    whole = replace(schedule, stages=tuple(_whole(network, stage) for stage in schedule.stages))
    full = {engine_stage.name: engine_stage for engine_stage in _eager(network, whole, device)}
    run = schedule_of(schedule, [*eager.values()])
    for stage in (run.joined() if joined else run).stages:
        pairs = [(eager[name], full[name]) for name in stage.nodes]
        yield _as_one(stage, [engine_stage for engine_stage, _ in pairs]), pairs


def _as_one(stage: Stage, engine_stages: Sequence[EngineStage]) -> EngineStage:
    """Parts one after the other, as the part of a stage."""
    return replace(
        engine_stages[-1],
        stage=stage,
        modules=tuple(
            dict.fromkeys(
                module for engine_stage in engine_stages for module in engine_stage.modules
            )
        ),
        free={
            name: dims for engine_stage in engine_stages for name, dims in engine_stage.free.items()
        },
    )


def _torch_parts(
    network: Network, schedule: Schedule, device: torch.device
) -> tuple[EngineStage, ...]:
    return kind_of("torch")().open(network, schedule, device)


def _eager(network: Network, schedule: Schedule, device: torch.device) -> tuple[EngineStage, ...]:
    found = _torch_parts(network, schedule, device)
    if not any(member.length for member in network.members):
        return found
    free = compiled_of(network).once("free dims", lambda: free_dims(network, device))
    return tuple(
        replace(engine_stage, free={name: free[name] for name in read_by(engine_stage, free)})
        for engine_stage in found
    )


def free_dims(network: Network, device: torch.device) -> dict[str, tuple[int, ...]]:
    """By name the dimensions beside the batch that follow the length of a text, seen by running two
    lengths.
    """
    texts = {name for member in network.members for name in member.length}
    rows = trial_rows(network)
    now = next(value.shape[1] for name, value in rows.items() if name in texts)
    twice = {
        name: torch.cat([value, value], 1) if name in texts else value
        for name, value in rows.items()
    }
    engine_stages = _torch_parts(network, full_schedule(network.topology), device)
    seen = list[State]()
    for length in (now, now - 1, now + 1, now // 2, 2 * now):
        state = {
            name: value[:, :length] if name in texts else value for name, value in twice.items()
        }
        with contextlib.suppress(BadData), torch.inference_mode():  # some models take few lengths
            for engine_stage in engine_stages:
                engine_stage.call(state)
            seen.append(state)
    one, *others = seen
    return {
        name: tuple(
            d
            for d in range(1, value.dim())
            if any(value.shape[d] != other[name].shape[d] for other in others)
        )
        for name, value in one.items()
    }


def _whole(network: Network, stage: Stage) -> Stage:
    """A stage with all that stands there: what a plan does not run is taken out of that graph
    again.
    """
    return replace(stage, exit=stage.name in network.exits, gate=stage.name in network.gates)


class _CompiledStage(CompiledPiece):
    """A part compiled for the shapes and types that arrive, once for each.

    A shape that this piece has met is a look into its own dict. One that it has not may have been
    compiled for another opening of the same network: that is kept until modules of the part change.
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
        names = read_by(self.engine_stage, state)
        key = tuple(
            (name, state[name].dtype, _shape(self.engine_stage, name, state)) for name in names
        )
        call = self.calls.get(key)
        if call is None:
            if self.sealed:
                raise BadData(self._refusal(key))
            call = _once(self.kept, (*self.what, *key), self.engine_stage, lambda: self.make(state))
            self.calls[key] = call
        return call(state)

    def seal(self) -> None:
        """From here on nothing is compiled: rows of other shapes are refused."""
        self.sealed = True

    def compiled_for(self) -> list[dict[str, Wanted]]:
        """By name what this part reads, once for each kind of rows that it was compiled for."""
        return [{name: Wanted(dtype, shape) for name, dtype, shape in key} for key in self.calls]

    def on_arrays(self) -> OnArrays | None:
        """The call on arrays; None where there is none, or where it is compiled for several kinds
        of rows.
        """
        if len(self.calls) != 1:
            return None
        ((key, call),) = self.calls.items()
        run = getattr(call, "run", None)
        if run is None:
            return None
        reads = {name: Wanted(dtype, shape) for name, dtype, shape in key}
        return OnArrays(call.reads, call.writes, run, inputs_of(reads))  # type: ignore[attr-defined]

    def _refusal(self, key: Rows) -> str:
        got = ", ".join(f"{name} {_kind(dtype, shape)}" for name, dtype, shape in key)
        (known, *_) = self.calls or [()]
        expected = ", ".join(f"{name} {_kind(dtype, shape)}" for name, dtype, shape in known)
        return (
            f"segment {self.engine_stage.name!r} was compiled for rows of "
            f"{expected or 'no kind'}, got {got}; nothing "
            "is compiled while serving: open the network again with example=such rows"
        )


def _kind(dtype: torch.dtype, shape: tuple[int | None, ...]) -> str:
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


def _shape(engine_stage: EngineStage, name: str, state: State) -> tuple[int | None, ...]:
    """The shape of a row, None where it follows the length of a text."""
    free = engine_stage.free.get(name, ())
    return tuple(
        None if index in free else size for index, size in enumerate(state[name].shape[1:], 1)
    )


@dataclass(frozen=True)
class _Cached(Generic[Made]):
    """What was made of a part, with that by which a change of the part's modules is noticed."""

    made: Made
    detector: ChangeDetector
    modules: tuple[ref[nn.Module], ...]

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these are the modules that it was made of, and still what they were."""
        if len(self.modules) != len(modules) or not all(
            map(is_, (each() for each in self.modules), modules)
        ):
            return False
        try:
            self.detector.check()
        except StaleRunner:
            return False
        return True


def _once(kept: Compiled, key: Key, engine_stage: EngineStage, make: Callable[[], Made]) -> Made:
    """What was made under this key, made again when the modules of the part are others or have
    changed since.
    """

    def watched() -> _Cached[Made]:
        # before it is made: a change meanwhile is noticed
        detector = ChangeDetector(engine_stage.modules, deep=False)
        return _Cached(make(), detector, tuple(map(ref, engine_stage.modules)))

    return kept.once(key, watched, lambda found: found.fits(engine_stage.modules)).made


def _through(pairs: Pairs, writes: Sequence[str], state: State, kept: Compiled) -> Graph:
    """The graphs of parts as one that gives `writes`; what stands between them is computed in
    torch.
    """
    ((engine_stage, full), *others), rows = (
        pairs,
        {name: value[:4].clone() for name, value in state.items()},
    )
    found = _graph(engine_stage, full, rows, kept)
    for after, full in others:
        with torch.no_grad():
            engine_stage.call(rows)
        found = found.then(_graph(after, full, rows, kept))
        engine_stage = after
    return found.only(writes) if others else found


def _graph(engine_stage: EngineStage, full: EngineStage, state: State, kept: Compiled) -> Graph:
    if any(name not in state for name in full.reads if name != INPUT):
        # a plan that does not run an earlier exit has nothing for the exit or gate that would read
        # it
        full = engine_stage
    reads = read_by(full, state)
    shapes = ((name, state[name].dtype, _shape(full, name, state)) for name in reads)
    key = ("graph", engine_stage.name, *full.writes, *shapes)
    whole: Graph = _once(kept, key, full, lambda: written(full, reads, state))
    if full is engine_stage or full.writes == engine_stage.writes:
        return whole
    return whole.only(engine_stage.writes)
