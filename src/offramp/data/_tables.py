"""Reads rows from Parquet files, one row group at a time.

Inputs are encoded images or lists of numbers; labels are found by name.
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
    "label_id",
    "class_id",
    "category_id",
    "label_idx",
    "class_idx",
    "classes",
)
INPUTS = ("image", "img", "images", "x", "features", "pixel_values", "data", "inputs")
CACHED_BYTES = 64_000_000  # of row groups that are held in memory


class RowGroup(NamedTuple):
    """A row group: number `number` in `file`, with `rows` rows from row `start` on."""

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
    """The rows of Parquet files, in the order of the files. Images are decoded when they are taken.

    Args:
        files: with the same columns.
        as_asked: resizing and cropping of images.
        x: name of the column of inputs; "" for a known name, or the only possible column.
        label: name of the column of labels; "" for a known name.
        spec: that is read, for messages.

    Raises:
        BadData: there are no rows, or the columns are not clear.
        BadFile: a file cannot be read, or is of another kind than the first.
    """

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
        others = list[str]()  # columns that are not read
        for name in schema.names:
            if name not in (self.column, self.label):
                others.append(name)
        self.others = tuple(others)
        for file in files:
            self._add(file)
        self.length = self._rows_so_far()
        if self.length == 0:
            raise BadData(f"{files[0]} holds no rows; expected at least one: give another file")
        self._starts = np.array([group.start for group in self._groups], dtype=np.int64)
        self.class_names = _class_names(schema, self.label)
        self.labels: Ints | None = None
        self.texts: Array | None = None  # labels that are texts, for the caller to number
        if self.label is not None:
            values = self._read_labels(files, self.label)
            # Arrow gives texts as objects. `to_labels` refuses other objects, such as nulls.
            if values.dtype.kind in "OU" and all(isinstance(value, str) for value in values):
                self.texts = values
            else:
                self.labels = to_labels(
                    values, range(self.length), f"the label column {self.label!r}"
                )
        # Mode and size of the first image, which all others must have too.
        self._mode = ""
        self._shape: Size = (0, 0)
        if self.is_image:
            self._mode, self._shape = self._first_image()

    def _rows_so_far(self) -> int:
        if not self._groups:
            return 0
        last = self._groups[-1]
        return last.start + last.rows

    def _add(self, file: Path) -> None:
        """Note the row groups of a file from its footer."""
        with reading(file, "a Parquet file"):
            opened = open_file(file)
            for name in (self.column, self.label):
                if name and name not in opened.schema_arrow.names:
                    raise BadFile(
                        f"{file} has no column {name!r}, the first file has; expected files of "
                        f"one kind"
                    )
            for number in range(opened.metadata.num_row_groups):
                rows = opened.metadata.row_group(number).num_rows
                if rows > 0:
                    self._groups.append(RowGroup(file, number, self._rows_so_far(), rows))

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
        if self.as_asked.fixes is not None:
            return mode, self.as_asked.fixes
        return mode, self.as_asked.shape(shape, self._where(0))

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed; x is uint8 [k, C, H, W] or numbers [k, ...]."""
        # The row group of each row is the last one that starts at it or before it.
        groups = np.searchsorted(self._starts, index, side="right") - 1  # [k]
        out: Array | None = None
        # Each group is read once, and its rows are put where they were asked for.
        for number in np.unique(groups):
            at = np.flatnonzero(groups == number)
            part = self._values(int(number), index[at])
            if out is None:
                out = np.empty((len(index), *part.shape[1:]), dtype=part.dtype)
            elif out.shape[1:] != part.shape[1:]:
                raise BadData(self._odd(int(index[at[0]]), part.shape[1:], out.shape[1:]))
            out[at] = part
        assert out is not None
        if self.labels is None:
            return out, None
        return out, self.labels[index]

    def _values(self, number: int, rows: Ints) -> Array:
        """Decoded rows of one group, [k, ...]."""
        column = self._group(number).take(pyarrow().array(rows - self._groups[number].start))
        if not self.is_image:
            with reading(self._groups[number].file, f"numbers in the column {self.column!r}"):
                return dense(column, rows)
        images = list[Array]()  # each [C, H, W]
        for data, row in zip(column.to_pylist(), rows, strict=True):
            images.append(self._image(data, int(row)))
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
        """The x column of a row group as one Arrow array. The last ones are held in memory."""
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        group = self._groups[number]
        with reading(group.file, "a Parquet file"):
            arrow = pyarrow()
            opened = open_file(group.file)
            self._require_room(opened.metadata.row_group(group.number), group.file)
            column = opened.read_row_group(group.number, columns=[self.column]).column(self.column)
            # Hugging Face stores an image as a struct of its bytes and its path.
            if self.is_image and arrow.types.is_struct(column.type):
                column = arrow.compute.struct_field(column, "bytes")
            values = arrow.concat_arrays(column.chunks)
            if len(values) != group.rows:
                raise BadFile(
                    f"{group.file} promises {group.rows} rows and has {len(values)}; fetch or "
                    f"make it again"
                )
        self._cache[number] = values
        # Drop those that were not used for the longest time.
        held = sum(part.nbytes for part in self._cache.values())
        while len(self._cache) > 1 and held > CACHED_BYTES:
            _, dropped = self._cache.popitem(last=False)
            held -= dropped.nbytes
        return values

    def _require_room(self, group: Any, file: Path) -> None:
        """Raise BadFile if the footer shows that the x of a row group would fill the memory."""
        unpacked = 0
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema.split(".")[0] == self.column:
                # Runs of equal numbers can be stored in far less than the 8 bytes per number that
                # they need in memory.
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
    """Find the columns of inputs and labels.

    Args:
        schema: of the file.
        file: for messages.
        x: the user's name for the column of inputs; "" for a known name, in capitals or not.
        label: the user's name for the column of labels; "" in the same way.

    Returns:
        The name of the inputs, the name of the labels (None without), and whether the inputs are
        encoded images.

    Raises:
        BadData: a column does not exist, or it is not clear which one has the inputs.
    """
    for asked in (x, label):
        if asked and asked not in schema.names:
            raise BadData(f"{file} has no column {asked!r}; expected one of {schema.names}")
    label_name: str | None = label or None
    if label_name is None:
        for name in _known(schema.names, LABELS):
            if name != x:
                label_name = name
                break

    # All other columns that could be inputs, by what they hold.
    kinds = dict[str, str]()
    for field in schema:
        kind = _kind(field.type)
        if field.name != label_name and kind is not None:
            kinds[field.name] = kind

    # The one that the user names, or one with a known name, or the only one.
    if x in kinds:
        return x, label_name, kinds[x] == "image"
    if not x:
        named = _known(list(kinds), INPUTS)
        if not named and len(kinds) == 1:
            named = list(kinds)
        if named:
            return named[0], label_name, kinds[named[0]] == "image"

    if kinds:
        which = f"columns {list(kinds)} that could be x"
    else:
        which = f"columns {schema.names}, none of which could be x"
    if not kinds and not x and any(pyarrow().types.is_floating(field.type) for field in schema):
        which += " (single numbers are no rows: hand over data frames, (df[names], df[label]))"
    raise BadData(
        f"{file} has {which}; expected one column of images (bytes) or of number lists: name "
        f"it 'image' or 'x', or "
        "say which with ?x=NAME"
    )


