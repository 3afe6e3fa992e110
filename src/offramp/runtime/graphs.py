"""Nodes of a network as graphs: segment, exit and gate together, for engines that compile and for export.

A graph is made when the first rows arrive, because a ladder does not know what its inputs look like, and kept while
the weights are what they were. Its inputs and outputs have the names of the tensors that segments pass on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from operator import is_
from typing import Generic, TypeVar
from weakref import ref

import torch
from torch import nn

from offramp.errors import BadData, BadInput, BadNetwork, OpenAgain
from offramp.networks.compiled import Compiled, compiled_of
from offramp.networks.inputs import State
from offramp.networks.members import outside_torch
from offramp.networks.network import Network, Part, trial_rows
from offramp.plans.chain import Step, passages
from offramp.plans.signature import INPUT
from offramp.runtime.engine import kind_of
from offramp.runtime.onnx_graphs import Graph, written
from offramp.runtime.programs import read_by
from offramp.runtime.staleness import Watch

Call = Callable[[State], State]
Key = tuple[object, ...]
Made = TypeVar("Made")
Making = Callable[[Part, State], Call]
Pairs = Sequence[tuple[Part, Part]]


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
    _require_torch(network)
    if device.type != "cpu":
        raise BadInput(f"the network is on {device}, and {engine.split()[0]} runs on the cpu here; call net.to('cpu')")
    groups = passages(steps) if joined else tuple((step,) for step in steps)
    kept = compiled_of(network)  # the parts hold this and not the network, which may go before them

    def lazy(part: Part, pairs: Pairs) -> Part:
        def make(state: State) -> Call:
            return compiled(_through(pairs, part.writes, state, kept))

        return replace(part, pieces={"segment": _Piece(part, engine, make, kept)})

    return tuple(lazy(part, pairs) for part, pairs in _passing(network, groups, device))


def _require_torch(network: Network) -> None:
    """Raise BadNetwork for a member that computes outside of torch: there is nothing to write as a graph."""
    for rung in network.rungs:
        kind = outside_torch(network.model_of(rung).modules())
        if kind is not None:
            raise BadNetwork(f"member {rung.name!r} is {kind}, which cannot be written as a graph; use engine='torch'")


def lazy_parts(
    network: Network, steps: Sequence[Step], device: torch.device, engine: str, made: Making
) -> tuple[Part, ...]:
    """A part per step, of calls that are made of it and the first rows, and kept while the weights are the same."""
    _require_torch(network)
    kept = compiled_of(network)
    return tuple(
        replace(part, pieces={"segment": _Piece(part, engine, partial(made, part), kept)})
        for part in _eager(network, steps, device)
    )


def graphs_of(network: Network, steps: Sequence[Step], state: State) -> Iterator[Graph]:
    """The graphs of the parts of `steps`, for tensors such as those in `state`: {name: [B, ...]}, which grows while
    they are asked for. Raises BadNetwork, BadData.
    """
    _require_torch(network)
    kept = compiled_of(network)
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
        free={name: dims for part in parts for name, dims in part.free.items()},
    )


def _torch_parts(network: Network, steps: Sequence[Step], device: torch.device) -> tuple[Part, ...]:
    return kind_of("torch")().open(network, steps, device)


def _eager(network: Network, steps: Sequence[Step], device: torch.device) -> tuple[Part, ...]:
    found = _torch_parts(network, steps, device)
    if not any(rung.length for rung in network.rungs):
        return found
    free = compiled_of(network).once("free dims", lambda: free_dims(network, device))
    return tuple(replace(part, free={name: free[name] for name in read_by(part, free)}) for part in found)


def free_dims(network: Network, device: torch.device) -> dict[str, tuple[int, ...]]:
    """By name the dimensions beside the batch that follow the length of a text, seen by running two lengths."""
    texts, rows = {name for rung in network.rungs for name in rung.length}, trial_rows(network)
    now = next(value.shape[1] for name, value in rows.items() if name in texts)
    twice = {name: torch.cat([value, value], 1) if name in texts else value for name, value in rows.items()}
    parts, seen = _torch_parts(network, network.chain.walk(network.chain.gates), device), list[State]()
    for length in (now, now - 1, now + 1, now // 2, 2 * now):
        state = {name: value[:, :length] if name in texts else value for name, value in twice.items()}
        with contextlib.suppress(BadData), torch.inference_mode():  # some models take few lengths
            for part in parts:
                part.call(state)
            seen.append(state)
    one, *others = seen
    return {
        name: tuple(d for d in range(1, value.dim()) if any(value.shape[d] != other[name].shape[d] for other in others))
        for name, value in one.items()
    }


def _whole(network: Network, name: str) -> Step:
    """A node with all that stands there: what a step does not run is taken out of that graph again."""
    return Step(name, exit=True, gate=name in network.gates, last=name not in network.gates)


class _Piece:
    """A part compiled for the shapes and types that arrive, once for each.

    A shape that this piece has met is a look into its own dict. One that it has not may have been compiled for
    another opening of the same network: that is kept until modules of the part change.
    """

    def __init__(self, part: Part, engine: str, make: Callable[[State], Call], kept: Compiled) -> None:
        self.part, self.make, self.kept = part, make, kept
        self.what: Key = (engine, part.step.name, part.passes, part.writes)
        self.calls: dict[Key, Call] = {}

    def __call__(self, state: State) -> State:
        names = read_by(self.part, state)
        key = tuple((name, state[name].dtype, _shape(self.part, name, state)) for name in names)
        call = self.calls.get(key)
        if call is None:
            call = _once(self.kept, (*self.what, *key), self.part, lambda: self.make(state))
            self.calls[key] = call
        return call(state)


def _shape(part: Part, name: str, state: State) -> tuple[int | None, ...]:
    """The shape of a row, None where it follows the length of a text."""
    free = part.free.get(name, ())
    return tuple(None if place in free else size for place, size in enumerate(state[name].shape[1:], 1))


@dataclass(frozen=True)
class _Watched(Generic[Made]):
    """What was made of a part, with that by which a change of the part's modules is noticed."""

    made: Made
    watch: Watch
    modules: tuple[ref[nn.Module], ...]

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        """Whether these are the modules that it was made of, and still what they were."""
        if len(self.modules) != len(modules) or not all(map(is_, (each() for each in self.modules), modules)):
            return False
        try:
            self.watch.check()
        except OpenAgain:
            return False
        return True


