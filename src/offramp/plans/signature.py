"""What a network's inputs look like. No torch.

x is the only input of a network, x/0, x/1 are positional ones, x/<name> keywords.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

LABELS = ("label", "labels")  # in any case of letters; what transformers calls them too
INPUT = "x"
VALUES = 512  # of a row: up to so many have a range of their own each
# channels, columns or places of a larger row: up to so many have a range of their own each
ALONG = 64

Array = np.ndarray[Any, np.dtype[Any]]
Bounds = tuple[Any, ...]


def is_label(name: object) -> bool:
    """Whether what stands under this name in a batch is the label, and never an input."""
    return isinstance(name, str) and name.lower() in LABELS


def is_input(name: str) -> bool:
    """Whether a tensor of this name is an input of the network, and not what a node gave."""
    return name == INPUT or name.startswith(INPUT + "/")


@dataclass(frozen=True)
class Input:
    """One input: its name, the shape of one row, its NumPy dtype, and the range of what was seen.

    Rows are drawn within the range. Integers are often numbers of tokens or classes, and one beyond
    those that the model knows makes it fail; models take logarithms and roots of what is never
    negative.

    low, high: the least and the greatest of integers. lows, highs: of integers and floats, either
    one for each value of a row (in row-major order), or along the dimension `axis` of a row, or a
    single one for all. None where nothing was
    seen: files of the first version know no range of floats.
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
            others = tuple(d for d in range(batch.ndim) if axis is None or d != axis + 1)
        else:
            others = (0,)
        lows, highs = _extremes(batch, others)
        if kind.kind == "f":
            return Input(name, shape, kind.name, lows=lows, highs=highs, axis=axis)
        return Input(name, shape, kind.name, min(lows), max(highs), lows, highs, axis)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Input:
        """The input written by `dataclasses.asdict`; raises KeyError, TypeError or ValueError for
        what is none.
        """
        kind = np.dtype(str(body["dtype"]))
        shape = tuple(map(int, body["shape"]))
        low: Any = body.get("low")
        high: Any = body.get("high")
        axis: Any = body.get("axis")
        if (low, high) != (None, None):
            if kind.kind not in "iu":
                raise ValueError(f"{kind.name} has no range of integers")
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
        along = None if axis is None else shape[axis]
        if len(lows) not in (1, along or math.prod(shape)):
            raise ValueError(f"there are {len(lows)} ranges for rows of shape {shape}")
        return Input(str(body["name"]), shape, kind.name, low, high, lows, highs, axis)

    def widened(self, other: Input) -> Input:
        """This input with the range of both: of another batch of the same data."""
        if other.lows is None or other.highs is None:
            return self
        if self.lows is None or self.highs is None:
            return replace(other, name=self.name, shape=self.shape)
        mine = (self.lows, self.highs)
        its = (other.lows, other.highs)
        axis = self.axis
        if (len(mine[0]), axis) != (
            len(its[0]),
            other.axis,
        ):  # texts of another length: one range for all
            axis = None
            mine = (min(mine[0]),), (max(mine[1]),)
            its = (min(its[0]),), (max(its[1]),)
        lows = tuple(map(min, mine[0], its[0]))
        highs = tuple(map(max, mine[1], its[1]))
        if self.low is None:
            return replace(self, lows=lows, highs=highs, axis=axis)
        return replace(self, low=min(lows), high=max(highs), lows=lows, highs=highs, axis=axis)

    def settled(self) -> Input:
        """This input with a range to draw from, where no float was seen twice: of one row, or of
        constant ones.

        Then the range of all values together, and around a single value half of it to both sides,
        so that its sign stays.
        """
        if (
            np.dtype(self.dtype).kind != "f"
            or self.lows is None
            or self.highs is None
            or self.lows != self.highs
        ):
            return self
        low = min(self.lows)
        high = max(self.highs)
        if low < high:
            return replace(self, lows=(low,), highs=(high,), axis=None)
        if low == 0:
            return replace(self, lows=None, highs=None, axis=None)
        return replace(self, lows=(low - abs(low) / 2,), highs=(low + abs(low) / 2,), axis=None)

    def rows(self, count: int, seed: int) -> Array:
        """Seeded rows [count, *shape], from a raw stream: the same in every version of NumPy.

        Numbers are even over the range of what was seen. Where none is known, floats are even over
        [-2, 2) and integers over a byte. Booleans are coin tosses.
        """
        size = (count, *self.shape)
        kind = np.dtype(self.dtype)
        raw = np.random.Philox(seed).random_raw(math.prod(size)).reshape(size)
        if kind.kind in "iub":
            lows, highs = self._range(kind)
            spans = [min(high - low + 1, 2**32) for low, high in zip(lows, highs, strict=True)]
            drawn = (raw >> np.uint64(32)) % self._spread(np.array(spans, np.uint64))
            rows: Array = drawn.astype(kind) + self._spread(np.array(lows, kind))
            return rows
        even = (raw >> np.uint64(40)) / 2.0**24  # [0, 1)
        if self.lows is None or self.highs is None:
            return (even * 4 - 2).astype(kind)
        low = self._spread(np.array(self.lows, np.float64))
        high = self._spread(np.array(self.highs, np.float64))
        # and not low + (high - low) ..., which may overflow
        return (low * (1 - even) + high * even).astype(kind)

    def _range(self, kind: np.dtype[Any]) -> tuple[Bounds, Bounds]:
        if kind.kind == "b":
            return (0,), (1,)
        if self.lows is not None and self.highs is not None:
            return self.lows, self.highs
        if self.low is not None and self.high is not None:
            return (self.low,), (self.high,)
        return (0,), (min(256, int(np.iinfo(kind).max)) - 1,)

    def _spread(self, bounds: Array) -> Array:
        """Bounds in a form that broadcasts over rows [B, *shape]."""
        if bounds.size == 1:
            return bounds.reshape(())
        if self.axis is None:
            return bounds.reshape(self.shape)
        return bounds.reshape([size if d == self.axis else 1 for d, size in enumerate(self.shape)])


def _axis(shape: tuple[int, ...]) -> int | None:
    """Of a large row the dimension along which values differ in kind: the shortest one, as channels
    and columns are.
    """
    if math.prod(shape) <= VALUES or min(shape) > ALONG:
        return None
    return shape.index(min(shape))


def _extremes(batch: Array, others: tuple[int, ...]) -> tuple[Bounds, Bounds]:
    """The least and the greatest finite value over some dimensions, in row-major order."""
    if batch.dtype.kind != "f":
        return tuple(batch.min(others).ravel().tolist()), tuple(batch.max(others).ravel().tolist())
    finite = np.isfinite(batch)
    some: Any = True if finite.all() else finite
    lows = np.asarray(batch.min(others, initial=np.inf, where=some)).ravel()
    highs = np.asarray(batch.max(others, initial=-np.inf, where=some)).ravel()
    none = ~np.isfinite(lows)  # nothing finite was seen here
    lows = np.where(none, 0, lows)
    highs = np.where(none, 0, highs)
    return _short(lows), _short(highs)


def _short(values: Array) -> Bounds:
    """Floats as the shortest texts that mean them in their own type."""
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
            raise ValueError(f"{low} to {high} is no range of {kind.name}")


def example(inputs: Sequence[Input], count: int, seed: int = 0) -> Any:
    """Seeded rows as a network takes them: an array for x alone, else a mapping from the names
    behind `x/`.
    """
    if [given.name for given in inputs] == [INPUT]:
        return inputs[0].rows(count, seed)
    return {
        given.name.removeprefix(INPUT + "/"): given.rows(count, seed + index)
        for index, given in enumerate(inputs)
    }
