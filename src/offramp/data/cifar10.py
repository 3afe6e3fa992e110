"""Reads CIFAR-10, as Parquet files of PNGs (Hugging Face layout) or as its authors' binary files.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np

from offramp.data._check import Ints, X, reading
from offramp.data._tables import ColumnTable
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BINARY = {
    "test": ["test_batch.bin"],
    "train": [
        "data_batch_1.bin",
        "data_batch_2.bin",
        "data_batch_3.bin",
        "data_batch_4.bin",
        "data_batch_5.bin",
    ],
}
RECORD = 3073  # one byte of label, then 3 x 32 x 32 pixels


def load(location: str, split: str) -> Rows:
    """Read CIFAR-10 as uint8 [3, 32, 32], with labels 0 to 9.

    Args:
        location: DIR. It and DIR/cifar10 are searched, first for `SPLIT-*.parquet`, then for the
            binary files, also in `cifar-10-batches-bin/`.
        split: test (10,000 rows, the default) or train (50,000 rows).

    Raises:
        BadData: there is no such split.
        BadFile: the files are missing or damaged.
    """
    split = split or "test"
    if split not in BINARY:
        raise BadData(f"cifar10 has no split {split!r}; expected test or train")
    name = f"cifar10/{split}:{location}"
    folders = [Path(location), Path(location) / "cifar10"]
    for folder in folders:
        files = sorted(folder.glob(f"{split}-*.parquet")) if folder.is_dir() else []
        if files:
            return Rows(_table(files), name=name, class_names=CLASSES)
    for outer in folders:
        for folder in (outer, outer / "cifar-10-batches-bin"):
            if (folder / BINARY[split][0]).is_file():
                records = Records([folder / file for file in BINARY[split]])
                return Rows(records, name=name, class_names=CLASSES)
    raise BadFile(
        f"{location or 'the current folder'} has no {split}-*.parquet and no "
        f"cifar-10-batches-bin/{BINARY[split][0]}; "
        "expected CIFAR-10 there or in cifar10/: check the place"
    )


def _table(files: list[Path]) -> ColumnTable:
    """The Parquet files. Raises BadData unless they have images and labels from 0 to 9."""
    table = ColumnTable(files)
    if not table.is_image or table.labels is None:
        raise BadData(
            f"{files[0]} has no image or no label column; expected both: give CIFAR-10's own files"
        )
    if table.labels.max() > 9:
        row = int(table.labels.argmax())
        raise BadData(
            f"row {row} of {files[0].parent} has label {table.labels[row]}; expected 0 to 9"
        )
    return table


@final
class Records:
    """The authors' binary files, mapped into memory and read where rows are taken."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [_mapped(path) for path in files]
        # The number of the first row of each file, and after them the number of all rows.
        self._starts = np.cumsum([0, *map(len, self._files)])
        self.length = int(self._starts[-1])
        labels = np.concatenate([file[:, 0] for file in self._files])  # uint8 [n]
        self.labels: Ints | None = labels.astype(np.int64)
        if self.labels.max() > 9:
            row = int(self.labels.argmax())
            raise BadFile(
                f"row {row} of {files[0].parent} has label {self.labels[row]}; expected 0 to 9: "
                f"fetch again"
            )

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        x = np.empty((len(index), 3, 32, 32), dtype=np.uint8)
        for start, file in zip(self._starts, self._files, strict=False):
            inside = (index >= start) & (index < start + len(file))
            pixels = file[index[inside] - start, 1:]  # [k, 3072]
            x[inside] = pixels.reshape(-1, 3, 32, 32)
        assert self.labels is not None
        return x, self.labels[index]


def _mapped(path: Path) -> np.memmap[tuple[int, int], np.dtype[np.uint8]]:
    """A file of records as uint8 [n, 3073]."""
    with reading(path, "a CIFAR-10 binary file"):
        size = path.stat().st_size
        if size == 0 or size % RECORD:
            raise BadFile(
                f"{path} has {size} bytes; expected a multiple of {RECORD}: it is truncated, "
                f"fetch it again"
            )
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(size // RECORD, RECORD))
