"""The sources of rows: something indexed by row number, or a stream of batches.

An Indexed gives any rows, a Stream gives all of them in order. torch is only imported where the
user passes its classes.
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
    """A source of rows by number."""

    @property
    def length(self) -> int:
        """How many rows there are."""

    @property
    def labels(self) -> Ints | None:
        """All labels, int64 [length]; None where there are none, or only a full pass shows them."""

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
        if self.labels is None:
            return pick(self.x, index), None
        return pick(self.x, index), self.labels[index]


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
        labels = self.source.labels
        if labels is None:
            return None
        return self.numbers[labels]

    def take(self, index: Ints) -> Chunk:
        """See Indexed."""
        x, y = self.source.take(index)
        if y is None:
            return x, None
        return x, self.numbers[y]


def arrays(x: object, y: object, what: str = "x") -> Arrays:
    """Make a source of arrays or tensors.

    Args:
        x: inputs [n, ...], or a dict of them; a label among them is y.
        y: labels [n], or None.
        what: the inputs in messages.

    Raises:
        BadData: they are not arrays of numbers, or their numbers of rows differ.
    """
    x, y = parted(x, y, what)
    fields = to_x(x, what)
    return Arrays(fields, to_labels(y, range(count(fields)), "the labels"))


@final
class Items:
    """A torch Dataset with `__getitem__`; each item is a row."""

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
        numbers = [int(row) for row in index]
        return _stack([self._item(number) for number in numbers], numbers)

    def _item(self, row: int) -> object:
        try:
            return self.dataset[row]
        except Exception as problem:
            raise BadData(
                f"row {row} of the Dataset failed ({brief(problem)}); correct or drop this row"
            ) from problem


def _stack(items: list[object], rows: list[int]) -> Chunk:
    """Items of a Dataset as one chunk. Raises BadData for a row that differs from the first."""
    inputs = list[X]()  # each [1, ...]
    labels = list[Ints | None]()  # each [1]
    for item, row in zip(items, rows, strict=True):
        x, y = _one(item, row)
        inputs.append(x)
        labels.append(y)
    # Every row must be like the first one.
    for x, y, row in zip(inputs, labels, rows, strict=True):
        same_layout(layout(inputs[0]), layout(x), f"row {row}")
        same_labels(labels[0] is None, y is None, f"row {row}")
    known = [y for y in labels if y is not None]
    if not known:
        return join(inputs), None
    return join(inputs), np.concatenate(known)


def _one(item: object, row: int) -> Chunk:
    """An item x or (x, y) as a chunk of one row."""
    inputs, label = _pair(item, f"row {row}")
    x, y = parted(inputs, label, f"row {row}")
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
    labels = None if y is None else _row(y, f"row {row}'s label")
    return to_x(fields, f"row {row}"), to_labels(labels, [row], "the label")


def _row(value: object, what: str) -> Array:
    """A value of one row as an array [1, ...]."""
    # If Pillow is not loaded, then the value is not one of its images.
    pillow = sys.modules.get("PIL.Image")
    if pillow is not None and isinstance(value, pillow.Image):
        return from_pil(value, what)[None]
    if isinstance(value, (bool, int, float, np.generic)):
        value = np.asarray(value)
    return to_numpy(value, what)[None]


def _pair(item: object, what: str) -> tuple[object, object]:
    """The inputs and the label of x, (x,) or (x, y); the label is None without."""
    if not isinstance(item, (tuple, list)):
        return item, None
    if len(item) not in (1, 2):
        if all(isinstance(part, (bool, int, float, list, tuple)) for part in item):
            way = (
                "these are plain lists: make arrays of them, np.asarray(rows), and hand over (x, y)"
            )
        else:
            way = "put several inputs into a dict for x"
        raise BadData(f"{what} has {len(item)} parts; expected x or (x, y): {way}")
    if len(item) == 1:
        return item[0], None
    return item[0], item[1]


def same_labels(first_without: bool, without: bool, where: str) -> None:
    """Raise BadData if some rows have labels and others do not.

    Args:
        first_without: whether the rows before have no labels.
        without: whether these rows have no labels.
        where: these rows in messages.
    """
    if first_without == without:
        return
    if without:
        difference = "has no labels, the rows before have labels"
    else:
        difference = "has labels, the rows before have no labels"
    raise BadData(f"{where} {difference}; label every row or none")


@final
class Stream:
    """Batches in order, from something that can only be iterated; a generator only once."""

    def __init__(
        self, make: Callable[[], Iterator[object]], *, once: bool = False, length: int | None = None
    ) -> None:
        self.make = make
        self.once = once
        self.length = length
        self.walked = False

    def chunks(self) -> Iterator[Chunk]:
        """Checked chunks (x, y). Raises BadData for a second pass over a generator."""
        if self.once and self.walked:
            raise BadData(
                "these rows come from an iterator that was walked already; expected one pass "
                "only: hand over a list "
                "of batches, a Dataset or arrays, or make the iterator anew"
            )
        # Here and not in a generator, so that the second pass fails at once.
        self.walked = True
        return self._chunks()

    def _chunks(self) -> Iterator[Chunk]:
        start = 0
        number = 0
        # `next` in its own try, so that only errors of the user's iterator are caught.
        batches = self.make()
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except Exception as problem:
                raise BadData(
                    f"batch {number} could not be made ({brief(problem)}); correct what makes it"
                ) from problem
            x, y = chunk(item, start, number)
            yield x, y
            start += count(x)
            number += 1


def chunk(item: object, start: int, number: int) -> Chunk:
    """Check a batch.

    Args:
        item: x or (x, y).
        start: the number of its first row, for messages.
        number: of the batch, for messages.

    Raises:
        BadData: it is not a batch of arrays of numbers.
    """
    what = f"batch {number}"
    inputs, labels = _pair(item, what)
    inputs, labels = parted(inputs, labels, what)
    x = to_x(inputs, what)
    rows = range(start, start + count(x))
    return x, to_labels(labels, rows, f"{what}'s labels")


def require_batches(data: list[object]) -> None:
    """Raise BadData for a list [x, y]: a list is read as batches, and these are not two batches."""
    if len(data) != 2 or not is_array(data[0]) or not is_array(data[1]):
        return
    x = to_numpy(data[0], "batch 0")
    y = to_numpy(data[1], "batch 1")
    looks_like_labels = y.ndim <= 2 and y.size == len(y) and y.dtype.kind in "iu"
    if looks_like_labels and x.ndim > 1 and len(x) == len(y) and layout(x) != layout(y):
        raise BadData(
            f"got a list of two arrays, {list(x.shape)} and {list(y.shape)}; a list is batches: "
            f"hand over x and labels "
            "as the tuple (x, y)"
        )


def batches_of(data: Iterable[object]) -> Stream:
    """Make a stream of batches x or (x, y).

    Args:
        data: an iterable of batches. The number of rows of a list or tuple is known.

    Raises:
        BadData: an item of a list or tuple is not a batch.
    """
    if isinstance(data, (list, tuple)):
        length = 0
        for number, item in enumerate(data):
            x, _ = chunk(item, 0, number)
            length += count(x)
        return Stream(lambda: iter(data), length=length)
    # The iterator of a generator is the generator itself; other iterables make a new one each time.
    iterator = iter(data)
    if iterator is data:  # such as a generator
        return Stream(lambda: iterator, once=True)
    return Stream(lambda: iter(data))


def class_names_of(data: Any) -> tuple[str, ...] | None:
    """The class names of torchvision's ImageFolder, which it numbers by what its folder holds.

    Args:
        data: a Dataset or DataLoader.

    Returns:
        The names; None for other data sets.
    """
    inner = getattr(data, "dataset", data)  # of a DataLoader or a Subset
    inner = getattr(inner, "dataset", inner)  # of a DataLoader of a Subset
    names = getattr(inner, "classes", None)
    is_folder = hasattr(inner, "samples") and hasattr(inner, "class_to_idx")
    if not is_folder or not isinstance(names, list):
        return None
    if not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def from_torch(data: Any) -> Indexed | Stream | None:
    """Make a source of a torch Dataset or DataLoader.

    Args:
        data: anything.

    Returns:
        The source; None if `data` is something else.

    Raises:
        BadData: the DataLoader does not keep the order of its data set.
    """
    # If torch is not loaded, then the data is not one of its classes.
    if "torch" not in sys.modules:
        return None
    from torch.utils.data import DataLoader, Dataset, IterableDataset

    if isinstance(data, DataLoader):
        return _loader(data)
    if isinstance(data, IterableDataset):
        return Stream(lambda: (_one(item, row) for row, item in enumerate(data)))
    if isinstance(data, Dataset):
        return Items(data)
    return None


def _loader(loader: Any) -> Stream:
    """The batches of a DataLoader. Raises BadData unless it keeps the order of its data set."""
    from torch.utils.data import BatchSampler, IterableDataset, SequentialSampler

    # It has no sampler, and the order is its own.
    if isinstance(loader.dataset, IterableDataset):
        return Stream(lambda: iter(loader))
    batches = loader.batch_sampler
    if batches is None:  # batch_size=None: the data set gives batches itself
        order = loader.sampler
    elif type(batches) is BatchSampler:
        order = batches.sampler
    else:  # the user's own class, whose order is not known
        order = batches
    if not isinstance(order, SequentialSampler):
        raise BadData(
            f"the DataLoader draws its rows with a {type(order).__name__}; expected the order of "
            f"the data set, since "
            "rows keep their numbers: make it with shuffle=False, or hand over the Dataset itself"
        )
    if batches is None:
        return Stream(lambda: iter(loader))
    length = len(loader.dataset)
    if batches.drop_last:
        length -= length % batches.batch_size
    return Stream(lambda: iter(loader), length=length)
