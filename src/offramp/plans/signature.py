"""What a network's inputs look like. Does not import torch.

x is the only input of a network. x/0, x/1 are positional inputs, x/<name> keyword inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

LABELS = ("label", "labels")  # in upper or lower case; transformers uses these names too
INPUT = "x"
VALUES = 512  # a row of up to this many values has a range for each of them
# A larger row with up to this many channels, columns or positions has a range for each of these.
ALONG = 64

Array = np.ndarray[Any, np.dtype[Any]]
Bounds = tuple[Any, ...]


def is_label(name: object) -> bool:
    """Whether a batch holds the label under this name, and never an input."""
    return isinstance(name, str) and name.lower() in LABELS


def is_input(name: str) -> bool:
    """Whether a tensor of this name is an input of the network, and not the output of a node."""
    return name == INPUT or name.startswith(INPUT + "/")


@dataclass(frozen=True)
class Input:
    """One input: its name, the shape of one row, its NumPy dtype, and the range of its values.

    Seeded rows are drawn within the range. Integers are often numbers of tokens or classes, and a
    model fails on a number that it does not know. Models take logarithms and roots of values that
    are never negative.

    Attributes:
        name: `x`, or `x/<name>`.
        shape: of one row.
        dtype: the name of the NumPy dtype.
        low: the smallest integer, None for other types.
        high: the largest integer, None for other types.
        lows: the smallest values, of integers and floats. Either one for each value of a row (in
            row-major order), or one for each index of the dimension `axis` of a row, or one for
            all. None where no value was seen; files of the first version have no range of floats.
        highs: the largest values, in the same form.
        axis: a dimension of a row, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: int | None = None
    high: int | None = None
    lows: Bounds | None = None
    highs: Bounds | None = None
    axis: int | None = None

    @staticmethod
    def of(name: str, batch: Array) -> Input:
        """The signature of a batch [B, ...]."""
        shape = tuple(batch.shape[1:])
        kind = batch.dtype
        if not batch.size or kind.kind not in "iuf":
            return Input(name, shape, kind.name)
        axis = _axis(shape)
        if math.prod(shape) > VALUES:
            # over all dimensions of the batch but `axis`, which is axis + 1 behind the rows
            others = tuple(d for d in range(batch.ndim) if axis is None or d != axis + 1)
        else:
            others = (0,)
        lows, highs = _extremes(batch, others)
        if kind.kind == "f":
            return Input(name, shape, kind.name, lows=lows, highs=highs, axis=axis)
        return Input(name, shape, kind.name, min(lows), max(highs), lows, highs, axis)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Input:
        """The input written by `dataclasses.asdict`.

        Raises:
            KeyError, TypeError, ValueError: the fields do not make an input.
        """
        kind = np.dtype(str(body["dtype"]))
        shape = tuple(map(int, body["shape"]))
        low: Any = body.get("low")
        high: Any = body.get("high")
        axis: Any = body.get("axis")
        if (low, high) != (None, None):
            if kind.kind not in "iu":
                raise ValueError(f"{kind.name} does not have a range of integers")
            low = int(low)
            high = int(high)
            _require_order(kind, [low], [high])
        lows: Any = body.get("lows")
        highs: Any = body.get("highs")
        if (lows, highs) == (None, None):
            return Input(str(body["name"]), shape, kind.name, low, high)
        number = float if kind.kind == "f" else int
        lows = tuple(map(number, lows))
        highs = tuple(map(number, highs))
        _require_order(kind, lows, highs)
        # one range for all, or one for each index of the axis, or one for each value of a row
        along = None if axis is None else shape[axis]
        if len(lows) not in (1, along or math.prod(shape)):
            raise ValueError(f"there are {len(lows)} ranges for rows of shape {shape}")
        return Input(str(body["name"]), shape, kind.name, low, high, lows, highs, axis)

    def widened(self, other: Input) -> Input:
        """This input with the range of both.

        Args:
            other: the same input in another batch of the same data.

        Returns:
            A new input.
        """
        if other.lows is None or other.highs is None:
            return self
        if self.lows is None or self.highs is None:
            return replace(other, name=self.name, shape=self.shape)
        first = self
        second = other
        if (len(first.lows or ()), first.axis) != (len(second.lows or ()), second.axis):
            # texts of another length: one range for all positions
            first = first._with_one_range()
            second = second._with_one_range()
        lows = tuple(map(min, first.lows or (), second.lows or ()))
        highs = tuple(map(max, first.highs or (), second.highs or ()))
        if self.low is None:
            return replace(self, lows=lows, highs=highs, axis=first.axis)
        return replace(
            self, low=min(lows), high=max(highs), lows=lows, highs=highs, axis=first.axis
        )

    def _with_one_range(self) -> Input:
        """This input with one range for all values together."""
        if self.lows is None or self.highs is None:
            return self
        return replace(self, lows=(min(self.lows),), highs=(max(self.highs),), axis=None)

    def settled(self) -> Input:
        """This input with a range to draw floats from.

        If the range of every float is a single value (one row was seen, or constant rows), the
        range of all values together is taken. If that is a single value too, the range reaches half
        of it to both sides, so that its sign stays.
        """
        if self.lows is None or self.highs is None:
            return self
        if np.dtype(self.dtype).kind != "f" or self.lows != self.highs:
            return self
        low = min(self.lows)
        high = max(self.highs)
        # several values were seen, although each float had only one
        if low < high:
            return replace(self, lows=(low,), highs=(high,), axis=None)
        if low == 0:
            return replace(self, lows=None, highs=None, axis=None)
        return replace(self, lows=(low - abs(low) / 2,), highs=(low + abs(low) / 2,), axis=None)

    def rows(self, count: int, seed: int) -> Array:
        """Draw seeded rows, the same in every version of NumPy.

        Numbers are evenly spread over the range. Where it is not known, floats are evenly spread
        over [-2, 2) and integers over a byte. Booleans are coin tosses.

        Args:
            count: how many rows.
            seed: of the random numbers.

        Returns:
            [count, *shape].
        """
        size = (count, *self.shape)
        kind = np.dtype(self.dtype)
        # NumPy guarantees the raw stream of a bit generator, and not the methods on top of it
        raw = np.random.Philox(seed).random_raw(math.prod(size)).reshape(size)
        if kind.kind in "iub":
            lows, highs = self._range(kind)
            spans = []
            for low, high in zip(lows, highs, strict=True):
                spans.append(min(high - low + 1, 2**32))
            drawn = (raw >> np.uint64(32)) % self._spread(np.array(spans, np.uint64))
            rows: Array = drawn.astype(kind) + self._spread(np.array(lows, kind))
            return rows
        even = (raw >> np.uint64(40)) / 2.0**24  # [0, 1)
        if self.lows is None or self.highs is None:
            return (even * 4 - 2).astype(kind)
        low_values = self._spread(np.array(self.lows, np.float64))
        high_values = self._spread(np.array(self.highs, np.float64))
        # not low + (high - low) * even, because the difference may overflow
        return (low_values * (1 - even) + high_values * even).astype(kind)

    def _range(self, kind: np.dtype[Any]) -> tuple[Bounds, Bounds]:
        """The lows and highs to draw integers and booleans from."""
        if kind.kind == "b":
            return (0,), (1,)
        if self.lows is not None and self.highs is not None:
            return self.lows, self.highs
        if self.low is not None and self.high is not None:
            return (self.low,), (self.high,)
        return (0,), (min(256, int(np.iinfo(kind).max)) - 1,)

    def _spread(self, bounds: Array) -> Array:
        """Bounds in a shape that broadcasts over rows [B, *shape]."""
        if bounds.size == 1:
            return bounds.reshape(())
        if self.axis is None:
            return bounds.reshape(self.shape)
        shape = [1] * len(self.shape)
        shape[self.axis] = self.shape[self.axis]
        return bounds.reshape(shape)