def _once(kept: Compiled, key: Key, part: Part, make: Callable[[], Made]) -> Made:
    """What was made under this key, made again when the modules of the part are others or have changed since."""

    def watched() -> _Watched[Made]:
        watch = Watch(part.modules, deep=False)  # before it is made: a change meanwhile is noticed
        return _Watched(make(), watch, tuple(map(ref, part.modules)))

    return kept.once(key, watched, lambda found: found.fits(part.modules)).made


def _through(pairs: Pairs, writes: Sequence[str], state: State, kept: Compiled) -> Graph:
    """The graphs of parts as one that gives `writes`; what stands between them is computed in torch."""
    ((part, full), *others), rows = pairs, {name: value[:4].clone() for name, value in state.items()}
    found = _graph(part, full, rows, kept)
    for after, full in others:
        with torch.no_grad():
            part.call(rows)
        found, part = found.then(_graph(after, full, rows, kept)), after
    return found.only(writes) if others else found


def _graph(part: Part, full: Part, state: State, kept: Compiled) -> Graph:
    step = part.step
    if any(name not in state for name in full.reads if name != INPUT):
        full = part  # a plan that does not run an earlier exit has nothing for the exit or gate that would read it
    reads = read_by(full, state)
    shapes = ((name, state[name].dtype, _shape(full, name, state)) for name in reads)
    key = ("graph", step.name, *full.writes, *shapes)
    whole: Graph = _once(kept, key, full, lambda: written(full, reads, state))
    return whole if full is part or full.writes == part.writes else whole.only(part.writes)
