"""The segments of a network: a whole member as it stands, a cut one taken apart by `partition`.

A model is taken apart once, and the pieces are kept while no module or tensor of the network is
replaced or moved: they share its parameters and buffers, so that training in place does not make
them stale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import is_
from typing import Any

import torch
from torch import nn

from offramp.errors import BadData, BadNetwork
from offramp.networks.compiled import compiled_of
from offramp.networks.inputs import State, arguments, call_model
from offramp.networks.members import ModelSpec
from offramp.networks.network import Network, Segment, trial_rows
from offramp.networks.taps import logits_in, logits_name, tensors_of
from offramp.networks.walking import segment_call
from offramp.partition import (
    CutPoint,
    ExportedGraph,
    Partition,
    Piece,
    cut_points,
    inputs_of,
    partition,
    self_check,
    staged,
)
from offramp.plans.signature import INPUT

EXAMPLE_ROWS = 4
PREFIX = "model."  # of names in a `Fronted`

Marks = tuple[list[object], list[int]]


def segments_of(network: Network, tried: State | None = None) -> Mapping[str, Segment]:
    """The segment that ends at each node, by the node's name. Raises BadNetwork for a cut that
    cannot be run.

    tried: rows on which cut models are exported and checked; else seeded ones of the same shapes.
    """
    marks = partial(_marks, network)

    def make() -> tuple[Marks, dict[str, Segment]]:
        before = marks()  # what changes meanwhile is noticed at the next call
        members = [_segments(network, member, tried) for member in network.members]
        return before, {node: segment for member in members for node, segment in member.items()}

    return compiled_of(network).once("segments", make, lambda kept: _same(kept[0], marks()))[1]


def points_of(
    model: nn.Module, preprocess: nn.Module | None, inputs: State, length: Sequence[str] = ()
) -> list[CutPoint]:
    """Every module of a model in the order in which they end, with what a cut there would carry."""
    args, kwargs = arguments(inputs)
    free = _free(inputs, length)
    if preprocess is None:
        return cut_points(model, args, kwargs, length=free)
    with _own_names(PREFIX):
        points = cut_points(Preprocessed(preprocess.eval(), model), args, kwargs, length=free)
    return [
        replace(point, name=point.name.removeprefix(PREFIX))
        for point in points
        if point.name.startswith(PREFIX)
    ]


def check_cut(model: nn.Module, preprocess: nn.Module | None, inputs: State, cut: str) -> None:
    """Take a model apart at one cut and compare. Raises BadNetwork, above all for a model that
    mixes rows.
    """
    args, kwargs = arguments(inputs)
    whole, prefix = (
        (model, "") if preprocess is None else (Preprocessed(preprocess.eval(), model), PREFIX)
    )
    with _own_names(prefix):
        self_check(whole, partition(whole, args, kwargs, at=[prefix + cut]), args, kwargs)


class Preprocessed(nn.Module):
    """A model behind its preprocessing, as one module to export; both stay where they are.

    Args:
        preprocess: what makes the model's input; None where the input is ready.
        model: the user's.
        output: the only one of the model's outputs that is wanted; None for all of them.
    """

    def __init__(
        self, preprocess: nn.Module | None, model: nn.Module, output: str | None = None
    ) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model
        self.output = output
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for what the preprocessing makes of the input."""
        if self.preprocess is None:
            found = self.model(*args, **kwargs)
        else:
            found = self.model(self.preprocess(*args, **kwargs))
        return found if self.output is None else logits_in(found, self.output)


@contextlib.contextmanager
def _own_names(prefix: str) -> Iterator[None]:
    """While it lasts, what is refused is told with the names that modules have in the user's
    model.
    """
    try:
        yield
    except (BadNetwork, BadData) as problem:
        raise type(problem)(str(problem).replace(f"'{prefix}", "'")) from problem


def _marks(network: Network) -> Marks:
    """The modules and tensors that the pieces were made of; held on to, so that no other takes
    their identity.
    """
    backbone: list[object] = [*network.backbone.modules(), *network.fronts.modules()]
    tensors = [
        tensor
        for part in (network.backbone, network.fronts)
        for tensor in (*part.parameters(), *part.buffers())
    ]
    return [*backbone, *tensors], [tensor.data_ptr() for tensor in tensors]


def _same(one: Marks, other: Marks) -> bool:
    return one[1] == other[1] and len(one[0]) == len(other[0]) and all(map(is_, one[0], other[0]))


def _segments(network: Network, member: ModelSpec, tried: State | None) -> dict[str, Segment]:
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    modules = tuple(
        dict.fromkeys([*(preprocess.modules() if preprocess is not None else ()), *model.modules()])
    )
    if not member.cuts:
        node = network.topology.node(member.name)
        reads = (node.source or INPUT, *node.reads)
        writes = network.topology.written_by(member.name)
        return {
            member.name: Segment(
                member.name, reads, writes, modules, segment_call(network, member.name)
            )
        }
    parts, names = _taken_apart(network, member, tried)
    owners = _owners(modules, parts.pieces)
    segments = {
        node: Segment(
            node,
            tuple(names[name] for name in piece.reads),
            tuple(names[name] for name in piece.writes),
            owned,
            _renamed(piece, names),
        )
        for node, piece, owned in zip(member.nodes(), parts.pieces, owners, strict=True)
    }
    first = next(iter(segments.values()))
    reads = tuple(dict.fromkeys([*first.reads, *(one.name for one in member.inputs)]))
    segments[first.name] = replace(
        first, reads=reads, call=_fitting(member, parts.source, first.call)
    )
    return segments


