"""Files of images in folders: finding them, and reading them as rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np

from offramp._support.files import Array
from offramp.data._check import Ints, X, reading
from offramp.data._images import ENDINGS, OtherSize, Resizing, decode, shape_of, told

KINDS = "PNG, JPEG, BMP, WebP, TIFF, PPM or GIF images"
NOT_DATA = ("thumbs.db", "desktop.ini")  # written by operating systems; hidden files do not count
NOT_FOLDERS = ("__MACOSX", "__pycache__")


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted by folder and then by name, as torchvision sorts them."""
    return sorted(walk(folder), key=lambda path: (str(path.parent), path.name))


def walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, without hidden ones. Links are followed."""
    real = os.path.realpath(folder)
    if real in above:  # a link leads back to a folder above it
        return
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in NOT_FOLDERS:
            continue
        if path.is_dir():
            yield from walk(path, (*above, real))
        elif path.is_file():
            yield path


def is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def loose_files(root: Path) -> list[Path]:
    """The files next to the class folders, without hidden ones."""
    files = list[Path]()
    for path in root.iterdir():
        if path.is_file() and not path.name.startswith("."):
            files.append(path)
    return files


def kinds_of(files: list[Path]) -> str:
    """How many files have which ending: `3 .heic, 1 .txt`."""
    counts = Counter(path.suffix.lower() or "without ending" for path in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))


@final
class Images:
    """Image files, decoded when they are taken.

    Args:
        files: one a row.
        labels: the class [n] of each row; None without.
        as_asked: resizing and cropping.
        spec: the spec that was read, without options, for messages.
    """

    def __init__(
        self, files: list[Path], labels: Ints | None, as_asked: Resizing, spec: str
    ) -> None:
        self.files = files
        self.as_asked = as_asked
        self.spec = spec
        self.length = len(files)
        self.labels = labels
        # The size of all images: as asked, or as the first image has it.
        if as_asked.fixes is not None:
            self._shape = as_asked.fixes
        else:
            first = str(files[0])
            _, shape = shape_of(_read(files[0]), first)
            self._shape = as_asked.shape(shape, first)

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        images = [self._image(int(row)) for row in index]  # each [3, H, W]
        if self.labels is None:
            return np.stack(images), None
        return np.stack(images), self.labels[index]

    def _image(self, row: int) -> Array:
        path = self.files[row]
        image = decode(_read(path), f"{path} (row {row})", "RGB", self.as_asked)
        if image.shape[1:] != self._shape:
            found = (
                f"{path} (row {row}) is {told(image.shape[1:])} (height x width), the first "
                f"image {told(self._shape)}"
            )
            raise OtherSize(found, self.spec)
        return image


def _read(path: Path) -> bytes:
    with reading(path, "an image file"):
        return path.read_bytes()
