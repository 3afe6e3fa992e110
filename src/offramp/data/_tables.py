"""Rows out of Parquet files, one row group at a time: encoded images or lists of numbers, and
labels by name.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from offramp._support.files import Array, require_memory
from offramp.data._check import Ints, X, name_rows, reading, to_labels
from offramp.data._classes import SPLITS, is_split
from offramp.data._images import AS_THEY_ARE, OtherSize, Resizing, Size, decode, shape_of
from offramp.errors import BadData, BadFile, MissingExtra

LABELS = (
    *(
        "label",
        "labels",
        "target",
        "targets",
        "y",
        "fine_label",
        "class",
        "cls",
        "category",
        "class_label",
    ),
    *("label_id", "class_id", "category_id", "label_idx", "class_idx", "classes"),
)
INPUTS = ("image", "img", "images", "x", "features", "pixel_values", "data", "inputs")
CACHED_BYTES = 64_000_000


class RowGroup(NamedTuple):
    """A row group: `number` in `file`, holding rows from `start` on."""

    file: Path
    number: int
    start: int
    rows: int


def pyarrow() -> Any:
    """The module pyarrow with its parquet part, or MissingExtra."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as problem:
        raise MissingExtra("pyarrow", "data", "reading Parquet files") from problem
    return pyarrow


