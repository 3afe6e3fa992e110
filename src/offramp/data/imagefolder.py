"""Images in one folder per class: `DIR/<class>/*.jpg`, and `DIR/<split>/<class>/*.jpg` with splits
between.

    imagefolder:photos/test
    imagefolder/validation:photos
    imagefolder/test:photos?resize=256&crop=224
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import final

import numpy as np

from offramp._support.files import Array
from offramp._support.notices import say
from offramp.data._check import Ints, X, reading
from offramp.data._classes import given_names, is_split, names_of, same, say_absent
from offramp.data._images import (
    ENDINGS,
    OtherSize,
    Resizing,
    Size,
    decode,
    resizing,
    shape_of,
    told,
)
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile

KINDS = "PNG, JPEG, BMP, WebP, TIFF, PPM or GIF images"
NOT_DATA = ("thumbs.db", "desktop.ini")  # written by systems; hidden files are not looked at either
NO_CLASSES = ("__MACOSX", "__pycache__")


def load(
    location: str,
    split: str,
    *,
    size: Size | None = None,
    resize: str = "",
    crop: str = "",
    interpolation: str = "",
    classes: str = "",
) -> Rows:
    """uint8 RGB [3, H, W]; rows are sorted by class, then by folder and file name, as torchvision
    sorts them.

    Args:
        place: the folder DIR of class folders, or of splits of them.
        split: a folder between, `DIR/<split>/<class>`; without one `DIR/test` where that holds
            classes, else DIR.
        size: H and W to which images are stretched: `imagefolder@224x224:DIR`.
        resize: the length that the shorter side gets, the aspect ratio kept.
        crop: N or HxW, cut out of the middle.
        interpolation: bilinear (default), bicubic or nearest.
        classes: the class names in the order of the network's answers, A,B,C or a file with one a
            line.

    Classes are numbered by name, in sorted order, over the training split (DIR/train beside this
    split) where there is one: a split that lacks a class has the same numbers. Images in deeper
    folders belong to the class folder above them; files that are no images are counted in a notice.

    Raises:
        BadData: images of several sizes, a class that the training split lacks.
        BadFile: a place without class folders, an image that cannot be decoded.
    """
    as_asked = resizing(size, resize, crop, interpolation)
    with reading(location or "no place", "a folder of class folders"):
        if not location or not Path(location).is_dir():
            raise FileNotFoundError(location)
        chosen, splits = _splits(Path(location), split)
        root = splits[chosen]
        folders = _class_folders(root)
        listed = {folder: _files(folder) for folder in folders}
        held = {
            name: [folder.name for folder in _class_folders(one)] for name, one in splits.items()
        }
    found = [
        (path, same(folder.name))
        for folder in folders
        for path in listed[folder]
        if _is_image(path)
    ]
    if not found:
        raise BadFile(_nothing_there(root))
    _require_one_spelling(folders)
    names = names_of(held, chosen, location, given_names(classes))
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([number[name] for _, name in found], dtype=np.int64)
    say_absent(names, labels, root)
    _say_left_out(root, folders, listed)
    spec = f"imagefolder{'/' if split else ''}{split}:{location}"
    source = Images([path for path, _ in found], labels, as_asked, spec)
    return Rows(source, name=f"imagefolder:{location}", class_names=names)


def _splits(path: Path, split: str) -> tuple[str, dict[str, Path]]:
    """Which split is read ("" for a folder without), and the folder of each split of the data set,
    also of this one.

    Splits have the usual names (train, val, test, ...), but for one that the user named.
    """
    roots = {folder.name: folder for folder in _class_folders(path) if _is_root(folder)}
    usual = {name: folder for name, folder in roots.items() if is_split(name)}
    if split:
        return split, {**(usual if is_split(split) else roots), split: path / split}
    if "test" in usual:
        return "test", usual
    if usual:
        raise BadFile(
            f"{path} has the splits {', '.join(usual)} and none called test; expected one to be "
            f"named: say "
            f"imagefolder/{next(iter(usual))}:{path}"
        )
    here = path.absolute()
    if is_split(here.name) and _is_root(path):  # the splits beside it say which classes there are
        beside = {
            folder.name: folder for folder in _class_folders(here.parent) if is_split(folder.name)
        }
        return here.name, {name: folder for name, folder in beside.items() if _is_root(folder)}
    return "", {"": path}


def _is_root(folder: Path) -> bool:
    """Whether a folder holds class folders with images."""
    return any(_is_image(path) for inner in _class_folders(folder) for path in _walk(inner))


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(path for path in folders if path.name not in NO_CLASSES)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted by folder and then by name, as torchvision sorts them."""
    return sorted(_walk(folder), key=lambda path: (str(path.parent), path.name))


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, also behind links that do not lead back up; hidden ones are no
    data.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name in NO_CLASSES:
            continue
        if path.is_dir():
            yield from _walk(path, (*above, real))
        elif path.is_file():
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def _nothing_there(root: Path) -> str:
    """The sentence for a place without images in class folders, with what there is."""
    expected = f"expected a folder for each class, with {KINDS}"
    if not root.is_dir():
        there = ", ".join(folder.name for folder in _class_folders(root.parent)) or "none"
        return (
            f"{root} does not exist; {expected} (the folders there are: {there}): check the split"
        )
    beside = [path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
    if images := [path for path in beside if _is_image(path)]:
        return (
            f"{root} holds {len(images)} images and no class folders with images; {expected}: "
            "sort them by class"
        )
    others = [path for folder in _class_folders(root) for path in _files(folder)]
    if beside or others:
        there = f"holds {_kinds([*beside, *others])}"
    else:
        there = "holds no files"
    return f"{root} {there}; {expected}: check the place"


def _say_left_out(root: Path, folders: list[Path], listed: Mapping[Path, list[Path]]) -> None:
    """Say how many files are no images that we read, and where deeper folders were taken for parts
    of a class.
    """
    beside = [path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
    images = [path for path in beside if _is_image(path)]
    within = [path for files in listed.values() for path in files]
    others = [path for path in within if not _is_image(path) and path.name.lower() not in NOT_DATA]
    if images:
        say(f"{root}: left out {_kinds(images)} beside the class folders, which have no class")
    if others:
        say(f"{root}: left out {_kinds(others)} in class folders, expected {KINDS}")
    if all(path.parent not in listed for path in within if _is_image(path)):
        names = ", ".join(folder.name for folder in folders[:4]) + (
            ", ..." if len(folders) > 4 else ""
        )
        say(
            f"{root}: all images are in deeper folders; the {len(folders)} classes are the "
            f"folders {names}"
        )


def _kinds(files: list[Path]) -> str:
    """How many files have which ending: `3 .heic, 1 .txt`."""
    counts = Counter(path.suffix.lower() or "without ending" for path in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))


def _require_one_spelling(folders: list[Path]) -> None:
    """Raise BadData for two folders of one class, whose names are the same text in two
    encodings.
    """
    spelled = Counter(same(folder.name) for folder in folders)
    if twice := [name for name, count in spelled.items() if count > 1]:
        raise BadData(
            f"{folders[0].parent} has {spelled[twice[0]]} folders called {twice[0]!r}, written "
            f"with other bytes "
            "(composed and decomposed letters); expected one: move their files together"
        )


@final
class Images:
    """Image files, decoded when they are taken."""

    def __init__(self, files: list[Path], labels: Ints, as_asked: Resizing, spec: str) -> None:
        self.files = files
        self.as_asked = as_asked
        self.spec = spec
        self.length = len(files)
        self.labels: Ints | None = labels
        first = str(files[0])
        self._shape = as_asked.fixes or as_asked.shape(shape_of(_read(files[0]), first)[1], first)

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        assert self.labels is not None
        return np.stack([self._image(int(row)) for row in index]), self.labels[index]

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
