"""The one form in which the rest of the house sees data: numbered rows, in order, a batch at a
time.

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
from offramp.errors import BadData
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
ENDLESS = sys.maxsize
EVERY = slice(0, None, 1)


@dataclass(frozen=True)
class Batch:
    """b rows. x [b, ...] (or named arrays), y int64 [b] or None, row int64 [b], digest uint64 [b].

    `row` counts in the source, before any selection; `digest` identifies the content of x (see
    _digests.py).
    """

    x: X
    y: Ints | None
    row: Ints
    digest: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.row)


@final
class Rows:
    """Numbered rows of one source, or a selection of them. `keep` holds the source's numbers of the
    rows.
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
        self.keep = (
            keep if keep is not None else range(ENDLESS if source.length is None else source.length)
        )
        self._fingerprint: str | None = None
        if not self.keep:
            raise BadData(f"{name} holds 0 rows; expected at least one: hand over more")

    @property
    def length(self) -> int | None:
        """How many rows there are; None for a stream without a known end."""
        return None if self.keep.stop >= ENDLESS else len(self.keep)

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
        return (
            f"<Rows: {'unknown' if self.length is None else f'{self.length:,}'} rows of "
            f"{self.name}>"
        )

    @property
    def labels(self) -> Ints | None:
        """All labels, int64 [n], where they are known without a pass; else None."""
        known = None if isinstance(self.source, Stream) else self.source.labels
        return None if known is None else known[self._numbers(self.keep)]

    @property
    def can_take(self) -> bool:
        """Whether `take` works: rows by number, in any order."""
        return not isinstance(self.source, Stream)

    @property
    def one_pass(self) -> bool:
        """Whether these rows can be walked only once."""
        return isinstance(self.source, Stream) and self.source.once

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over all rows of x; makes a full pass unless there was one.

        Raises BadData for what can be walked only once and was not yet.
        """
        if self._fingerprint is None:
            if self.one_pass:
                raise BadData(
                    f"{self.name} can be walked only once and was not yet; walk it, then ask again"
                )
            for _ in self.batches(1024):
                pass
        assert self._fingerprint is not None
        return self._fingerprint

    def select(self, selection: slice) -> Rows:
        """Some of these rows, `slice(a, b, step)` with a < b of at least 0; they keep the source's
        numbers.
        """
        text = specs.tell(selection)
        keep = specs.chosen(self.keep, selection, text, self.name, self.length)
        return Rows(
            self.source, name=f"{self.name}[{text}]", class_names=self.class_names, keep=keep
        )

    def numbered_as(self, names: Sequence[str]) -> Rows:
        """These rows with their classes numbered as a network knows them, where both have names of
        their classes.

        Args:
            names: the network's class names, in the order of its answers.

        Raises:
            BadData: the rows have a class that is not among the names.
        """
        if self.class_names is None:
            numbers = None
        else:
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
        """The rows at these positions of the selection (0 .. len - 1), in the order asked for."""
        x, y, index = self._taken(positions)
        return Batch(x, y, index, digests_of(x))

    def take_x(self, positions: Ints) -> X:
        """The x of `take` without the digests, which cost more than a small step of training."""
        return self._taken(positions)[0]

    def _taken(self, positions: Ints) -> EngineStage:
        if isinstance(self.source, Stream):
            raise BadData(
                f"{self.name} is a stream of batches; expected rows by number: hand over arrays "
                f"or a Dataset"
            )
        at = np.asarray(positions)
        if (
            at.ndim != 1
            or at.dtype.kind not in "iu"
            or len(at) == 0
            or at.min() < 0
            or at.max() >= len(self)
        ):
            raise BadData(
                f"positions must be a list of integers in 0 .. {len(self) - 1}, got {at!r:.80}; "
                f"choose others"
            )
        index = self.keep.start + at.astype(np.int64) * self.keep.step
        return *self.source.take(index), index

    def batches(self, size: int, turn: slice = EVERY) -> Iterator[Batch]:
        """The rows in order, `size` at a time, the last batch smaller; damaged rows raise when they
        come.

        turn: which of these batches, slice(first, None, step); the rows of the others are not read,
        but in a stream.
        """
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise BadData(f"the batch size is {size!r}; expected an integer of at least 1")
        if isinstance(self.source, Stream):
            chunks = _kept(self.source.chunks(), self.keep, self.name)
            return self._pass(
                islice(_rechunk(_checked(chunks), size), turn.start, None, turn.step), turn
            )
        return self._pass(_checked(self._steps(self.source, size, turn)), turn)

    def _steps(self, source: Indexed, size: int, turn: slice) -> Iterator[EngineStage]:
        for start in range(0, len(self.keep), size)[turn]:
            index = self._numbers(self.keep[start : start + size])
            yield *source.take(index), index

    def _pass(self, parts: Iterator[EngineStage], turn: slice) -> Iterator[Batch]:
        digests = []
        for x, y, row in parts:
            digests.append(digests_of(x))
            yield Batch(x, y, row, digests[-1])
        if turn == EVERY:
            self._fingerprint = fingerprint_of(np.concatenate(digests))

    @staticmethod
    def _numbers(keep: range) -> Ints:
        return np.arange(keep.start, keep.stop, keep.step, dtype=np.int64)


def _kept(chunks: Iterator[tuple[X, Ints | None]], keep: range, name: str) -> Iterator[EngineStage]:
    """The kept rows of each chunk of a stream; BadData at its end when it was shorter than the
    selection.
    """
    seen = 0
    for x, y in chunks:
        row = np.arange(seen, seen + count(x), dtype=np.int64)
        seen += len(row)
        inside = (row >= keep.start) & (row < keep.stop) & ((row - keep.start) % keep.step == 0)
        if inside.any():
            at = np.flatnonzero(inside)
            yield pick(x, at), None if y is None else y[at], row[at]
        if seen > keep[-1]:
            return
    if seen <= keep.start or keep.stop < ENDLESS:
        wanted = f"row {keep.start if seen <= keep.start else keep[-1]}"
        raise BadData(
            f"{name} ended after {seen} rows; expected {wanted} too: choose rows that there are"
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
    held: list[EngineStage] = []
    n = 0
    for part in parts:
        held.append(part)
        n += len(part[2])
        if n >= size:
            whole = _join(held)
            rest = n % size
            yield from (_cut(whole, start, start + size) for start in range(0, n - rest, size))
            held = [_cut(whole, n - rest, n)] if rest else []
            n = rest
    if held:
        yield _join(held)


def _join(held: list[EngineStage]) -> EngineStage:
    x = join([each[0] for each in held])
    row = np.concatenate([each[2] for each in held])
    labels = [each[1] for each in held if each[1] is not None]
    return x, np.concatenate(labels) if labels else None, row


def _cut(part: EngineStage, start: int, stop: int) -> EngineStage:
    x, y, row = part
    return pick(x, slice(start, stop)), None if y is None else y[start:stop], row[start:stop]


def rows(data: object, labels: object = None) -> Rows:
    """Turn whatever holds data into numbered rows.

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
    """Whatever holds data, with its classes numbered as the network knows them.

    Args:
        network: its `class_names` are those of the rows that trained it. Where there are none, a
            model of transformers names its classes itself (`config.id2label`), and counts if a name
            is the same.
        data: see `rows`.

    Raises:
        BadData: the rows have a class that the network was not trained.
    """
    source = rows(data)
    names = getattr(network, "class_names", None)
    if names is None:
        own = set(source.class_names or ())
        names = next((each for each in _names_in_models(network) if own & set(each)), None)
    return source if names is None else source.numbered_as(names)


def _names_in_models(network: object) -> Iterator[tuple[str, ...]]:
    """The class names in the configurations of a network's models, but those that stand for none
    (LABEL_0).
    """
    for module in getattr(network, "modules", tuple)():
        found = getattr(getattr(module, "config", None), "id2label", None)
        if isinstance(found, dict) and found:
            names = [str(found.get(number, "LABEL_")) for number in range(len(found))]
            if not any(name.startswith("LABEL_") for name in names):
                yield tuple(names)


def _is_pair(x: object, y: object) -> bool:
    """Whether a tuple is (x, y), and not two batches: a batch is an array, a dict or a tuple
    itself.
    """
    if not (is_array(x) or isinstance(x, Mapping)):
        return False
    plain_list = isinstance(y, list) and not any(
        isinstance(one, (list, tuple, Mapping)) for one in y
    )
    return is_array(y) or y is None or plain_list


def _of_spec(text: str) -> Rows:
    spec = specs.parse(text)
    made = rows(specs.load(spec))
    whole = Rows(made.source, name=spec.whole, class_names=made.class_names, keep=made.keep)
    if spec.selection is None:
        return whole
    return whole.select(specs.selection(spec, whole.length))
