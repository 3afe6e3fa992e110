"""Numbered rows, in order, a batch at a time: the one form in which the package sees data.

rows("cifar10:data[1000:2000]")     a spec (see specs.py)
rows(x), rows(x, y), rows((x, y))   numpy arrays, torch tensors or data frames; x may be a dict of
                                    named arrays, y also a list of numbers
rows(dataset), rows(loader)         a torch Dataset, or a DataLoader that does not shuffle
rows([(x, y), (x, y), ...])         any iterable of batches; a generator gives one pass
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from offramp.data import specs
from offramp.data._check import (
    Ints,
    X,
    count,
    is_array,
    join,
    layout,
    pick,
    same_layout,
)
from offramp.data._classes import renumbering
from offramp.data._images import proposing
from offramp.data._sources import (
    Indexed,
    Renumbered,
    Stream,
    arrays,
    batches_of,
    class_names_of,
    from_torch,
    require_batches,
    same_labels,
)
from offramp.errors import BadData, InvalidArgument
from offramp.plans.digests import digests_of, fingerprint_of, rounded_digests_of

__all__ = [
    "Batch",
    "Rows",
    "digests_of",
    "fingerprint_of",
    "proposing",
    "rounded_digests_of",
    "rows",
    "rows_for",
]

EngineStage: TypeAlias = tuple[X, Ints | None, Ints]
ENDLESS = sys.maxsize  # the end of a stream whose length is not known
EVERY = slice(0, None, 1)  # every batch


@dataclass(frozen=True)
class Batch:
    """Some rows; b is their number.

    Attributes:
        x: inputs [b, ...], or named arrays of them.
        y: labels, int64 [b]; None without.
        row: the number of each row in the source, before any selection, int64 [b].
        digest: identifies the content of each row of x, uint64 [b].
    """

    x: X
    y: Ints | None
    row: Ints
    digest: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.row)


@final
class Rows:
    """Numbered rows of one source, or a selection of them.

    Args:
        source: where they are read from.
        name: for messages and files.
        class_names: in the order of the class numbers; None where they are not known.
        keep: the source's numbers of the selected rows; None for all rows.

    Raises:
        BadData: there are no rows.
    """

    def __init__(
        self,
        source: Indexed | Stream,
        *,
        name: str = "array",
        class_names: tuple[str, ...] | None = None,
        keep: range | None = None,
    ) -> None:
        self.source = source
        self.name = name
        self.class_names = class_names
        if keep is None:
            keep = range(ENDLESS if source.length is None else source.length)
        self.keep = keep
        self._fingerprint: str | None = None
        if not self.keep:
            raise BadData(f"{name} holds 0 rows; expected at least one: hand over more")

    @property
    def length(self) -> int | None:
        """How many rows there are; None for a stream without a known end."""
        if self.keep.stop >= ENDLESS:
            return None
        return len(self.keep)

    @property
    def has_len(self) -> bool:
        """Whether `len` works."""
        return self.length is not None

    def __len__(self) -> int:
        if self.length is None:
            raise BadData(
                f"the length of {self.name} is unknown before a full pass; expected a list or a "
                f"Dataset"
            )
        return self.length

    def __repr__(self) -> str:
        count = "unknown" if self.length is None else f"{self.length:,}"
        return f"<Rows: {count} rows of {self.name}>"

    @property
    def labels(self) -> Ints | None:
        """All labels, int64 [n], where they are known without a full pass; otherwise None."""
        if isinstance(self.source, Stream):
            return None
        labels = self.source.labels
        if labels is None:
            return None
        return labels[self._numbers(self.keep)]

    @property
    def can_take(self) -> bool:
        """Whether `take` works: rows by number, in any order."""
        return not isinstance(self.source, Stream)

    @property
    def one_pass(self) -> bool:
        """Whether these rows can be iterated only once."""
        return isinstance(self.source, Stream) and self.source.once

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over all rows of x. It takes a full pass, unless there was one.

        Raises:
            BadData: the rows can be iterated only once, and were not yet.
        """
        if self._fingerprint is None:
            if self.one_pass:
                raise BadData(
                    f"{self.name} can be walked only once and was not yet; walk it, then ask again"
                )
            for _ in self.batches(1024):  # the last batch sets the fingerprint
                pass
        assert self._fingerprint is not None
        return self._fingerprint

    def select(self, selection: slice) -> Rows:
        """Select some of these rows, which keep their numbers in the source.

        Args:
            selection: `slice(a, b, step)`, with 0 <= a < b.

        Raises:
            InvalidArgument: the selection is not a slice.
            BadData: it is empty, or goes beyond the last row.
        """
        if not isinstance(selection, slice):
            raise InvalidArgument(
                f"selection must be a slice, such as slice(0, 1000), got a "
                f"{type(selection).__name__}; take(positions) reads rows by number"
            )
        text = specs.tell(selection)
        keep = specs.chosen(self.keep, selection, text, self.name, self.length)
        return Rows(
            self.source, name=f"{self.name}[{text}]", class_names=self.class_names, keep=keep
        )

    def numbered_as(self, names: Sequence[str]) -> Rows:
        """Number the classes as a network does.

        Args:
            names: the network's class names, in the order of its outputs.

        Returns:
            The same rows with other labels. Rows without class names stay as they are.

        Raises:
            BadData: the rows have a class that is not among the names.
        """
        if self.class_names is None:
            return self
        numbers = renumbering(self.class_names, tuple(names), self.name)
        if numbers is None:
            return self
        if isinstance(self.source, Stream):
            raise BadData(
                f"{self.name} is a stream with other class names than the network; hand over a "
                f"Dataset"
            )
        return Rows(
            Renumbered(self.source, numbers),
            name=self.name,
            class_names=tuple(names),
            keep=self.keep,
        )

    def take(self, positions: Ints) -> Batch:
        """Read rows by their positions in the selection, in the order asked for.

        Args:
            positions: integers [b] from 0 to len - 1.

        Raises:
            BadData: the rows are a stream, or there is no row at a position.
        """
        x, y, index = self._taken(positions)
        return Batch(x, y, index, digests_of(x))

    def take_x(self, positions: Ints) -> X:
        """The x of `take`, without digests: they cost more time than a small step of training."""
        return self._taken(positions)[0]

    def _taken(self, positions: Ints) -> EngineStage:
        if isinstance(self.source, Stream):
            raise BadData(
                f"{self.name} is a stream of batches; expected rows by number: hand over arrays "
                f"or a Dataset"
            )
        at = np.asarray(positions)
        is_list = at.ndim == 1 and at.dtype.kind in "iu" and len(at) > 0
        if not is_list or at.min() < 0 or at.max() >= len(self):
            raise BadData(
                f"positions must be a list of integers in 0 .. {len(self) - 1}, got {at!r:.80}"
            )
        # Position p of the selection is row start + p * step of the source.
        index = self.keep.start + at.astype(np.int64) * self.keep.step
        x, y = self.source.take(index)
        return x, y, index

    def batches(self, size: int, turn: slice = EVERY) -> Iterator[Batch]:
        """Iterate over the rows in order.

        Args:
            size: rows per batch; the last batch may be smaller.
            turn: which of the batches to give, slice(first, None, step). The rows of the others are
                not read, except in a stream.

        Raises:
            BadData: a row is damaged; the error comes when it is reached.
        """
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise BadData(f"the batch size is {size!r}; expected an integer of at least 1")
        if isinstance(self.source, Stream):
            selected = _selected(self.source.chunks(), self.keep, self.name)
            resized = _rechunk(_checked(selected), size)
            return self._pass(islice(resized, turn.start, None, turn.step), turn)
        return self._pass(_checked(self._steps(self.source, size, turn)), turn)

    def _steps(self, source: Indexed, size: int, turn: slice) -> Iterator[EngineStage]:
        for start in range(0, len(self.keep), size)[turn]:
            index = self._numbers(self.keep[start : start + size])
            x, y = source.take(index)
            yield x, y, index

    def _pass(self, parts: Iterator[EngineStage], turn: slice) -> Iterator[Batch]:
        """Parts as batches with digests. A full pass also gives the fingerprint."""
        digests = []
        for x, y, row in parts:
            digest = digests_of(x)
            digests.append(digest)
            yield Batch(x, y, row, digest)
        # A pass that skipped batches has not seen all rows.
        if turn == EVERY:
            self._fingerprint = fingerprint_of(np.concatenate(digests))

    @staticmethod
    def _numbers(keep: range) -> Ints:
        return np.arange(keep.start, keep.stop, keep.step, dtype=np.int64)


