"""Takes a model apart into pieces that run one after the other on named tensors.

All pieces read and write one `State`, a dict of named tensors [B, ...]. After every piece the state
is updated with what the piece writes, and rows may be dropped from all of its tensors. Tensors that
no later piece reads may be forgotten.
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
    """The part of a model between two cuts.

    Attributes:
        name: the cut where it ends; "" for the last piece.
        reads: names of the tensors that it needs: inputs, and what earlier pieces wrote.
        writes: names of the tensors that it gives: its tap, then what else must be carried on.
        call: runs it on named tensors.
        module: the same on positional tensors, (*reads) -> (*writes), for engines that compile.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    call: Callable[[State], State]
    module: nn.Module


@dataclass(frozen=True)
class Partition:
    """The pieces of a model.

    Attributes:
        pieces: in order.
        inputs: names of the model's inputs: "x", or several such as "x/0" and "x/mask".
        outputs: names of the model's outputs: "y", or several such as "y/logits".
        taps: by cut, the names of the tensors of its module.
        source: the exported graph; None for explicit stages.
    """

    pieces: tuple[Piece, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    taps: Mapping[str, tuple[str, ...]]
    source: ExportedGraph | None = None

    def run(self, state: Mapping[str, Tensor]) -> State:
        """Run all pieces on all rows.

        Args:
            state: the inputs by name.

        Returns:
            Every tensor by name, inputs included.
        """
        tensors = dict(state)
        for piece in self.pieces:
            tensors.update(piece.call(tensors))
        return tensors


def partition(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    at: Sequence[str] | str,
    length: Collection[str] = (),
) -> Partition:
    """Take a model apart behind some of its modules, through one `torch.export`.

    The pieces share the model's parameters and buffers, and the model is left as it was. They
    belong to the device of the model and the example; take the model apart again after a move. Only
    the first tensor of a tapped output must be [B, ...]. The others are left out if they are not.

    Args:
        model: in eval mode.
        args: positional arguments of an example call. Its tensors [B, ...] are the inputs, and
            everything else is fixed.
        kwargs: keyword arguments of the same call.
        at: names of the modules to cut behind.
        length: names of inputs [B, T, ...] whose T may differ from call to call, but not within
            one call.

    Returns:
        The pieces in order of execution, one more than cuts.

    Raises:
        UnknownName: the model has no module of that name.
        BadNetwork: a cut or an operation is not possible; the message names it and the reason.
        BadData: the example does not fit the model.
    """
    marks = _chosen(model, at)
    source = exported(model, args, kwargs, marks, length)
    for name in marks:
        why = unfit(source, name)
        if why is not None:
            raise BadNetwork(f"{name!r} is not a cut: it {why}; cut elsewhere, {WAY_OUT}")
    cuts = sorted(marks, key=lambda name: source.taps[name].end)
    outlines = _outlines(source, cuts)
    pieces = [outline.piece(source, ()) for outline in outlines]
    if source.writers:
        # Some operations work in place. Find out which pieces change a tensor that they read, and
        # let these pieces copy it first.
        touched = touched_by(pieces, inputs_of(args, kwargs))
        pieces = []
        for outline, names in zip(outlines, touched, strict=True):
            pieces.append(outline.piece(source, names))
    taps = {cut: tuple(_tap(source, cut)) for cut in cuts}
    return Partition(tuple(pieces), tuple(source.inputs), tuple(source.outputs), taps, source)


def unfit(source: ExportedGraph, name: str) -> str | None:
    """Why the end of a module cannot be tapped, whatever else is carried there.

    Args:
        source: the graph of the model.
        name: of a module that was marked in it.

    Returns:
        A clause that follows the name, such as "runs twice"; None where the module can be tapped.
    """
    tap = source.taps.get(name)
    if tap is None:
        return "never runs"
    if tap.calls > 1:
        return "runs twice" if tap.calls == 2 else f"runs {tap.calls} times"
    if not tap.leaves:
        return "gives no tensor"
    _, first = tap.leaves[0]
    if first.op == "placeholder":
        return "gives the input back"
    why = source.obstacle(first)
    if why is not None:
        return why.replace("carries", "gives", 1)
    for _, leaf in tap.leaves:
        if leaf in source.path:
            return None
    return "is not on the path to the output"


@dataclass(frozen=True)
class _PieceOutline:
    """A piece before it is built: the nodes it runs, what it reads and what it writes, by name."""

    name: str
    inside: set[fx.Node]
    reads: tuple[tuple[str, fx.Node], ...]
    writes: tuple[tuple[str, fx.Node], ...]

    def piece(self, source: ExportedGraph, copied: Collection[str]) -> Piece:
        """Build the piece. It first copies the tensors named in `copied`, which it changes."""
        graph = fx.Graph()
        copies = dict[fx.Node, Any]()  # nodes of the model -> nodes of the piece
        values = dict[str, object]()  # parameters, buffers and constants by name

        # Its inputs. The sizes B and T are read from them before they are copied.
        for _, node in self.reads:
            copies[node] = graph.placeholder(node.name)
        sizes = SymbolicSizes(source, graph, dict(copies))
        for name, node in self.reads:
            if name in copied:
                clone = torch.ops.aten.clone.default
                copies[node] = graph.call_function(clone, (copies[node],))

        # Its operations, in the order of the model.
        for node in sorted(self.inside, key=source.order.__getitem__):
            size = source.size(node)
            if node.op == "get_attr":
                name, values[name] = source.value(node)
                copies[node] = graph.get_attr(name)
            elif size is not None:
                copies[node] = sizes.made(size)
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for _, node in self.writes))

        module = fx.GraphModule(values, graph).eval()
        reads = tuple(dict(self.reads))  # the names alone
        writes = tuple(dict(self.writes))
        call = caller(function_of(module, self.name), reads, writes)
        return Piece(self.name, reads, writes, call, module)


