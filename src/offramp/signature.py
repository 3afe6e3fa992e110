"""What a network's inputs look like. No torch.

x is the only input of a network, x/0, x/1 are positional ones, x/<name> keywords.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INPUT = "x"

Array = np.ndarray[Any, np.dtype[Any]]


def is_input(name: str) -> bool:
    """Whether a tensor of this name is an input of the network, and not what a node gave."""
    return name == INPUT or name.startswith(INPUT + "/")


@dataclass(frozen=True)
class Input:
    """One input: its name, the shape of one row, and its NumPy dtype.

    top: of integers wider than a byte one more than the largest seen, so that made-up rows are words that exist.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    top: int | None = None

    @staticmethod
    def of(name: str, batch: Array) -> Input:
        """The signature of a batch [B, ...]."""
        counted = batch.dtype.kind in "iu" and batch.dtype.itemsize > 1 and batch.size > 0
        top = max(1, int(batch.max()) + 1) if counted else None
        return Input(name, tuple(batch.shape[1:]), batch.dtype.name, top)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Input:
        """The input written by `dataclasses.asdict`; raises KeyError, TypeError or ValueError for what is none."""
        top = body.get("top")  # not in files of the first version
        kind = np.dtype(str(body["dtype"])).name
        return Input(str(body["name"]), tuple(map(int, body["shape"])), kind, None if top is None else int(top))

    def rows(self, count: int, seed: int) -> Array:
        """Seeded rows [count, *shape], from a raw stream: the same in every version of NumPy.

        Floats are even over [-2, 2), integers over [0, top) or a byte, booleans are coin tosses.
        """
        size, kind = (count, *self.shape), np.dtype(self.dtype)
        raw = np.random.Philox(seed).random_raw(math.prod(size)).reshape(size)
        if kind.kind in "iub":
            top = 2 if kind.kind == "b" else self.top or min(256, int(np.iinfo(kind).max))
            return ((raw >> np.uint64(32)) % np.uint64(top)).astype(kind)
        return ((raw >> np.uint64(40)) / 2.0**24 * 4 - 2).astype(kind)


def example(inputs: Sequence[Input], count: int, seed: int = 0) -> Any:
    """Seeded rows as a network takes them: an array for x alone, else a mapping from the names behind `x/`."""
    if [given.name for given in inputs] == [INPUT]:
        return inputs[0].rows(count, seed)
    return {given.name.removeprefix(INPUT + "/"): given.rows(count, seed + place) for place, given in enumerate(inputs)}
