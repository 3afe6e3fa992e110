"""Reads MNIST, and data sets of the same form (Fashion-MNIST): four idx files, gzipped or not.

Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

from offramp._support.files import Array, require_memory
from offramp.data._check import reading
from offramp.data._sources import Arrays
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile

PREFIX = {"test": "t10k", "train": "train"}
IMAGES = 2051  # the first number in a file of images
LABELS = 2049  # the first number in a file of labels
MOST_ROWS = 1_000_000  # a header with more is damaged


def load(location: str, split: str) -> Rows:
    """Read MNIST as uint8 [1, 28, 28], with labels 0 to 9.

    Args:
        location: DIR; DIR/mnist is searched as well.
        split: test (10,000 rows, the default) or train (60,000 rows).

    Raises:
        BadData: there is no such split.
        BadFile: a file is missing or damaged.
    """
    split = split or "test"
    if split not in PREFIX:
        raise BadData(f"mnist has no split {split!r}; expected test or train")
    prefix = PREFIX[split]
    pixels = read_idx(_find(location, f"{prefix}-images-idx3-ubyte"), IMAGES, (28, 28))
    path = _find(location, f"{prefix}-labels-idx1-ubyte")
    y = read_idx(path, LABELS, ())
    if len(y) != len(pixels):
        raise BadFile(
            f"{path} has {len(y)} labels for {len(pixels)} images; expected as many: fetch the "
            f"files again"
        )
    if len(y) and y.max() > 9:
        raise BadFile(
            f"{path} has a label {y.max()} at row {y.argmax()}; expected 0 to 9: fetch the file "
            f"again"
        )
    source = Arrays(pixels[:, None], y.astype(np.int64))  # [n, 28, 28] -> [n, 1, 28, 28]
    return Rows(source, name=f"mnist/{split}:{location}", class_names=tuple("0123456789"))


def _find(location: str, name: str) -> Path:
    """A file in DIR or DIR/mnist, gzipped or not."""
    for folder in (Path(location), Path(location) / "mnist"):
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise BadFile(
        f"{location or 'the current folder'} has no {name}.gz; expected the four MNIST files "
        f"there or in mnist/"
    )


def read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> Array:
    """Read an idx file.

    Args:
        path: of the file, gzipped if it ends with .gz.
        magic: the number at its start.
        shape: of one item.

    Returns:
        uint8 [n, *shape].

    Raises:
        BadFile: it is damaged or of another kind.
    """
    header = struct.Struct(f">{2 + len(shape)}I")  # big-endian: magic, n, *shape
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path, "an idx file"), opened(path, "rb") as file:
        start = file.read(header.size)
        if len(start) < header.size:
            raise BadFile(f"{path} ends within its header; it is truncated: fetch it again")
        first, count, *sizes = header.unpack(start)
        if first != magic or tuple(sizes) != shape or count > MOST_ROWS:
            raise BadFile(
                f"{path} starts with {(first, count, *sizes)}; expected the idx header "
                f"{(magic, 'n', *shape)}: "
                "give the original file"
            )
        size = count * int(np.prod(shape, dtype=np.int64))
        require_memory(path, path.stat().st_size, size)
        body = file.read(size + 1)  # a byte more shows a file that is too long
    if len(body) != size:
        raise BadFile(
            f"{path} has {len(body)} bytes or more after its header; expected {size}: fetch it "
            f"again"
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(count, *shape)
