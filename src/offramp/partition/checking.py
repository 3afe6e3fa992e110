"""Whether pieces give what the eager model gives, whatever rows are there; and which operation
mixes rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.errors import BadNetwork
from offramp.networks.taps import inputs_of, listening, plain_attention, swapped, tapped, tensors_of
from offramp.partition.graph import WAY_OUT, described
from offramp.partition.pieces import Partition, State

BAND = 1e-4  # design.md, 4.3; sixteen units in the last place where the precision is lower
ROWS = 8
PICKS = ([6, 1, 3], [5, 0, 2, 7, 4, 1, 3], [4])  # a permuted subset, seven rows, one row


def self_check(
    model: nn.Module,
    partition: Partition,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
) -> float:
    """The largest difference between pieces and eager model, divided by max(1, largest magnitude in
    that tensor).

    Eight rows are made of the example (missing ones, and float rows that are all alike, get noise).
    Compared are all of them, a permuted subset, seven, one, what remains when rows are dropped
    after every piece, and text of other lengths where that is free. Raises BadNetwork above 1e-4
    (the cut is named), when an operation mixes rows (it is named), when a piece changes what it was
    given.
    """
    with torch.inference_mode(False), torch.no_grad():
        rows = _rows(inputs_of(args, kwargs))
        try:
            whole = _eager(model, partition, args, kwargs, rows)
        except (IndexError, RuntimeError):  # a category that its column does not have
            rows = _rows(inputs_of(args, kwargs), turned=False)
            whole = _eager(model, partition, args, kwargs, rows)
        for pick in PICKS:
            alone = _eager(model, partition, args, kwargs, _picked(rows, pick))
            if any(_differs(_picked(whole, pick)[name], alone[name]) for name in alone):
                raise BadNetwork(
                    f"{_mixing(partition, rows, pick)} mixes rows: what it gives for a row "
                    f"depends on its batch-mates, "
                    "expected rows to be independent; change it, for no sample can leave such a "
                    "batch"
                )
        runs = [
            _compared(partition, _picked(whole, pick), _picked(rows, pick))
            for pick in ([*range(ROWS)], *PICKS)
        ]
        for other in _of_other_lengths(partition, rows):
            try:
                expected = _eager(model, partition, args, kwargs, other)
            except (RuntimeError, IndexError, ValueError):
                continue  # longer or shorter than the model itself can take
            runs.append(_compared(partition, expected, other, drop=True))
        return max(*runs, _compared(partition, whole, rows, drop=True))


def _of_other_lengths(partition: Partition, rows: State) -> list[State]:
    """The rows with half, most and twice of their text, as far as the model takes such."""
    source = partition.source
    texts = [name for name in rows if source is not None and name in source.texts]
    if source is None or not texts:
        return []
    now = rows[texts[0]].shape[1]
    lengths = [
        length
        for length in (now // 2, now - 1, 2 * now)
        if length > 1 and source.refused_length(length) is None
    ]
    twice = {name: torch.cat([rows[name]] * 2, 1) for name in texts}
    return [rows | {name: twice[name][:, :length] for name in texts} for length in lengths]


def _eager(
    model: nn.Module,
    partition: Partition,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    rows: State,
) -> State:
    """Outputs and taps by name, copied as they come, because later operations may work on them in
    place.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = State()
    marks = {name: modules[name] for name in partition.taps if name in modules}

    def hear(name: str, output: object) -> None:
        found.update({leaf: tensor.clone() for leaf, tensor in tapped(output, name).items()})

    own, named = swapped(args, kwargs or {}, [tensor.clone() for tensor in rows.values()])
    with listening(marks, hear), plain_attention():
        found.update(tensors_of(model(*own, **named), "y"))
    known = {*partition.outputs, *(leaf for leaves in partition.taps.values() for leaf in leaves)}
    return {name: tensor for name, tensor in found.items() if name in known}


