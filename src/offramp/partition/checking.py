"""Checks that pieces compute what the eager model computes, whatever rows are in the batch.

It also finds the operation that mixes rows, if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.errors import BadNetwork
from offramp.networks.taps import inputs_of, listening, plain_attention, swapped, tapped, tensors_of
from offramp.partition.graph import WAY_OUT, described
from offramp.partition.pieces import Partition, Piece, State, changed_since, versions_of

# The largest difference that is allowed (design.md, 4.3); for types of lower precision it is
# sixteen units in the last place.
BAND = 1e-4
ROWS = 8
PICKS = ([6, 1, 3], [5, 0, 2, 7, 4, 1, 3], [4])  # a permuted subset, seven rows, one row


def self_check(
    model: nn.Module,
    partition: Partition,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None = None,
) -> float:
    """Compare pieces with the eager model on different selections of rows.

    The example is extended to eight rows; missing rows, and float rows that are all equal, get
    noise. The selections are all eight rows, a permuted subset, seven rows and one row. Then one
    row is dropped after every piece. Texts of other lengths follow where the length is free.

    Args:
        model: in eval mode.
        partition: the pieces of this model.
        args: positional arguments of an example call.
        kwargs: keyword arguments of the same call.

    Returns:
        The largest difference of any tensor, divided by max(1, its largest magnitude).

    Raises:
        BadNetwork: a difference is above 1e-4 (the message names the cut), an operation mixes rows
            (it is named), or a piece changes one of its inputs.
    """
    with torch.inference_mode(False), torch.no_grad():
        rows = _rows(inputs_of(args, kwargs))
        try:
            expected = _eager(model, partition, args, kwargs, rows)
        except (IndexError, RuntimeError):
            # Rolled columns can hold a category that their new column does not have.
            rows = _rows(inputs_of(args, kwargs), rolled=False)
            expected = _eager(model, partition, args, kwargs, rows)

        # The model itself must give a row the same result among other rows.
        for pick in PICKS:
            alone = _eager(model, partition, args, kwargs, _picked(rows, pick))
            if _any_differs(_picked(expected, pick), alone):
                raise BadNetwork(
                    f"{_mixing(partition, rows, pick)} mixes rows: its result for one row depends "
                    f"on the other rows in the batch, so no row can leave early. Replace it."
                )

        # Then the pieces must equal the model.
        differences = list[float]()
        for pick in ([*range(ROWS)], *PICKS):
            difference = _compared(partition, _picked(expected, pick), _picked(rows, pick))
            differences.append(difference)
        for other in _of_other_lengths(partition, rows):
            try:
                outputs = _eager(model, partition, args, kwargs, other)
            except (RuntimeError, IndexError, ValueError):
                continue  # longer or shorter than the model itself accepts
            differences.append(_compared(partition, outputs, other, drop=True))
        differences.append(_compared(partition, expected, rows, drop=True))
        return max(differences)


def _any_differs(expected: State, got: State) -> bool:
    """Whether any tensor of `got` differs from the one of the same name in `expected`."""
    for name, tensor in got.items():
        if _differs(expected[name], tensor):
            return True
    return False


def _of_other_lengths(partition: Partition, rows: State) -> list[State]:
    """The rows with half, almost all and twice of their text, as far as the model accepts it."""
    source = partition.source
    if source is None:
        return []
    doubled = dict[str, Tensor]()
    now = 0
    for name, tensor in rows.items():
        if name in source.texts:
            now = tensor.shape[1]  # the same in all texts
            doubled[name] = torch.cat([tensor, tensor], 1)  # [B, T, ...] -> [B, 2T, ...]
    if not doubled:
        return []

    others = list[State]()
    for length in (now // 2, now - 1, 2 * now):
        if length < 2 or source.refused_length(length) is not None:
            continue
        other = dict(rows)
        for name, tensor in doubled.items():
            other[name] = tensor[:, :length]  # [B, 2T, ...] -> [B, length, ...]
        others.append(other)
    return others


def _eager(
    model: nn.Module,
    partition: Partition,
    args: Sequence[object],
    kwargs: Mapping[str, object] | None,
    rows: State,
) -> State:
    """The model's outputs and taps by name, as far as the pieces have them.

    Taps are copied at once, because later operations may change them in place.
    """
    tensors = State()

    def copy_tap(name: str, output: object) -> None:
        for leaf, tensor in tapped(output, name).items():
            tensors[leaf] = tensor.clone()

    modules = dict(model.named_modules(remove_duplicate=False))
    marks = dict[str, nn.Module]()
    known = set(partition.outputs)
    for name, leaves in partition.taps.items():
        known.update(leaves)
        if name in modules:  # explicit stages may have other names
            marks[name] = modules[name]
    copies = [tensor.clone() for tensor in rows.values()]
    positional, keywords = swapped(args, kwargs or {}, copies)
    with listening(marks, copy_tap), plain_attention():
        output = model(*positional, **keywords)
    tensors.update(tensors_of(output, "y"))
    for name in tensors.keys() - known:
        del tensors[name]
    return tensors


def _compared(partition: Partition, expected: State, rows: State, *, drop: bool = False) -> float:
    """The largest difference between what the pieces write and what is expected.

    With `drop` the order of the rows is reversed after each piece, and the last one leaves.
    """
    state = dict(rows)
    left = list(range(len(next(iter(rows.values())))))  # original numbers of the rows in `state`
    worst = 0.0
    for piece in partition.pieces:
        written = _written(piece, state)
        for name in written.keys() & expected.keys():
            difference = _distance(expected[name][left], written[name])
            if _differs(expected[name][left], written[name]):
                raise BadNetwork(
                    f"{_title(piece)} gives {name!r} {difference:.2g} away from the model on "
                    f"{len(left)} rows, and at most {BAND:g} is allowed; cut elsewhere, {WAY_OUT}"
                )
            worst = max(worst, difference)
        state.update(written)
        if drop:
            kept_rows = list(reversed(range(len(left))))
            if len(kept_rows) > 1:
                kept_rows.pop()
            state = _picked(state, kept_rows)
            left = [left[row] for row in kept_rows]
    return worst


def _written(piece: Piece, state: State) -> State:
    """The tensors that a piece writes. Raises BadNetwork if it changes one that it reads."""
    versions = versions_of(state)
    written = piece.call(state)
    changed = changed_since(versions, state)
    if changed:
        raise BadNetwork(
            f"{_title(piece)} changes {changed[0]!r} in place, but later pieces may read it; cut "
            f"elsewhere, {WAY_OUT}"
        )
    return written


def _title(piece: Piece) -> str:
    """A piece in a message."""
    if piece.name:
        return f"the piece that ends at {piece.name!r}"
    return "the last piece"


def _mixing(partition: Partition, rows: State, pick: list[int]) -> str:
    """The first operation whose result for a row depends on the other rows.

    Explicit stages have no graph, so for them it is the first stage.
    """
    few = _picked(rows, pick)
    source = partition.source
    if source is None:
        return _mixing_stage(partition, rows, few, pick)
    all_values = _Recorder(source.graph).values_of(rows)
    few_values = _Recorder(source.graph).values_of(few)
    for node in source.graph.graph.nodes:
        expected = all_values.get(node)
        got = few_values.get(node)
        if node.op != "call_function":
            continue
        if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
            continue
        # Tensors [B, ...] are compared row by row, all others as they are.
        if expected.dim() and len(expected) == ROWS and source.obstacle(node) is None:
            expected = expected[pick]
        if expected.shape == got.shape and _differs(expected, got):
            return described(node)
    return "the model"


def _mixing_stage(partition: Partition, rows: State, few: State, pick: list[int]) -> str:
    """The first explicit stage whose result for a row depends on the other rows, else the last."""
    all_tensors = _picked(partition.run(rows), pick)
    few_tensors = partition.run(few)
    for piece in partition.pieces:
        for name in piece.writes:
            if piece.name and _differs(all_tensors[name], few_tensors[name]):
                return f"the stage that ends at {piece.name!r}"
    return "the last stage"


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every value."""

    def values_of(self, state: State) -> dict[fx.Node, Any]:
        """Values by node, for inputs in their order."""
        self.values: dict[fx.Node, Any] = {}
        copies = [tensor.clone() for tensor in state.values()]
        self.run(*copies, enable_io_processing=False)
        return self.values

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _rows(inputs: Mapping[str, Tensor], *, rolled: bool = True) -> State:
    """Eight different rows of each input, [B, ...] -> [8, ...].

    Missing rows of floats get noise. Missing rows of integers are put together from the example's
    rows, position by position: then every column keeps its own range of values, and words stay with
    their coordinates. If the example has a single integer row, its positions are rolled instead,
    unless `rolled` is False.
    """
    generator = torch.Generator().manual_seed(0)
    state = State()
    for name, tensor in inputs.items():
        count = len(tensor)
        repeated = torch.arange(ROWS) % count  # 0, 1, ..., B - 1, 0, 1, ...
        rows = tensor.detach()[repeated].clone()  # [B, ...] -> [8, ...]
        all_equal = bool((rows == rows[:1]).all())
        first_missing = 1 if all_equal else count
        for row in range(first_missing, ROWS):
            if rows.is_floating_point():
                noise = torch.randn(rows.shape[1:], generator=generator).to(rows)
                scale = 1 if all_equal else rows.std().nan_to_num(1.0)
                rows[row] += noise * scale
            elif rows.dim() > 1 and not all_equal:
                # Position p comes from row (p + row) of the example: a diagonal through its rows.
                positions = torch.arange(rows.shape[1])
                rows[row] = tensor[(positions + row) % count, positions]
            elif rows.dim() > 1 and rolled:
                # Rows [T] and pictures roll along their last dimension, words with coordinates
                # [T, 4] along T.
                rows[row] = rows[row].roll(row, 0 if rows.dim() == 3 else -1)
        state[name] = rows
    return state


def _picked(state: Mapping[str, Tensor], rows: Sequence[int]) -> State:
    return {name: tensor[list(rows)] for name, tensor in state.items()}


def _differs(expected: Tensor, got: Tensor) -> bool:
    """Whether two tensors differ by more than the precision of their types explains."""
    allowed = BAND
    for tensor in (expected, got):
        if tensor.is_floating_point():
            allowed = max(allowed, torch.finfo(tensor.dtype).eps * 16)
    return _distance(expected, got) > allowed


def _distance(expected: Tensor, got: Tensor) -> float:
    """Largest difference, divided by max(1, largest finite magnitude).

    Equal infinities, and NaN in both tensors, count as equal. Other shapes are infinitely far.
    """
    if expected.shape != got.shape:
        return torch.inf
    if not expected.numel():
        return 0.0
    expected = expected.double()
    got = got.double()
    equal = (expected == got) | (expected.isnan() & got.isnan())
    # The difference of two equal infinities is NaN, hence the mask; any other NaN is a difference.
    differences = (expected - got).abs().masked_fill(equal, 0).nan_to_num(torch.inf)
    magnitudes = expected.abs().nan_to_num(0, 0, 0)  # infinities count as 0
    return float(differences.max() / magnitudes.max().clamp(min=1))