def _taken_apart(
    network: Network, member: ModelSpec, tried: State | None
) -> tuple[Partition, dict[str, str]]:
    """A cut member in pieces, checked; and the network's names for their tensors."""
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    inputs = tried or trial_rows(network, member, EXAMPLE_ROWS)
    args, kwargs = arguments(inputs)
    bare = preprocess is None and member.output is None
    whole = model if bare else Preprocessed(preprocess, model, member.output)
    prefix = "" if bare else PREFIX
    at = [prefix + cut for cut in member.cuts]
    with _own_names(prefix):
        try:
            parts = partition(whole, args, kwargs, at=at, length=_free(inputs, member.length))
        except BadNetwork as problem:
            takes = "cannot be exported" in str(problem) and not member.length
            stages = _stages(model, preprocess, member.cuts) if takes else None
            if stages is None:
                raise
            parts = staged(stages, args, kwargs, names=at)
        self_check(whole, parts, args, kwargs)
    names = dict(zip(parts.inputs, _ordered(inputs), strict=True))
    for piece, node in zip(parts.pieces, member.nodes(), strict=True):
        for name in piece.writes:  # `layer1`, and `layer1/1` or `layer1/+add` beside it
            if piece.name and name.startswith(piece.name):
                beside = name[len(piece.name) :]
            else:
                beside = f"/+{name}"
            names.setdefault(name, node + beside)
    with torch.no_grad():
        outputs = tensors_of(call_model(model, preprocess, inputs), "y")
    logits = "y" if member.output is not None else logits_name(outputs)
    names[logits if logits in parts.outputs else parts.outputs[0]] = member.name
    return parts, names


def _ordered(inputs: State) -> list[str]:
    """The names of inputs in the order in which `partition` has them: positional ones, then
    keywords.
    """
    given = sorted(
        (name for name in inputs if name.rpartition("/")[2].isdigit()),
        key=lambda name: int(name[2:]),
    )
    return given + [name for name in inputs if name not in given]


def _free(inputs: State, length: Sequence[str]) -> list[str]:
    """Those of `length` by the names that `partition` has for them."""
    args, kwargs = arguments(inputs)
    return [
        inner
        for inner, outer in zip(inputs_of(args, kwargs), _ordered(inputs), strict=True)
        if outer in length
    ]


def _fitting(
    member: ModelSpec, source: ExportedGraph | None, call: Callable[[State], State]
) -> Callable[[State], State]:
    """A first segment that refuses rows of other shapes than those that it was exported for."""
    expected = [(one.name, one.shape, one.name in member.length) for one in member.inputs]
    known = dict[int, str | None]()  # lengths that were asked about

    def fitting(state: State) -> State:
        if torch.compiler.is_exporting():  # lengths are symbols here
            return call(state)
        lengths = set[int]()
        for name, shape, free in expected:
            got = tuple(state[name].shape[1:])
            if free and got[1:] == shape[1:] and len(got) == len(shape):
                lengths.add(got[0])
            elif got != shape:
                raise BadData(
                    f"rows of {name!r} have shape {got}, expected {shape}: the segments are "
                    f"exported for that; give "
                    "such rows"
                    + (
                        ""
                        if member.length
                        else ", or cut with length=(...) where it is the length of a text"
                    )
                )
        if lengths and (why := _unfit(lengths, source, known)) is not None:
            raise BadData(f"the texts {why}; give others")
        return call(state)

    return fitting


def _unfit(
    lengths: set[int], source: ExportedGraph | None, known: dict[int, str | None]
) -> str | None:
    if len(lengths) > 1:
        return f"have lengths {sorted(lengths)}, expected one and the same in all inputs of a batch"
    (length,) = lengths
    if length not in known:
        known[length] = source.refused_length(length) if source is not None else None
    if known[length] is None:
        return None
    return f"have length T = {length}, expected {known[length]} of this model"


def _stages(
    model: nn.Module, preprocess: nn.Module | None, cuts: Sequence[str]
) -> list[nn.Module] | None:
    """The way out for what cannot be exported: a Sequential that is cut between its own modules, as
    explicit stages.
    """
    order = list(model._modules)
    if type(model) is not nn.Sequential or not set(cuts) < set(order) or order[-1] in cuts:
        return None
    ends = [*sorted(order.index(cut) + 1 for cut in cuts), len(order)]
    parts = [*model.children()]
    stages = [parts[start:end] for start, end in pairwise([0, *ends])]
    if preprocess is not None:
        stages[0].insert(0, preprocess)
    return [nn.Sequential(*stage).eval() for stage in stages]


def _owners(modules: Sequence[nn.Module], pieces: Sequence[Piece]) -> list[tuple[nn.Module, ...]]:
    """For each piece the modules whose own tensors it uses; the first one, which always runs, has
    all others too.
    """
    used = [
        {id(tensor) for tensor in (*piece.module.parameters(), *piece.module.buffers())}
        for piece in pieces
    ]
    found: list[list[nn.Module]] = [[] for _ in pieces]
    for module in modules:
        own = {
            id(tensor)
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        homes = [index for index, ids in enumerate(used) if own & ids] or [0]
        for index in homes:
            found[index].append(module)
    return [tuple(own) for own in found]


def _renamed(piece: Piece, names: Mapping[str, str]) -> Callable[[State], State]:
    """A piece that reads and writes the network's names for tensors."""
    if all(names[name] == name for name in (*piece.reads, *piece.writes)):
        return piece.call
    reads = [(name, names[name]) for name in piece.reads]
    writes = [(name, names[name]) for name in piece.writes]

    def call(state: State) -> State:
        out = piece.call({inner: state[outer] for inner, outer in reads})
        return {outer: out[inner] for inner, outer in writes}

    return call
