"""Makes the segments of a network: one for a member without cuts, several for a member with cuts.

`partition` takes a cut model apart once. Its pieces are kept until a module or tensor of the
network is replaced or moved, or its code, a setting of a layer or a hook changes. They share the
parameters and buffers of the network, so training in place does not make them stale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import nn

from offramp.errors import BadData, BadNetwork
from offramp.networks.code_marks import cache_of
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
PREFIX = "model."  # before the names of the user's modules in a `Preprocessed`

# The modules and tensors that pieces were made of, and where the data of the tensors is in memory.
Marks = tuple[list[object], list[int]]


def segments_of(network: Network, tried: State | None = None) -> Mapping[str, Segment]:
    """The segment that ends at each node, by the name of the node.

    Args:
        network: whose members are taken apart, if that was not done before.
        tried: inputs on which cut models are exported and checked; None for seeded ones of the
            shapes that the network was made with.

    Returns:
        Segments by node. They are kept with the network and made again when it or its code changes.

    Raises:
        BadNetwork: a cut cannot be run.
    """
    marks = partial(_marks, network)

    def make() -> tuple[Marks, dict[str, Segment]]:
        before = marks()  # a change during the export is then noticed at the next call
        segments = dict[str, Segment]()
        for member in network.members:
            segments.update(_segments(network, member, tried))
        return before, segments

    _, segments = cache_of(network).once("segments", make, lambda cached: _same(cached[0], marks()))
    return segments


def points_of(
    model: nn.Module, preprocess: nn.Module | None, inputs: State, length: Sequence[str] = ()
) -> list[CutPoint]:
    """List the ends of all modules of a model, and what a cut there would carry.

    Args:
        model: in eval mode.
        preprocess: makes the model's input; None where the inputs are ready.
        inputs: an example by name: x, or x/0, x/1, ... and x/<name>.
        length: names of inputs [B, T, ...] whose T may differ from batch to batch.

    Returns:
        The modules in order of execution, then those that never ran.

    Raises:
        BadNetwork: the model cannot be exported.
        BadData: the example does not fit the model.
    """
    args, kwargs = arguments(inputs)
    free = _free(inputs, length)
    if preprocess is None:
        return cut_points(model, args, kwargs, length=free)
    combined = Preprocessed(preprocess.eval(), model)
    with _names_without(PREFIX):
        points = cut_points(combined, args, kwargs, length=free)
    # The modules of the preprocessing are no cuts, so only those of the model remain.
    renamed = list[CutPoint]()
    for point in points:
        if point.name.startswith(PREFIX):
            renamed.append(replace(point, name=point.name.removeprefix(PREFIX)))
    return renamed


def check_cut(model: nn.Module, preprocess: nn.Module | None, inputs: State, cut: str) -> None:
    """Take a model apart at one cut and compare the pieces with it.

    Args:
        model: in eval mode.
        preprocess: makes the model's input; None where the inputs are ready.
        inputs: an example by name: x, or x/0, x/1, ... and x/<name>.
        cut: the name of the module behind which to cut.

    Raises:
        BadNetwork: the pieces differ from the model, or the model mixes rows.
    """
    args, kwargs = arguments(inputs)
    if preprocess is None:
        combined = model
        prefix = ""
    else:
        combined = Preprocessed(preprocess.eval(), model)
        prefix = PREFIX
    with _names_without(prefix):
        parts = partition(combined, args, kwargs, at=[prefix + cut])
        self_check(combined, parts, args, kwargs)


class Preprocessed(nn.Module):
    """A model behind its preprocessing, as one module that can be exported. Neither is copied.

    Args:
        preprocess: makes the model's input; None where the input is ready.
        model: the user's.
        output: the name of the only output that is wanted; None for all of them.
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
        """The output of the model on the preprocessed input."""
        if self.preprocess is None:
            result = self.model(*args, **kwargs)
        else:
            result = self.model(self.preprocess(*args, **kwargs))
        if self.output is None:
            return result
        return logits_in(result, self.output)


@contextlib.contextmanager
def _names_without(prefix: str) -> Iterator[None]:
    """While it is open, errors name modules as the user's model does, without this prefix."""
    try:
        yield
    except (BadNetwork, BadData) as problem:
        raise type(problem)(str(problem).replace(f"'{prefix}", "'")) from problem