@dataclass(frozen=True)
class _Needs:
    """What runs in a piece, what it must be given, and what later pieces need of it."""

    inside: set[fx.Node]
    given: set[fx.Node]
    carried: set[fx.Node]


def _outlines(source: ExportedGraph, cuts: Sequence[str]) -> list[_PieceOutline]:
    """The pieces between cuts, in order.

    A piece must write its tap, and whatever later pieces need of the tensors that are computed in
    it. So the pieces are outlined from the last to the first.

    Raises BadNetwork where a piece is empty or would carry something without rows.
    """
    # Piece number k runs the operations behind position ends[k], up to position ends[k + 1].
    ends = [-1]
    for cut in cuts:
        ends.append(source.taps[cut].end)
    ends.append(len(source.order))
    needs = list[_Needs]()
    later = set[fx.Node]()  # what later pieces must be given
    for number in reversed(range(len(cuts) + 1)):
        start = ends[number]
        end = ends[number + 1]

        # What later pieces need, and is computed here.
        carried = set[fx.Node]()
        for node in later:
            if start < source.order[node] <= end and node.op != "placeholder":
                carried.add(node)

        # Walk back from everything that the piece writes to everything that it needs.
        tap = _tap(source, cuts[number]) if number < len(cuts) else source.outputs
        seeds = [*tap.values(), *carried, *source.seeds(start, end)]
        inside, given = source.behind(seeds, after=start, until=end)
        if number:
            _require_work(source, cuts, number, inside)
            _require_rows(source, cuts[number - 1], given)

        # A piece must read at least one tensor with B rows, and one with T if it uses T.
        if source.needs_length(inside) and source.anchor(given, source.length) is None:
            given.add(next(iter(source.texts.values())))
        if not given and number:
            _, first = source.taps[cuts[number - 1]].leaves[0]
            given = {first}
        elif not given:
            given = {next(iter(source.inputs.values()))}
        needs.append(_Needs(inside, given, carried))
        later |= given
    needs.reverse()
    return _named(source, cuts, needs)


def _require_work(
    source: ExportedGraph, cuts: Sequence[str], number: int, inside: set[fx.Node]
) -> None:
    """Raise BadNetwork for a piece without operations of its own: two cuts at the same place."""
    for node in inside:
        if node.op == "call_function" and not source.again(node):
            return
    where = repr(cuts[number]) if number < len(cuts) else "the model"
    raise BadNetwork(
        f"{cuts[number - 1]!r} ends where {where} does, but two cuts need work between them; drop "
        f"that cut"
    )


def _require_rows(source: ExportedGraph, cut: str, given: set[fx.Node]) -> None:
    """Raise BadNetwork for a cut that must carry a value whose rows cannot be selected."""
    for node in given:
        why = source.obstacle(node)
        if why is not None:
            raise BadNetwork(f"{cut!r} is not a cut: it {why}; cut elsewhere, {WAY_OUT}")


