"""A model as pieces that run one after the other on named tensors.

All pieces read and write one `State`, a dict of named tensors [B, ...]: after every piece it is
updated with what the piece writes, and rows may be dropped from all of it. What no later piece
reads may be forgotten.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp._support.find import unknown
from offramp.errors import BadNetwork
from offramp.networks.taps import inputs_of
from offramp.partition.exporting import exported
from offramp.partition.function import function_of
from offramp.partition.graph import WAY_OUT, ExportedGraph
from offramp.partition.sizes import SymbolicSizes

State = dict[str, Tensor]


@dataclass(frozen=True)
class Piece:
    """What runs between two cuts; `name` is the cut where it ends, "" for the last.

    It reads inputs and what earlier pieces wrote, writes its tap and then what must be carried on
    besides. `module` is the same thing on positional tensors, for engines that compile: (*reads) ->
    (*writes).
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    call: Callable[[State], State]
    module: nn.Module


@dataclass(frozen=True)
class Partition:
    """Pieces in order; the model's inputs and outputs by name ("x", "y", several as "x/0",
    "y/logits"); by cut its tap.

    `source` is the exported graph, None for explicit stages.
    """

    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taps: Mapping[str, tuple[str, ...]]
    source: ExportedGraph | None = None

    def run(self, state: Mapping[str, Tensor]) -> State:
        """All pieces on all rows: inputs by name -> every tensor by name."""
        found = dict(state)
        for piece in self.pieces:
            found.update(piece.call(found))
        return found


def partition(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    at: Sequence[str] | str,
    length: Collection[str] = (),
) -> Partition:
    """Take a model in eval mode apart behind the modules named in `at`, through one `torch.export`.

    args, kwargs: an example call; its tensors [B, ...] are the inputs, everything else is fixed.
    length: inputs [B, T, ...] whose T may be another one in every call, the same in all of them.
    The pieces share the model's parameters and buffers, and the model is left as it was. Placed for
    the device on which the model and the example
    are: after a move, take it apart again. Only the first tensor of a tapped output must be [B,
    ...]; of the others those that are not are left out. Raises UnknownName, BadNetwork (the cut or
    operation, and why), BadData.
    """
    marks = _chosen(model, at)
    source = exported(model, args, kwargs, marks, length)
    for name in marks:
        if (why := unfit(source, name)) is not None:
            raise BadNetwork(f"{name!r} is no cut: it {why}; cut elsewhere, {WAY_OUT}")
    plans = _planned(source, sorted(marks, key=lambda name: source.taps[name].end))
    pieces = tuple(plan.piece(source, ()) for plan in plans)
    if source.writers:
        touched = touched_by(pieces, inputs_of(args, kwargs))
        pieces = tuple(
            plan.piece(source, names) for plan, names in zip(plans, touched, strict=True)
        )
    taps = {plan.name: tuple(_tap(source, plan.name)) for plan in plans[:-1]}
    return Partition(pieces, tuple(source.inputs), tuple(source.outputs), taps, source)


def unfit(source: ExportedGraph, name: str) -> str | None:
    """Why a module's end cannot be tapped, whatever is carried beside it; None when it can."""
    tap = source.taps.get(name)
    if tap is None:
        return "never runs"
    if tap.calls > 1:
        return "runs twice" if tap.calls == 2 else f"runs {tap.calls} times"
    if not tap.leaves:
        return "gives no tensor"
    first = tap.leaves[0][1]
    if first.op == "placeholder":
        return "gives the input back"
    if (why := source.obstacle(first)) is not None:
        return why.replace("carries", "gives", 1)
    if not any(leaf in source.path for _, leaf in tap.leaves):
        return "is not on the path to the output"
    return None


@dataclass(frozen=True)
class _PieceOutline:
    """A piece before it is built: the nodes it runs, what it reads and what it writes, by name."""

    name: str
    inside: set[fx.Node]
    reads: tuple[tuple[str, fx.Node], ...]
    writes: tuple[tuple[str, fx.Node], ...]

    def piece(self, source: ExportedGraph, copied: Collection[str]) -> Piece:
        """The piece; it copies the tensors named in `copied` first, because it works on them in
        place.
        """
        graph = fx.Graph()
        env = dict[fx.Node, Any]()
        values = dict[str, object]()
        for _, node in self.reads:
            env[node] = graph.placeholder(node.name)
        sizes = SymbolicSizes(source, graph, {node: env[node] for _, node in self.reads})
        for name, node in self.reads:
            if name in copied:
                env[node] = graph.call_function(torch.ops.aten.clone.default, (env[node],))
        for node in sorted(self.inside, key=source.order.__getitem__):
            if node.op == "get_attr":
                name, values[name] = source.value(node)
                env[node] = graph.get_attr(name)
            elif (size := source.size(node)) is not None:
                env[node] = sizes.made(size)
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[node] for _, node in self.writes))
        module = fx.GraphModule(values, graph).eval()
        reads, writes = (tuple(name for name, _ in pairs) for pairs in (self.reads, self.writes))
        return Piece(
            self.name, reads, writes, caller(function_of(module, self.name), reads, writes), module
        )