def _known(names: Sequence[str], words: Sequence[str]) -> list[str]:
    """The names that are among some words, the first word first; capitals do not count."""
    known = list[str]()
    for word in words:
        for name in names:
            if name.lower() == word:
                known.append(name)
    return known


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
    """What a column of an Arrow type can be.

    "image" for bytes or a struct with bytes, "numbers" for lists of numbers, None for the rest.
    """
    types = pyarrow().types
    if types.is_struct(kind):
        for field in kind:
            if field.name == "bytes" and _kind(field.type) == "image":
                return "image"
        return None
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "image"
    inner = kind  # the type inside nested lists
    while types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner):
        inner = inner.value_type
    is_number = types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)
    if inner is not kind and is_number:
        return "numbers"
    return None


def dense(column: Any, rows: Ints) -> Array:
    """Convert an Arrow array of equally long lists, which may be nested, to numbers [n, ...].

    Args:
        column: the lists.
        rows: numbers of the n rows, for messages.

    Raises:
        BadData: lists are empty, null or of different lengths; the message names the rows.
    """
    if column.null_count:
        raise BadData(
            f"{name_rows(rows[column.is_null().to_numpy(False)])} is null; fill or drop it"
        )
    # Each level of lists gives a dimension: [n], [n, a], [n, a, b], ...
    shape = [len(column)]
    while hasattr(column.type, "value_type"):
        lengths = pyarrow().compute.list_value_length(column).to_numpy(False)
        per_row = len(lengths) // shape[0]  # lists of this level in each row
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
    """Class names from the metadata that Hugging Face `datasets` writes; None without."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not names:
        return None
    return tuple(map(str, names))


def files_of(path: Path, split: str) -> list[Path]:
    """Find the Parquet files of a split, sorted by name.

    Args:
        path: a file, or a folder of splits.
        split: "" for test, or for all files of a folder without test files.

    Raises:
        BadData: a single file has no splits.
        BadFile: there are no such files.
    """
    if path.is_file():
        if split:
            raise BadData(f"{path} is one file, which has no split {split!r}; leave the split out")
        return [path]
    with reading(path, "a Parquet file or a folder of them"):
        if not path.is_dir():
            raise FileNotFoundError(path)
        wanted = split or "test"
        chosen = files_in(path, wanted)
        if not chosen and not split:
            chosen = sorted(path.glob("*.parquet"))
    if not chosen:
        raise BadFile(
            f"{path} has no Parquet files of the split {wanted!r}; expected {wanted}-*.parquet or "
            f"{wanted}/*.parquet: check the place and the split"
        )
    return chosen


def files_in(folder: Path, split: str) -> list[Path]:
    """The files of a split: `split-*.parquet` and `split.parquet`, or else `split/*.parquet`."""
    files = list[Path]()
    for file in folder.glob("*.parquet"):
        if file.stem == split or file.name.startswith(f"{split}-"):
            files.append(file)
    if files:
        return sorted(files)
    return sorted((folder / split).glob("*.parquet"))


def splits_beside(files: Sequence[Path]) -> tuple[str, dict[str, list[Path]]]:
    """Find the split that some files belong to, and the other splits of the same data set.

    Args:
        files: of one split.

    Returns:
        The name of their split ("" where they have none), and the files of all splits by name.
    """
    first = files[0].absolute()
    # Either DIR/<split>-0.parquet, or DIR/<split>/0.parquet.
    by_file = (first.parent, first.stem.split("-")[0])
    by_folder = (first.parent.parent, first.parent.name)
    for folder, word in (by_file, by_folder):
        if not is_split(word):
            continue
        splits = dict[str, list[Path]]()
        for split in SPLITS:
            in_split = files_in(folder, split)
            if in_split:
                splits[split] = in_split
        splits[word] = list(files)
        return word, splits
    return "", {"": list(files)}