def _marks(network: Network) -> Marks:
    """The modules and tensors that pieces are made of, and the addresses of the tensors' data.

    The list keeps a reference to each object, so no new object can get the id of an old one.
    """
    modules = [*network.backbone.modules(), *network.fronts.modules()]
    tensors = [
        *network.backbone.parameters(),
        *network.backbone.buffers(),
        *network.fronts.parameters(),
        *network.fronts.buffers(),
    ]
    return [*modules, *tensors], [tensor.data_ptr() for tensor in tensors]


def _same(before: Marks, now: Marks) -> bool:
    """Whether both have the same objects, and the same data. It runs in every call, hence `map`."""
    if before[1] != now[1] or len(before[0]) != len(now[0]):
        return False
    return all(map(is_, before[0], now[0]))


def _segments(network: Network, member: ModelSpec, tried: State | None) -> dict[str, Segment]:
    """The segments of one member, by node."""
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    modules = list(model.modules())
    if preprocess is not None:
        modules = [*preprocess.modules(), *modules]
    unique = tuple(dict.fromkeys(modules))
    if not member.cuts:
        node = network.topology.node(member.name)
        reads = (node.source or INPUT, *node.reads)
        writes = network.topology.written_by(member.name)
        call = segment_call(network, member.name)
        return {member.name: Segment(member.name, reads, writes, unique, call)}

    parts, names = _taken_apart(network, member, tried)
    owners = _owners(unique, parts.pieces)
    segments = dict[str, Segment]()
    for name, piece, modules_used in zip(member.nodes(), parts.pieces, owners, strict=True):
        reads = tuple(map(names.__getitem__, piece.reads))
        writes = tuple(map(names.__getitem__, piece.writes))
        segments[name] = Segment(name, reads, writes, modules_used, _renamed(piece, names))

    # The first segment also checks the shapes of all inputs, so it reads all of them.
    first = next(iter(segments.values()))
    inputs = [spec.name for spec in member.inputs]
    reads = tuple(dict.fromkeys([*first.reads, *inputs]))
    call = _shape_checked(member, parts.source, first.call)
    segments[first.name] = replace(first, reads=reads, call=call)
    return segments


def _taken_apart(
    network: Network, member: ModelSpec, tried: State | None
) -> tuple[Partition, dict[str, str]]:
    """A cut member in pieces that were checked, and the network's names for their tensors."""
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    inputs = tried or trial_rows(network, member, EXAMPLE_ROWS)
    args, kwargs = arguments(inputs)
    if preprocess is None and member.output is None:
        combined = model
        prefix = ""
    else:
        combined = Preprocessed(preprocess, model, member.output)
        prefix = PREFIX
    at = [prefix + cut for cut in member.cuts]
    with _names_without(prefix):
        try:
            parts = partition(combined, args, kwargs, at=at, length=_free(inputs, member.length))
        except BadNetwork as problem:
            # A Sequential that cannot be exported may still be cut between its own modules.
            stages = None
            if "cannot be exported" in str(problem) and not member.length:
                stages = _stages(model, preprocess, member.cuts)
            if stages is None:
                raise
            parts = staged(stages, args, kwargs, names=at)
        self_check(combined, parts, args, kwargs)

    names = dict(zip(parts.inputs, _ordered(inputs), strict=True))
    for piece, node in zip(parts.pieces, member.nodes(), strict=True):
        # The tap of the piece gets the name of the node, such as `layer1`; further tensors of the
        # tap are `layer1/1`, and tensors that are only carried on are `layer1/+add`.
        for name in piece.writes:
            if piece.name and name.startswith(piece.name):
                suffix = name.removeprefix(piece.name)
            else:
                suffix = f"/+{name}"
            names.setdefault(name, node + suffix)
    names[_logits_of(model, preprocess, member, inputs, parts)] = member.name
    return parts, names


def _logits_of(
    model: nn.Module,
    preprocess: nn.Module | None,
    member: ModelSpec,
    inputs: State,
    parts: Partition,
) -> str:
    """Which output of the pieces has the logits: the first one, where that is not clear."""
    with torch.no_grad():
        outputs = tensors_of(call_model(model, preprocess, inputs), "y")
    logits = "y" if member.output is not None else logits_name(outputs)
    if logits in parts.outputs:
        return logits
    return parts.outputs[0]


def _ordered(inputs: State) -> list[str]:
    """The names of inputs in the order of `partition`: x/0, x/1, ..., then keywords."""
    positional = list[str]()
    keywords = list[str]()
    for name in inputs:
        if name.removeprefix("x/").isdigit():
            positional.append(name)
        else:
            keywords.append(name)
    positional.sort(key=lambda name: int(name.removeprefix("x/")))
    return positional + keywords


