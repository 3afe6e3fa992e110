"""What a network's inputs look like. No torch.

x is the only input of a network, x/0, x/1 are positional ones, x/<name> keywords.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LABELS = ("label", "labels")  # in any case of letters; what transformers calls them too
INPUT = "x"

Array = np.ndarray[Any, np.dtype[Any]]


def is_label(name: object) -> bool:
    """Whether what stands under this name in a batch is the label, and never an input."""
    return isinstance(name, str) and name.lower() in LABELS


def is_input(name: str) -> bool:
    """Whether a tensor of this name is an input of the network, and not what a node gave."""
    return name == INPUT or name.startswith(INPUT + "/")


@dataclass(frozen=True)
class Input:
    """One input: its name, the shape of one row, its NumPy dtype, and of integers the least and greatest seen.

    Integers are often numbers of tokens or classes: one beyond those that the model knows makes it fail.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: int | None = None
    high: int | None = None

    @staticmethod
    def of(name: str, batch: Array) -> Input:
        """The signature of a batch [B, ...]."""
        seen = (int(batch.min()), int(batch.max())) if batch.dtype.kind in "iu" and batch.size else (None, None)
        return Input(name, tuple(batch.shape[1:]), batch.dtype.name, *seen)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Input:
        """The input written by `dataclasses.asdict`; raises KeyError, TypeError or ValueError for what is none."""
        kind = np.dtype(str(body["dtype"]))
        seen: tuple[Any, Any] = (body.get("low"), body.get("high"))
        if seen != (None, None):
            low, high = map(int, seen)
            if not int(np.iinfo(kind).min) <= low <= high <= int(np.iinfo(kind).max):
                raise ValueError(f"{low} to {high} is no range of {kind.name}")
            seen = low, high
        return Input(str(body["name"]), tuple(map(int, body["shape"])), kind.name, *seen)

    def rows(self, count: int, seed: int) -> Array:
        """Seeded rows [count, *shape], from a raw stream: the same in every version of NumPy.

        Floats are even over [-2, 2), integers over what was seen (else over a byte), booleans are coin tosses.
        """
        size, kind = (count, *self.shape), np.dtype(self.dtype)
        raw = np.random.Philox(seed).random_raw(math.prod(size)).reshape(size)
        if kind.kind in "iub":
            low, high = self._range(kind)
            drawn = (raw >> np.uint64(32)) % np.uint64(min(high - low + 1, 2**32))
            found: Array = drawn.astype(kind) + kind.type(low)
            return found
        return ((raw >> np.uint64(40)) / 2.0**24 * 4 - 2).astype(kind)

    def _range(self, kind: np.dtype[Any]) -> tuple[int, int]:
        if kind.kind == "b":
            return 0, 1
        if self.low is None or self.high is None:
            return 0, min(256, int(np.iinfo(kind).max)) - 1
        return self.low, self.high


def example(inputs: Sequence[Input], count: int, seed: int = 0) -> Any:
    """Seeded rows as a network takes them: an array for x alone, else a mapping from the names behind `x/`."""
    if [given.name for given in inputs] == [INPUT]:
        return inputs[0].rows(count, seed)
    return {given.name.removeprefix(INPUT + "/"): given.rows(count, seed + place) for place, given in enumerate(inputs)}
