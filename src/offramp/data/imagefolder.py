"""Images in one folder per class: `DIR/<class>/*.png`."""

from __future__ import annotations

from pathlib import Path
from typing import final

import numpy as np

from offramp.data._check import Ints, X, reading
from offramp.data._images import Size, decode, shape_of
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def load(place: str, split: str, *, size: Size | None = None) -> Rows:
    """uint8 RGB [3, H, W]; classes are the sorted folder names, rows are sorted by class and file name.

    A split is a folder between: `DIR/<split>/<class>`; without one, `DIR/test` where that holds classes, else
    DIR. All images share one size, unless `size` (H, W) resizes them bilinearly: `imagefolder@224x224:DIR`.
    """
    root = Path(place)
    with reading(place or "no place", "a folder of class folders"):
        if not place or not root.is_dir():
            raise FileNotFoundError(place)
        if split or any(_images(inner) for inner in _folders(root / "test")):
            root = root / (split or "test")
        folders = _folders(root)
        files = [(path, label) for label, folder in enumerate(folders) for path in _images(folder)]
    if not files:
        inner = [folder.name for folder in folders if _folders(folder)]
        way = f"say imagefolder/{inner[0]}:{place}" if inner else "check the place"
        raise BadFile(f"{root} has no <class>/*.png, jpg, bmp or webp; expected a folder for each class: {way}")
    source = Images([path for path, _ in files], np.array([label for _, label in files]), size)
    return Rows(source, name=f"imagefolder:{place}", class_names=tuple(folder.name for folder in folders))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


@final
class Images:
    """Image files, decoded when they are taken."""

    def __init__(self, files: list[Path], labels: Ints, size: Size | None) -> None:
        self.files, self.size, self.length = files, size, len(files)
        self.labels: Ints | None = labels
        self._shape = size or shape_of(_read(files[0]), str(files[0]))[1]

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        assert self.labels is not None
        return np.stack([self._image(int(row)) for row in index]), self.labels[index]

    def _image(self, row: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        path = self.files[row]
        image = decode(_read(path), f"{path} (row {row})", "RGB", self.size)
        if image.shape[1:] != self._shape:
            got, first = ("x".join(map(str, shape)) for shape in (image.shape[1:], self._shape))
            raise BadData(
                f"{path} (row {row}) is {got} (height x width), the first image {first}; every image must share one "
                f"size: resize them with imagefolder@{first}:DIR"
            )
        return image


def _read(path: Path) -> bytes:
    with reading(path, "an image file"):
        return path.read_bytes()