def _free(inputs: State, length: Sequence[str]) -> list[str]:
    """The inputs in `length`, under the names that `partition` has for them."""
    args, kwargs = arguments(inputs)
    free = list[str]()
    for inner, outer in zip(inputs_of(args, kwargs), _ordered(inputs), strict=True):
        if outer in length:
            free.append(inner)
    return free


def _shape_checked(
    member: ModelSpec, source: ExportedGraph | None, call: Callable[[State], State]
) -> Callable[[State], State]:
    """A first segment that refuses rows of other shapes than it was exported for."""
    expected = [(spec.name, spec.shape, spec.name in member.length) for spec in member.inputs]
    refusals = dict[int, str | None]()  # by length of the text, as the graph's guards judged it

    def checked(state: State) -> State:
        if torch.compiler.is_exporting():  # lengths are symbols here
            return call(state)
        lengths = set[int]()
        for name, shape, is_text in expected:
            got = tuple(state[name].shape[1:])  # without the batch
            if is_text and got[1:] == shape[1:] and len(got) == len(shape):
                lengths.add(got[0])
            elif got != shape:
                raise BadData(_wrong_shape(name, shape, got, any_length=bool(member.length)))
        if lengths and (why := _unfit(lengths, source, refusals)) is not None:
            raise BadData(why)
        return call(state)

    return checked


def _wrong_shape(
    name: str, shape: tuple[int, ...], got: tuple[int, ...], *, any_length: bool
) -> str:
    """The message for rows of another shape."""
    message = (
        f"rows of {name!r} must have shape {shape}, got {got}. The network was cut for that shape."
    )
    if any_length:
        return message
    return f"{message} For texts of any length, use cut(..., length=(...))."


def _unfit(
    lengths: set[int], source: ExportedGraph | None, refusals: dict[int, str | None]
) -> str | None:
    """Why texts of these lengths cannot be run; None where they can."""
    if len(lengths) > 1:
        return f"all texts of a batch must have the same length, got {sorted(lengths)}"
    (length,) = lengths
    if length not in refusals:
        refusals[length] = None if source is None else source.refused_length(length)
    condition = refusals[length]
    if condition is None:
        return None
    return f"the length T of texts must satisfy {condition} for this model, got T = {length}"


def _stages(
    model: nn.Module, preprocess: nn.Module | None, cuts: Sequence[str]
) -> list[nn.Module] | None:
    """A Sequential as explicit stages, for a model that cannot be exported.

    None where the model is not a plain Sequential, or is cut inside one of its modules.
    """
    order = list(model._modules)
    if type(model) is not nn.Sequential or not set(cuts) < set(order) or order[-1] in cuts:
        return None
    # A stage ends behind each layer whose name is a cut, and behind the last layer.
    stages = list[nn.Module]()
    layers = list[nn.Module]()
    if preprocess is not None:
        layers.append(preprocess)
    for name, layer in model._modules.items():
        assert layer is not None
        layers.append(layer)
        if name in cuts or name == order[-1]:
            stages.append(nn.Sequential(*layers).eval())
            layers = []
    return stages


def _owners(modules: Sequence[nn.Module], pieces: Sequence[Piece]) -> list[tuple[nn.Module, ...]]:
    """For each piece, the modules whose change makes it stale.

    These are the modules whose own tensors the piece uses. A module without tensors in any piece
    counts for the first piece, because that one always runs.
    """
    used = [_ids([*piece.module.parameters(), *piece.module.buffers()]) for piece in pieces]
    owners: list[list[nn.Module]] = [[] for _ in pieces]
    for module in modules:
        ids = _ids([*module._parameters.values(), *module._buffers.values()])
        is_used = False
        for owner, ids_used in zip(owners, used, strict=True):
            if ids & ids_used:
                owner.append(module)
                is_used = True
        if not is_used:
            owners[0].append(module)
    return [tuple(owner) for owner in owners]


def _ids(tensors: Sequence[torch.Tensor | None]) -> set[int]:
    return {id(tensor) for tensor in tensors if tensor is not None}


def _renamed(piece: Piece, names: Mapping[str, str]) -> Callable[[State], State]:
    """A piece that reads and writes tensors under the network's names."""
    reads = [(name, names[name]) for name in piece.reads]
    writes = [(name, names[name]) for name in piece.writes]
    is_renamed = False
    for inner, outer in reads + writes:
        if inner != outer:
            is_renamed = True
    if not is_renamed:
        return piece.call

    def call(state: State) -> State:
        out = piece.call({inner: state[outer] for inner, outer in reads})
        return {outer: out[inner] for inner, outer in writes}

    return call