def _axis(shape: tuple[int, ...]) -> int | None:
    """The dimension of a large row along which values differ in kind. That is the shortest one, as
    for channels and columns.
    """
    if math.prod(shape) <= VALUES or min(shape) > ALONG:
        return None
    return shape.index(min(shape))


def _extremes(batch: Array, others: tuple[int, ...]) -> tuple[Bounds, Bounds]:
    """The least and the greatest finite value over some dimensions, in row-major order."""
    if batch.dtype.kind != "f":
        return tuple(batch.min(others).ravel().tolist()), tuple(batch.max(others).ravel().tolist())
    is_finite = np.isfinite(batch)
    counted: Any = True if is_finite.all() else is_finite
    lows = np.asarray(batch.min(others, initial=np.inf, where=counted)).ravel()
    highs = np.asarray(batch.max(others, initial=-np.inf, where=counted)).ravel()
    is_empty = ~np.isfinite(lows)  # no finite value was seen here
    lows = np.where(is_empty, 0, lows)
    highs = np.where(is_empty, 0, highs)
    return _short(lows), _short(highs)


def _short(values: Array) -> Bounds:
    """Floats with the fewest digits that mean them in their own type: 0.1, not 0.100000001."""
    return tuple(float(str(value)) for value in values)


def _require_order(kind: np.dtype[Any], lows: Sequence[Any], highs: Sequence[Any]) -> None:
    """Raise ValueError unless each low is at most its high, and both are numbers of this type."""
    if len(lows) != len(highs):
        raise ValueError(f"there are {len(lows)} lows and {len(highs)} highs")
    for low, high in zip(lows, highs, strict=True):
        if kind.kind == "f":
            fits = math.isfinite(low) and math.isfinite(high)
        else:
            fits = int(np.iinfo(kind).min) <= low and high <= int(np.iinfo(kind).max)
        if not fits or low > high:
            raise ValueError(f"{low} to {high} is not a range of {kind.name}")


def example(inputs: Sequence[Input], count: int, seed: int = 0) -> Any:
    """Draw seeded rows as a network takes them.

    Args:
        inputs: of the network.
        count: how many rows.
        seed: of the random numbers.

    Returns:
        An array for `x` alone, otherwise a dict of arrays by the names behind `x/`.
    """
    if [signature.name for signature in inputs] == [INPUT]:
        return inputs[0].rows(count, seed)
    arrays = {}
    for index, signature in enumerate(inputs):
        arrays[signature.name.removeprefix(INPUT + "/")] = signature.rows(count, seed + index)
    return arrays
