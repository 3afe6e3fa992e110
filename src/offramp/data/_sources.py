"""Where rows are read from: something indexed by row number, or a stream of batches.

An Indexed gives any rows, a Stream gives all of them in order. Torch classes are met here, and only
those handed in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, final

import numpy as np

from offramp._support.files import Array
from offramp.data._check import (
    Ints,
    X,
    brief,
    count,
    is_array,
    join,
    layout,
    parted,
    pick,
    same_layout,
    to_labels,
    to_numpy,
    to_x,
)
from offramp.data._images import from_pil
from offramp.errors import BadData

Chunk: TypeAlias = tuple[X, Ints | None]


class Indexed(Protocol):
    """Rows by number. `labels` are all labels where they are known without a pass."""

    @property
    def length(self) -> int:
        """How many rows there are."""

    @property
    def labels(self) -> Ints | None:
        """int64 [length], or None when unknown or absent."""

    def take(self, index: Ints) -> Chunk:
        """The rows of these numbers, in the order asked for: x [k, ...], y int64 [k] or None."""


@final
class Arrays:
    """x and y in memory."""

    def __init__(self, x: X, y: Ints | None) -> None:
        self.x = x
        self.labels = y
        self.length = count(x)

    def take(self, index: Ints) -> Chunk:
        """See Indexed."""
        return pick(self.x, index), None if self.labels is None else self.labels[index]


@final
class Renumbered:
    """An Indexed whose classes have other numbers: label k becomes `numbers[k]`."""

    def __init__(self, source: Indexed, numbers: Ints) -> None:
        self.source = source
        self.numbers = numbers
        self.length = source.length

    @property
    def labels(self) -> Ints | None:
        """See Indexed."""
        own = self.source.labels
        return None if own is None else self.numbers[own]

    def take(self, index: Ints) -> Chunk:
        """See Indexed."""
        x, y = self.source.take(index)
        return x, None if y is None else self.numbers[y]


def arrays(x: object, y: object, what: str = "x") -> Arrays:
    """Arrays or tensors, checked; a label among named inputs is y."""
    x, y = parted(x, y, what)
    fields = to_x(x, what)
    return Arrays(fields, to_labels(y, range(count(fields)), "the labels"))


@final
class Items:
    """A torch map-style Dataset, one item a row."""

    labels = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        try:
            self.length = len(dataset)
        except TypeError as problem:
            raise BadData(
                f"{type(dataset).__name__} has no length; expected a Dataset with __len__: add "
                f"it, or hand over an "
                "iterable of batches"
            ) from problem

    def take(self, index: Ints) -> Chunk:
        """See Indexed."""
        return _stack([(self._item(int(row)), int(row)) for row in index])

    def _item(self, row: int) -> object:
        try:
            return self.dataset[row]
        except Exception as problem:
            raise BadData(
                f"row {row} of the Dataset failed ({brief(problem)}); mend or drop this row"
            ) from problem


def _stack(items: list[tuple[object, int]]) -> Chunk:
    """Items (value, row) of a Dataset -> one chunk; BadData names the row that differs."""
    chunks = [_one(item, row) for item, row in items]
    first = layout(chunks[0][0])
    for (x, y), (_, row) in zip(chunks, items, strict=True):
        same_layout(first, layout(x), f"row {row}")
        same_labels(chunks[0][1] is None, y is None, f"row {row}")
    labels = [y for _, y in chunks if y is not None]
    return join([x for x, _ in chunks]), np.concatenate(labels) if labels else None


def _one(item: object, row: int) -> Chunk:
    """An item (x or (x, y)) as a chunk of one row."""
    x, y = parted(*_pair(item, f"row {row}"), f"row {row}")
    if isinstance(x, Mapping):
        fields: X = {name: _row(part, f"row {row}") for name, part in x.items()}
    else:
        fields = _row(x, f"row {row}")
    if isinstance(y, str):
        raise BadData(
            f"row {row}'s label is a str, {y[:40]!r}; expected a class number of at least 0: "
            f"number the classes by one "
            "list of names for all your rows"
        )
    label = None if y is None else _row(y, f"row {row}'s label")
    return to_x(fields, f"row {row}"), to_labels(label, [row], "the label")


def _row(value: object, what: str) -> Array:
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(value, pillow.Image):
        return from_pil(value, what)[None]
    if isinstance(value, (bool, int, float, np.generic)):
        value = np.asarray(value)
    return to_numpy(value, what)[None]


def _pair(item: object, what: str) -> tuple[object, object]:
    """X, (x,) or (x, y) -> (x, y or None)."""
    if not isinstance(item, (tuple, list)):
        return item, None
    if len(item) not in (1, 2):
        numbers = all(isinstance(one, (bool, int, float, list, tuple)) for one in item)
        if numbers:
            way = (
                "these are plain lists: make arrays of them, np.asarray(rows), and hand over (x, y)"
            )
        else:
            way = "put several inputs into a dict for x"
        raise BadData(f"{what} has {len(item)} parts; expected x or (x, y): {way}")
    return item[0], item[1] if len(item) == 2 else None


def same_labels(first_without: bool, without: bool, where: str) -> None:
    """Raise BadData when some rows have labels and others none."""
    if first_without != without:
        has, had = ("no labels", "labels") if without else ("labels", "no labels")
        raise BadData(f"{where} has {has}, the rows before have {had}; label every row or none")


@final
class Stream:
    """Batches in order, from something that can only be walked. A generator can be walked once."""

    def __init__(
        self, make: Callable[[], Iterator[object]], *, once: bool = False, length: int | None = None
    ) -> None:
        self.make = make
        self.once = once
        self.length = length
        self.walked = False

    def chunks(self) -> Iterator[Chunk]:
        """Checked chunks (x, y); refuses a second walk over what can be walked once."""
        if self.once and self.walked:
            raise BadData(
                "these rows come from an iterator that was walked already; expected one pass "
                "only: hand over a list "
                "of batches, a Dataset or arrays, or make the iterator anew"
            )
        self.walked = True
        return self._chunks()

    def _chunks(self) -> Iterator[Chunk]:
        start = 0
        number = 0
        batches = self.make()
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except Exception as problem:
                raise BadData(
                    f"batch {number} could not be made ({brief(problem)}); mend what makes it"
                ) from problem
            x, y = chunk(item, start, number)
            yield x, y
            start = start + count(x)
            number = number + 1


def chunk(item: object, start: int, number: int) -> Chunk:
    """A batch (x, y) or x as it came, its first row being row `start`."""
    given, labels = parted(*_pair(item, f"batch {number}"), f"batch {number}")
    x = to_x(given, f"batch {number}")
    return x, to_labels(labels, range(start, start + count(x)), f"batch {number}'s labels")


def require_batches(data: list[object]) -> None:
    """Raise BadData for [x, y]: a list is batches, and these two are no batches of one kind."""
    if len(data) != 2 or not all(is_array(one) for one in data):
        return
    x, y = (to_numpy(one, f"batch {number}") for number, one in enumerate(data))
    labels = y.ndim <= 2 and y.size == len(y) and y.dtype.kind in "iu"
    if labels and x.ndim > 1 and len(x) == len(y) and layout(x) != layout(y):
        raise BadData(
            f"got a list of two arrays, {list(x.shape)} and {list(y.shape)}; a list is batches: "
            f"hand over x and labels "
            "as the tuple (x, y)"
        )


def batches_of(data: Iterable[object]) -> Stream:
    """An iterable of batches x or (x, y); its length is known where it is a list or tuple."""
    if isinstance(data, (list, tuple)):
        return Stream(
            lambda: iter(data),
            length=sum(count(chunk(item, 0, i)[0]) for i, item in enumerate(data)),
        )
    walk = iter(data)
    if walk is not data:
        return Stream(lambda: iter(data), once=walk is data)
    return Stream(lambda: walk, once=True)


def class_names_of(data: Any) -> tuple[str, ...] | None:
    """The class names of torchvision's ImageFolder, which it numbers by what its folder holds; else
    None.
    """
    inner = getattr(data, "dataset", data)  # of a DataLoader or a Subset
    inner = getattr(inner, "dataset", inner)
    names = getattr(inner, "classes", None)
    if not (
        hasattr(inner, "samples") and hasattr(inner, "class_to_idx") and isinstance(names, list)
    ):
        return None
    return tuple(names) if all(isinstance(name, str) for name in names) else None


def from_torch(data: Any) -> Indexed | Stream | None:
    """A torch Dataset or DataLoader as a source; None for anything else."""
    if "torch" not in sys.modules:
        return None
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    if isinstance(data, DataLoader):
        return _loader(data)
    if isinstance(data, IterableDataset):
        return Stream(lambda: (_one(item, row) for row, item in enumerate(data)))
    return Items(data) if isinstance(data, Dataset) else None


def _loader(loader: Any) -> Stream:
    """A DataLoader that keeps the order of its data set."""
    from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

    if isinstance(loader.dataset, IterableDataset):
        return Stream(lambda: iter(loader))
    batches = loader.batch_sampler
    order = (
        loader.sampler
        if batches is None
        else batches.sampler
        if type(batches) is BatchSampler
        else batches
    )
    if not isinstance(order, SequentialSampler):
        raise BadData(
            f"the DataLoader draws its rows with a {type(order).__name__}; expected the order of "
            f"the data set, since "
            "rows keep their numbers: make it with shuffle=False, or hand over the Dataset itself"
        )
    if batches is None:
        return Stream(lambda: iter(loader))
    rows = len(loader.dataset)
    return Stream(
        lambda: iter(loader), length=rows - rows % batches.batch_size if batches.drop_last else rows
    )