@final
class ColumnTable:
    """The rows of Parquet files in the order given; images are decoded when they are taken."""

    def __init__(
        self,
        files: Sequence[Path],
        as_asked: Resizing = AS_THEY_ARE,
        *,
        x: str = "",
        label: str = "",
        spec: str = "",
    ) -> None:
        self.as_asked = as_asked
        self.spec = spec or f"parquet:{files[0]}"
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._groups: list[RowGroup] = []
        schema = open_file(files[0]).schema_arrow
        self.column, self.label, self.is_image = columns_of(schema, files[0], x, label)
        self.others = tuple(name for name in schema.names if name not in (self.column, self.label))
        for file in files:
            self._add(file)
        last = self._groups[-1] if self._groups else RowGroup(files[0], 0, 0, 0)
        self.length = last.start + last.rows
        if self.length == 0:
            raise BadData(f"{files[0]} holds no rows; expected at least one: give another file")
        self._starts = np.array([group.start for group in self._groups], dtype=np.int64)
        self.class_names = _class_names(schema, self.label)
        self.labels: Ints | None = None
        self.texts: Array | None = None  # labels as text, which their reader numbers
        if self.label is not None:
            values = self._read_labels(files, self.label)
            if values.dtype.kind in "OU" and all(isinstance(one, str) for one in values):
                self.texts = values
            else:
                self.labels = to_labels(
                    values, range(self.length), f"the label column {self.label!r}"
                )
        self._mode, self._shape = self._first_image() if self.is_image else ("", (0, 0))

    def _add(self, file: Path) -> None:
        """Note the row groups of a file from its footer."""
        with reading(file, "a Parquet file"):
            opened = open_file(file)
            for name in filter(None, (self.column, self.label)):
                if name not in opened.schema_arrow.names:
                    raise BadFile(
                        f"{file} has no column {name!r}, the first file has; expected files of "
                        f"one kind"
                    )
            for number in range(opened.metadata.num_row_groups):
                rows = opened.metadata.row_group(number).num_rows
                if self._groups:
                    start = self._groups[-1].start + self._groups[-1].rows
                else:
                    start = 0
                if rows > 0:
                    self._groups.append(RowGroup(file, number, start, rows))

    def _read_labels(self, files: Sequence[Path], label: str) -> Array:
        y = np.concatenate([label_column(file, label) for file in files])
        if len(y) != self.length:
            raise BadFile(
                f"{files[0]} has {len(y)} labels for {self.length} rows; expected one each: write "
                f"it again"
            )
        return y

    def _first_image(self) -> tuple[str, Size]:
        (data,) = self._group(0).slice(0, 1).to_pylist()
        mode, shape = shape_of(self._bytes(data, 0), self._where(0))
        return mode, self.as_asked.fixes or self.as_asked.shape(shape, self._where(0))

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed; x is uint8 [k, C, H, W] or numbers [k, ...]."""
        groups = np.searchsorted(self._starts, index, side="right") - 1
        out: Array | None = None
        for number in np.unique(groups):
            places = np.flatnonzero(groups == number)
            part = self._values(int(number), index[places])
            if out is None:
                out = np.empty((len(index), *part.shape[1:]), dtype=part.dtype)
            elif out.shape[1:] != part.shape[1:]:
                raise BadData(self._odd(int(index[places[0]]), part.shape[1:], out.shape[1:]))
            out[places] = part
        assert out is not None
        return out, None if self.labels is None else self.labels[index]

    def _values(self, number: int, rows: Ints) -> Array:
        """Decoded rows that lie in one group, [k, ...]."""
        column = self._group(number).take(pyarrow().array(rows - self._groups[number].start))
        if not self.is_image:
            with reading(self._groups[number].file, f"numbers in the column {self.column!r}"):
                return dense(column, rows)
        images = [
            self._image(data, int(row)) for data, row in zip(column.to_pylist(), rows, strict=True)
        ]
        return np.stack(images)

    def _image(self, data: bytes | None, row: int) -> Array:
        image = decode(self._bytes(data, row), self._where(row), self._mode, self.as_asked)
        if image.shape[1:] != self._shape:
            got = list(image.shape[1:])
            first = list(self._shape)
            raise OtherSize(f"{self._where(row)} has shape {got}, row 0 has {first}", self.spec)
        return image

    def _odd(self, row: int, got: tuple[int, ...], expected: tuple[int, ...]) -> str:
        return (
            f"{self._where(row)} has shape {list(got)}, row 0 has {list(expected)}; every row "
            f"must share one: "
            "pad the lists"
        )

    def _bytes(self, data: bytes | None, row: int) -> bytes:
        if not data:
            raise BadData(
                f"{self._where(row)} has no bytes in the column {self.column!r}; fill or drop "
                f"this row"
            )
        return data

    def _where(self, row: int) -> str:
        group = self._groups[int(np.searchsorted(self._starts, row, side="right")) - 1]
        return f"row {row} ({group.file.name})"

    def _group(self, number: int) -> Any:
        """The x column of a row group as one Arrow array; a few are kept."""
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        group = self._groups[number]
        with reading(group.file, "a Parquet file"):
            arrow = pyarrow()
            opened = open_file(group.file)
            self._require_room(opened.metadata.row_group(group.number), group.file)
            column = opened.read_row_group(group.number, columns=[self.column]).column(self.column)
            if self.is_image and arrow.types.is_struct(column.type):
                column = arrow.compute.struct_field(column, "bytes")
            values = arrow.concat_arrays(column.chunks)
            if len(values) != group.rows:
                raise BadFile(
                    f"{group.file} promises {group.rows} rows and has {len(values)}; fetch or "
                    f"make it again"
                )
        self._cache[number] = values
        while (
            len(self._cache) > 1
            and sum(part.nbytes for part in self._cache.values()) > CACHED_BYTES
        ):
            self._cache.popitem(last=False)
        return values

    def _require_room(self, group: Any, file: Path) -> None:
        """Raise BadFile for a row group whose x would fill the memory, by what its footer says."""
        unpacked = 0
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.split(".")[0] == self.column:
                # numbers may be stored as runs of equal ones, far below the 8 bytes that they need
                # here
                values = 0 if self.is_image else chunk.num_values * 8
                unpacked += max(chunk.total_uncompressed_size, values)
        require_memory(file, file.stat().st_size, unpacked)


def open_file(file: Path) -> Any:
    """A ParquetFile whose pages are checked where they carry checksums."""
    with reading(file, "a Parquet file"):
        return pyarrow().parquet.ParquetFile(
            file, memory_map=False, page_checksum_verification=True
        )


def columns_of(schema: Any, file: Path, x: str, label: str) -> tuple[str, str | None, bool]:
    """The names of the x and the label column (None without), and whether x holds encoded images.

    Args:
        schema: of the file.
        file: for messages.
        x, label: as the user names them; "" for a name that is known, in capitals or not.
    """
    for asked in filter(None, (x, label)):
        if asked not in schema.names:
            raise BadData(f"{file} has no column {asked!r}; expected one of {schema.names}")
    found = label or next((name for name in _known(schema.names, LABELS) if name != x), None)
    kinds = {field.name: _kind(field.type) for field in schema if field.name != found}
    able = [name for name, kind in kinds.items() if kind is not None]
    named = [x] if x in able else [] if x else _known(able, INPUTS)
    if not able or (len(able) > 1 and not named) or (x and not named):
        if able:
            which = f"columns {able} that could be x"
        else:
            which = f"columns {schema.names}, none of which could be x"
        if not able and not x and any(pyarrow().types.is_floating(field.type) for field in schema):
            which += " (single numbers are no rows: hand over data frames, (df[names], df[label]))"
        raise BadData(
            f"{file} has {which}; expected one column of images (bytes) or of number lists: name "
            f"it 'image' or 'x', or "
            "say which with ?x=NAME"
        )
    name = named[0] if named else able[0]
    return name, found, kinds[name] == "image"


def _known(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """The names that are among some words, the first word first; capitals do not count."""
    return [name for word in words for name in names if name.lower() == word]


def label_column(file: Path, label: str) -> Array:
    """The labels in a file, [n]: numbers, or texts as objects."""
    with reading(file, "a Parquet file"):
        opened = open_file(file)
        require_memory(file, file.stat().st_size, opened.metadata.num_rows * 8)
        column = opened.read(columns=[label]).column(label)
        if pyarrow().types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        values: Array = column.to_numpy()
        return values


def _kind(kind: Any) -> str | None:
    """Say "image" for bytes or a struct with bytes, "numbers" for lists of numbers, None for the
    rest.
    """
    types = pyarrow().types
    if types.is_struct(kind):
        return next(
            ("image" for field in kind if field.name == "bytes" and _kind(field.type) == "image"),
            None,
        )
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "image"
    inner = kind
    while types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner):
        inner = inner.value_type
    plain = types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)
    return "numbers" if inner is not kind and plain else None


def dense(column: Any, rows: Ints) -> Array:
    """An Arrow list array of n equally long (nested) lists -> [n, ...]; BadData names the odd
    rows.
    """
    if column.null_count:
        raise BadData(
            f"{name_rows(rows[column.is_null().to_numpy(False)])} is null; fill or drop it"
        )
    shape = [len(column)]
    while hasattr(column.type, "value_type"):
        lengths = pyarrow().compute.list_value_length(column).to_numpy(False)
        per_row = len(lengths) // shape[0]
        odd = np.flatnonzero(lengths != lengths[0]) // per_row
        if len(odd):
            raise BadData(
                f"{name_rows(rows[np.unique(odd)])} differs in length from those before; pad the "
                f"lists"
            )
        shape.append(int(lengths[0]))
        column = column.flatten()
        if column.null_count or not len(column):
            raise BadData(
                f"the lists of {name_rows(rows)} are empty or hold nulls; fill or drop them"
            )
    values: Array = column.to_numpy(zero_copy_only=False).reshape(shape)
    return values


def _class_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Class names from the metadata that Hugging Face `datasets` writes; None where there are
    none.
    """
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
        return tuple(map(str, names)) if isinstance(names, list) and names else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def files_of(path: Path, split: str) -> list[Path]:
    """The Parquet files at a place, by name: itself, or those of a split of a folder (see
    parquet.load).
    """
    if path.is_file():
        if split:
            raise BadData(f"{path} is one file, which has no split {split!r}; leave the split out")
        return [path]
    with reading(path, "a Parquet file or a folder of them"):
        if not path.is_dir():
            raise FileNotFoundError(path)
        wanted = split or "test"
        chosen = files_in(path, wanted) or ([] if split else sorted(path.glob("*.parquet")))
    if not chosen:
        raise BadFile(
            f"{path} has no Parquet files of the split {wanted!r}; expected {wanted}-*.parquet or "
            f"{wanted}/*.parquet: check the place and the split"
        )
    return chosen


def files_in(folder: Path, split: str) -> list[Path]:
    """The files of a split: `split-*.parquet`, `split.parquet`, else `split/*.parquet`."""
    found = [
        file
        for file in folder.glob("*.parquet")
        if file.stem == split or file.name.startswith(f"{split}-")
    ]
    return sorted(found) or sorted((folder / split).glob("*.parquet"))


def splits_beside(files: Sequence[Path]) -> tuple[str, dict[str, list[Path]]]:
    """The split that some files are by name ("" for none), and the files of all splits beside them
    by split.
    """
    first = files[0].absolute()
    for folder, word in (
        (first.parent, first.stem.split("-")[0]),
        (first.parent.parent, first.parent.name),
    ):
        if is_split(word):
            found = {split: files_in(folder, split) for split in SPLITS}
            return word, {
                **{split: some for split, some in found.items() if some},
                word: list(files),
            }
    return "", {"": list(files)}