def _named(
    source: ExportedGraph, cuts: Sequence[str], needs: Sequence[_Needs]
) -> list[_PieceOutline]:
    """The outlines with names for all tensors.

    A tensor has the name of the first tap that it belongs to. A tensor that is only carried on is
    called `<cut>/+<node>`.
    """
    outlines = list[_PieceOutline]()
    names = dict(zip(source.inputs.values(), source.inputs, strict=True))  # node -> name
    for cut, need in zip([*cuts, ""], needs, strict=True):
        reads = list[tuple[str, fx.Node]]()
        for node in sorted(need.given, key=source.order.__getitem__):
            reads.append((names[node], node))
        writes = dict(_tap(source, cut) if cut else source.outputs)
        for name, node in writes.items():
            names.setdefault(node, name)
        for node in sorted(need.carried, key=source.order.__getitem__):
            name = names.setdefault(node, f"{cut}/+{node.name}")
            if cut and name not in writes:
                writes[name] = node
        outlines.append(_PieceOutline(cut, need.inside, tuple(reads), tuple(writes.items())))
    return outlines


def _tap(source: ExportedGraph, cut: str) -> dict[str, fx.Node]:
    """The tensors of a tap that are written: the first one, and the others that are [B, ...]."""
    (first_name, first), *others = source.taps[cut].leaves
    tap = {first_name: first}
    for name, node in others:
        if source.obstacle(node) is None:
            tap[name] = node
    return tap


def _chosen(model: nn.Module, at: Sequence[str] | str) -> dict[str, nn.Module]:
    """The modules named in `at`, each once. Raises UnknownName with the nearest names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop("", None)  # the model itself
    names = [at] if isinstance(at, str) else list(at)
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 3, 0.4)
            if not near:
                near = [top for top in modules if "." not in top]
            raise unknown(name, near, "module of this model")
    require_free(names)
    return {name: modules[name] for name in names}


def require_free(cuts: Sequence[str]) -> None:
    """Check that no cut has a name that belongs to inputs or outputs.

    Args:
        cuts: names of modules.

    Raises:
        BadNetwork: a cut is called x or y, or is inside a module of this name.
    """
    for name in cuts:
        if name.split("/")[0] in ("x", "y"):
            raise BadNetwork(
                f"a cut is called {name!r}, but x and y are the names of inputs and outputs; "
                f"rename that module"
            )


def caller(
    run: Callable[..., tuple[Tensor, ...]], reads: tuple[str, ...], writes: tuple[str, ...]
) -> Callable[[State], State]:
    """Turn a function of positional tensors into one of named tensors.

    Args:
        run: (*reads) -> (*writes).
        reads: names of its arguments, in order.
        writes: names of its results, in order.

    Returns:
        A function from a state with at least `reads` to a state with `writes`.
    """
    if len(reads) == 1:
        (only,) = reads
        return lambda state: dict(zip(writes, run(state[only]), strict=True))
    return lambda state: dict(zip(writes, run(*[state[name] for name in reads]), strict=True))


def touched_by(pieces: Sequence[Piece], inputs: Mapping[str, Tensor]) -> list[set[str]]:
    """Find the tensors that each piece changes in place, by running all pieces.

    They run with one row and with all rows, because a model can work differently on a single row.

    Args:
        pieces: in order, none of which copies its inputs.
        inputs: the example [B, ...] by name.

    Returns:
        For each piece the names of the tensors that it reads and changes.
    """
    touched = [set[str]() for _ in pieces]
    with torch.inference_mode(False), torch.no_grad():
        for rows in (1, None):
            # [B, ...] -> [1, ...] or [B, ...]
            state = {name: tensor[:rows].clone() for name, tensor in inputs.items()}
            for piece, names in zip(pieces, touched, strict=True):
                before = dict(state)
                versions = versions_of(before)
                state.update(piece.call(state))
                names.update(changed_since(versions, before))
    return touched


def versions_of(state: State) -> dict[str, int]:
    """How often each tensor was changed in place, as torch counts it."""
    return {name: tensor._version for name, tensor in state.items()}


def changed_since(versions: Mapping[str, int], state: State) -> list[str]:
    """The names of the tensors that were changed in place since `versions_of`."""
    changed = list[str]()
    for name, version in versions.items():
        if state[name]._version != version:
            changed.append(name)
    return changed