def _selected(
    chunks: Iterator[tuple[X, Ints | None]], keep: range, name: str
) -> Iterator[EngineStage]:
    """The selected rows of each chunk. Raises BadData at the end of a stream that is too short."""
    seen = 0
    for x, y in chunks:
        # Which of the rows in this chunk are among start, start + step, ... before stop.
        row = np.arange(seen, seen + count(x), dtype=np.int64)
        seen += len(row)
        inside = (row >= keep.start) & (row < keep.stop) & ((row - keep.start) % keep.step == 0)
        if inside.any():
            at = np.flatnonzero(inside)
            yield pick(x, at), None if y is None else y[at], row[at]
        if seen > keep[-1]:
            return
    if seen <= keep.start or keep.stop < ENDLESS:
        missing = keep.start if seen <= keep.start else keep[-1]
        raise BadData(
            f"{name} ended after {seen} rows; expected row {missing} too: choose rows that exist"
        )


def _checked(parts: Iterator[EngineStage]) -> Iterator[EngineStage]:
    """Parts of one layout, all with labels or all without."""
    first: EngineStage | None = None
    for part in parts:
        first = first or part
        where = f"the batch at row {part[2][0]}"
        same_layout(layout(first[0]), layout(part[0]), where)
        same_labels(first[1] is None, part[1] is None, where)
        yield part