def _compared(partition: Partition, whole: State, rows: State, *, drop: bool = False) -> float:
    """The largest difference of what the pieces write; with `drop` the rows turn round and one
    leaves at each cut.
    """
    state = dict(rows)
    left = list(range(len(next(iter(rows.values())))))
    worst = 0.0
    for piece in partition.pieces:
        if piece.name:
            cut = f"the piece that ends at {piece.name!r}"
        else:
            cut = "the last piece"
        before = {name: tensor._version for name, tensor in state.items()}
        written = piece.call(state)
        if changed := [name for name, version in before.items() if state[name]._version != version]:
            raise BadNetwork(
                f"{cut} changes {changed[0]!r} in place, expected it untouched; cut elsewhere, "
                f"{WAY_OUT}"
            )
        for name in written.keys() & whole.keys():
            if _differs(expected := whole[name][left], written[name]):
                raise BadNetwork(
                    f"{cut} gives {name!r} {_distance(expected, written[name]):.2g} away from the "
                    f"model on "
                    f"{len(left)} rows, expected at most {BAND:g}; cut elsewhere, {WAY_OUT}"
                )
            worst = max(worst, _distance(expected, written[name]))
        state.update(written)
        if drop:
            keep = list(range(len(left)))[::-1][: max(1, len(left) - 1)]
            state = _picked(state, keep)
            left = [left[index] for index in keep]
    return worst


def _mixing(partition: Partition, rows: State, pick: list[int]) -> str:
    """The first operation, or for explicit stages the first stage, that gives a row something else
    among others.
    """
    few = _picked(rows, pick)
    if partition.source is None:
        whole = partition.run(rows)
        part = partition.run(few)
        guilty = (
            piece
            for piece in partition.pieces
            for name in piece.writes
            if _differs(whole[name][pick], part[name])
        )
        piece = next(guilty, partition.pieces[-1])
        if piece.name:
            return f"the stage that ends at {piece.name!r}"
        return "the last stage"
    graph = partition.source.graph
    source = partition.source
    seen = [_Recorder(graph).values_of(state) for state in (rows, few)]
    for node in graph.graph.nodes:
        one = seen[0].get(node)
        other = seen[1].get(node)
        if node.op == "call_function" and isinstance(one, Tensor) and isinstance(other, Tensor):
            by_row = one.dim() and len(one) == ROWS and source.obstacle(node) is None
            expected = one[pick] if by_row else one
            if expected.shape == other.shape and _differs(expected, other):
                return described(node)
    return "the model"


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every value."""

    def values_of(self, state: State) -> dict[fx.Node, Any]:
        """Values by node, for inputs in their order."""
        self.found: dict[fx.Node, Any] = {}
        self.run(*(tensor.clone() for tensor in state.values()), enable_io_processing=False)
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _rows(inputs: Mapping[str, Tensor], *, turned: bool = True) -> State:
    """Eight rows [8, ...] of each input.

    Missing rows of integers are put together of those that are there, place by place: columns have
    values of their own, and words with coordinates stay whole. A single row is turned, if `turned`.
    """
    draw = torch.Generator().manual_seed(0)
    found = State()
    for name, given in inputs.items():
        rows = given.detach()[[index % len(given) for index in range(ROWS)]].clone()
        alike = bool((rows == rows[:1]).all())
        for index in range(1 if alike else len(given), ROWS):
            if rows.is_floating_point():
                noise = torch.randn(rows.shape[1:], generator=draw).to(rows)
                rows[index] += noise * (1 if alike else rows.std().nan_to_num(1.0))
            elif rows.dim() > 1 and not alike:
                at = torch.arange(rows.shape[1])
                rows[index] = given[(at + index) % len(given), at]
            elif rows.dim() > 1 and turned:
                rows[index] = rows[index].roll(index, 0 if rows.dim() == 3 else -1)
        found[name] = rows
    return found


def _picked(state: Mapping[str, Tensor], rows: Sequence[int]) -> State:
    return {name: tensor[list(rows)] for name, tensor in state.items()}


def _differs(expected: Tensor, got: Tensor) -> bool:
    lower = [
        torch.finfo(each.dtype).eps * 16 for each in (expected, got) if each.is_floating_point()
    ]
    return _distance(expected, got) > max([BAND, *lower])


def _distance(expected: Tensor, got: Tensor) -> float:
    """Largest difference over max(1, largest finite magnitude); equal infinities and NaN count as
    equal.
    """
    if expected.shape != got.shape:
        return torch.inf
    one = expected.double()
    other = got.double()
    apart = (
        (one - other)
        .abs()
        .masked_fill((one == other) | (one.isnan() & other.isnan()), 0)
        .nan_to_num(torch.inf)
    )
    scale = one.abs().nan_to_num(0, 0, 0)
    return float(apart.max() / scale.max().clamp(min=1)) if apart.numel() else 0.0