def _planned(source: ExportedGraph, cuts: Sequence[str]) -> list[_PieceOutline]:
    """The pieces between cuts in order. Raises BadNetwork where one is empty or carries what it
    cannot.
    """
    ends = [-1, *(source.taps[cut].end for cut in cuts), len(source.order)]
    # per piece: runs, is given, is needed later
    needs: list[tuple[set[fx.Node], set[fx.Node], set[fx.Node]]] = []
    later = set[fx.Node]()
    # what a piece is given, an earlier one must write
    for number in reversed(range(len(cuts) + 1)):
        start = ends[number]
        end = ends[number + 1]
        asked = _tap(source, cuts[number]) if number < len(cuts) else source.outputs
        own = {
            node for node in later if start < source.order[node] <= end and node.op != "placeholder"
        }
        seeds = [*asked.values(), *own, *source.seeds(start, end)]
        inside, given = source.behind(seeds, after=start, until=end)
        if number and not any(
            node.op == "call_function" and not source.again(node) for node in inside
        ):
            where = repr(cuts[number]) if number < len(cuts) else "the model"
            raise BadNetwork(
                f"{cuts[number - 1]!r} ends where {where} does, expected work between; drop that "
                f"cut"
            )
        for why in filter(None, map(source.obstacle, given if number else ())):
            raise BadNetwork(f"{cuts[number - 1]!r} is no cut: it {why}; cut elsewhere, {WAY_OUT}")
        if source.needs_length(inside) and source.anchor(given, source.length) is None:
            given.add(next(iter(source.texts.values())))
        if not given:
            given = {
                _first(source, cuts[number - 1]) if number else next(iter(source.inputs.values()))
            }
        needs.append((inside, given, own))
        later |= given
    return _named(source, cuts, needs[::-1])


def _named(
    source: ExportedGraph,
    cuts: Sequence[str],
    needs: Sequence[tuple[set[fx.Node], set[fx.Node], set[fx.Node]]],
) -> list[_PieceOutline]:
    """Plans with names: a tensor is called by the tap that it first is, else `<cut>/+<node>`."""
    plans = list[_PieceOutline]()
    names = {node: name for name, node in source.inputs.items()}
    for cut, (inside, given, own) in zip([*cuts, ""], needs, strict=True):
        reads = tuple((names[node], node) for node in sorted(given, key=source.order.__getitem__))
        writes = dict(_tap(source, cut) if cut else source.outputs)
        for name, node in writes.items():
            names.setdefault(node, name)
        for node in sorted(own, key=source.order.__getitem__):
            if (name := names.setdefault(node, f"{cut}/+{node.name}")) not in writes and cut:
                writes[name] = node
        plans.append(_PieceOutline(cut, inside, reads, tuple(writes.items())))
    return plans


def _tap(source: ExportedGraph, cut: str) -> dict[str, fx.Node]:
    """The tensors of a tap that are written: the first, and of the others those that are [B,
    ...].
    """
    first, *others = source.taps[cut].leaves
    return dict([first, *((leaf, node) for leaf, node in others if source.obstacle(node) is None)])


def _first(source: ExportedGraph, cut: str) -> fx.Node:
    return source.taps[cut].leaves[0][1]


def _chosen(model: nn.Module, at: Sequence[str] | str) -> dict[str, nn.Module]:
    """The modules named in `at`, each once. Raises UnknownName with the nearest names."""
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for name in (wanted := [at] if isinstance(at, str) else list(at)):
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.4) or [
                top for top in known if "." not in top
            ]
            raise unknown(name, near, "module of this model")
    require_free(wanted)
    return {name: known[name] for name in wanted}


def require_free(cuts: Sequence[str]) -> None:
    """Raise BadNetwork for a cut with the name of an input or an output."""
    if taken := [name for name in cuts if name.split("/")[0] in ("x", "y")]:
        raise BadNetwork(
            f"a cut is called {taken[0]!r} as inputs (x) and outputs (y) are; rename that module"
        )


def caller(
    run: Callable[..., tuple[Tensor, ...]], reads: tuple[str, ...], writes: tuple[str, ...]
) -> Callable[[State], State]:
    """A function of positional tensors as one of named ones."""
    if len(reads) == 1:
        (only,) = reads
        return lambda state: dict(zip(writes, run(state[only]), strict=True))
    return lambda state: dict(zip(writes, run(*[state[name] for name in reads]), strict=True))


def touched_by(pieces: Sequence[Piece], inputs: Mapping[str, Tensor]) -> list[set[str]]:
    """For each piece the tensors that it would change in place, seen by running it with one row and
    with all.
    """
    touched = [set[str]() for _ in pieces]
    with torch.inference_mode(False), torch.no_grad():
        for rows in (1, None):
            state = {name: tensor[:rows].clone() for name, tensor in inputs.items()}
            for piece, names in zip(pieces, touched, strict=True):
                before = {name: state[name]._version for name in piece.reads}
                state.update(piece.call(state))
                names |= {
                    name for name, version in before.items() if state[name]._version != version
                }
    return touched