def _rechunk(parts: Iterator[EngineStage], size: int) -> Iterator[EngineStage]:
    """The same rows, `size` at a time."""
    held: list[EngineStage] = []  # parts that were not given yet
    held_rows = 0
    for part in parts:
        held.append(part)
        held_rows += len(part[2])
        if held_rows < size:
            continue
        # Give as many full batches as there are, and hold the rest.
        joined = _join(held)
        rest = held_rows % size
        for start in range(0, held_rows - rest, size):
            yield _cut(joined, start, start + size)
        held = [_cut(joined, held_rows - rest, held_rows)] if rest else []
        held_rows = rest
    if held:
        yield _join(held)


def _join(parts: list[EngineStage]) -> EngineStage:
    x = join([x for x, _, _ in parts])
    row = np.concatenate([row for _, _, row in parts])
    labels = [y for _, y, _ in parts if y is not None]
    if not labels:
        return x, None, row
    return x, np.concatenate(labels), row


def _cut(part: EngineStage, start: int, stop: int) -> EngineStage:
    x, y, row = part
    labels = None if y is None else y[start:stop]
    return pick(x, slice(start, stop)), labels, row[start:stop]


def rows(data: object, labels: object = None) -> Rows:
    """Turn data of any kind into numbered rows.

    Args:
        data: Arrays, (x, y), a mapping of named arrays, a torch Dataset or DataLoader, an iterable
            of batches, or a spec such as "cifar10:DIR[1000:5000]" (see docs/reference/data.md).
        labels: [N], if `data` has none.

    Returns:
        Rows with a number in their source and a digest of their content.

    Raises:
        BadData: The data has no rows, or is not of a kind that is known.
        BadFile: A file is missing or damaged.
    """
    if labels is not None and not (is_array(data) or isinstance(data, Mapping)):
        raise BadData(
            f"labels came beside a {type(data).__name__}; expected them beside an array or a dict "
            f"only: stack the rows "
            "to one array first"
        )
    # Rows and specs, then arrays, then torch's own classes, then any batches.
    if isinstance(data, Rows):
        return data
    if isinstance(data, str):
        return _of_spec(data)
    if is_array(data) or isinstance(data, Mapping):
        return Rows(arrays(data, labels))
    if isinstance(data, tuple) and len(data) == 2 and _is_pair(data[0], data[1]):
        return Rows(arrays(data[0], data[1]))
    source = from_torch(data)
    if source is not None:
        return Rows(
            source,
            name=type(getattr(data, "dataset", data)).__name__,
            class_names=class_names_of(data),
        )
    if isinstance(data, Iterable):
        if isinstance(data, list):
            require_batches(data)
        return Rows(batches_of(data), name=type(data).__name__)
    raise BadData(
        f"got a {type(data).__name__} as data; expected arrays, a Dataset, batches or a spec such "
        f"as 'npz:PATH'"
    )


def rows_for(network: object, data: object) -> Rows:
    """Turn data of any kind into rows whose classes are numbered as in a network.

    Args:
        network: its `class_names` are those of the rows that trained it. If it has none, the names
            in the configuration of a transformers model (`config.id2label`) are used, provided that
            one of them is a class of the rows.
        data: see `rows`.

    Returns:
        The rows.

    Raises:
        BadData: the rows have a class that the network was not trained for.
    """
    source = rows(data)
    names = getattr(network, "class_names", None)
    if names is None:
        own_names = set(source.class_names or ())
        for model_names in _names_in_models(network):
            if not own_names.isdisjoint(model_names):
                names = model_names
                break
    if names is None:
        return source
    return source.numbered_as(names)


def _names_in_models(network: object) -> Iterator[tuple[str, ...]]:
    """The class names in the configurations of a network's models, without made-up ones."""
    for module in getattr(network, "modules", tuple)():
        labels = getattr(getattr(module, "config", None), "id2label", None)
        if not isinstance(labels, dict) or not labels:
            continue
        names = tuple(str(labels.get(number, "LABEL_")) for number in range(len(labels)))
        # A model without names has LABEL_0, LABEL_1, ...
        if not any(name.startswith("LABEL_") for name in names):
            yield names


def _is_pair(x: object, y: object) -> bool:
    """Whether a tuple is (x, y), and not two batches.

    y is an array, None, or a plain list of labels. A batch is an array, a dict or a tuple itself.
    """
    if not (is_array(x) or isinstance(x, Mapping)):
        return False
    if is_array(y) or y is None:
        return True
    if not isinstance(y, list):
        return False
    for item in y:
        if isinstance(item, (list, tuple, Mapping)):
            return False
    return True


def _of_spec(text: str) -> Rows:
    """The rows of a spec."""
    spec = specs.parse(text)
    loaded = rows(specs.load(spec))
    everything = Rows(
        loaded.source, name=spec.whole, class_names=loaded.class_names, keep=loaded.keep
    )
    if spec.selection is None:
        return everything
    return everything.select(specs.selection(spec, everything.length))
