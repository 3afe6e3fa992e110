"""Reads images from one folder per class: `DIR/<class>/*.jpg`, or `DIR/<split>/<class>/*.jpg`.

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
NOT_DATA = ("thumbs.db", "desktop.ini")  # written by operating systems; hidden files do not count
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
    """Read the images of a split as uint8 RGB [3, H, W].

    Rows are sorted by class, then by folder and file name, as torchvision sorts them. Classes are
    numbered by name, in sorted order. If there is a training split (DIR/train next to this split),
    its classes count, so a split that lacks a class has the same numbers. Images in deeper folders
    belong to the class folder above them. Files that are not images are counted in a notice.

    Args:
        location: the folder DIR of class folders, or of splits.
        split: reads `DIR/<split>/<class>`. Without a split, `DIR/test` is read if it has classes,
            otherwise DIR.
        size: H and W to which images are stretched: `imagefolder@224x224:DIR`.
        resize: length of the shorter side after resizing, in pixels; the aspect ratio stays.
        crop: N or HxW, in pixels, cut out of the middle.
        interpolation: bilinear (default), bicubic or nearest.
        classes: names of the classes in the order of the network's outputs, as A,B,C or as a file
            with one name a line.

    Returns:
        The rows. An image is decoded when it is taken.

    Raises:
        BadData: images have several sizes, or the training split lacks a class.
        BadFile: there are no class folders, or an image cannot be decoded.
    """
    as_asked = resizing(size, resize, crop, interpolation)
    with reading(location or "no place", "a folder of class folders"):
        if not location or not Path(location).is_dir():
            raise FileNotFoundError(location)
        chosen, splits = _splits(Path(location), split)
        root = splits[chosen]
        folders = _class_folders(root)
        listed = {folder: _files(folder) for folder in folders}
        # The classes of all splits, so that each of them has the same numbers.
        names_by_split = dict[str, list[str]]()
        for split_name, split_root in splits.items():
            names_by_split[split_name] = [folder.name for folder in _class_folders(split_root)]

    # The rows: sorted by class, then by folder and name.
    files = list[Path]()
    class_of_file = list[str]()
    for folder in folders:
        for path in listed[folder]:
            if _is_image(path):
                files.append(path)
                class_of_file.append(same(folder.name))
    if not files:
        raise BadFile(_nothing_there(root))
    _require_one_spelling(folders)

    names = names_of(names_by_split, chosen, location, given_names(classes))
    number = {name: index for index, name in enumerate(names)}
    labels = np.array([number[name] for name in class_of_file], dtype=np.int64)
    say_absent(names, labels, root)
    _say_left_out(root, folders, listed)
    spec = f"imagefolder{'/' if split else ''}{split}:{location}"
    source = Images(files, labels, as_asked, spec)
    return Rows(source, name=f"imagefolder:{location}", class_names=names)


def _splits(path: Path, split: str) -> tuple[str, dict[str, Path]]:
    """Which split to read ("" for a folder without splits), and the folders of all splits.

    The splits of a data set are the folders with usual names (train, val, test, ...). If the user
    names a split with another name, then all folders with classes count.
    """
    roots = dict[str, Path]()
    usual = dict[str, Path]()
    for folder in _class_folders(path):
        if _is_root(folder):
            roots[folder.name] = folder
            if is_split(folder.name):
                usual[folder.name] = folder
    if split:
        known = usual if is_split(split) else roots
        return split, {**known, split: path / split}
    if "test" in usual:
        return "test", usual
    if usual:
        raise BadFile(
            f"{path} has the splits {', '.join(usual)} and none called test. Name one of them, for "
            f"example imagefolder/{next(iter(usual))}:{path}."
        )

    # DIR may itself be a split. Then the splits next to it decide which classes there are.
    here = path.absolute()
    if is_split(here.name) and _is_root(path):
        neighbours = dict[str, Path]()
        for folder in _class_folders(here.parent):
            if is_split(folder.name) and _is_root(folder):
                neighbours[folder.name] = folder
        return here.name, neighbours
    return "", {"": path}


def _is_root(folder: Path) -> bool:
    """Whether a folder holds class folders with images."""
    for class_folder in _class_folders(folder):
        for path in _walk(class_folder):
            if _is_image(path):
                return True
    return False


def _class_folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those of systems."""
    if not root.is_dir():
        return []
    folders = list[Path]()
    for path in root.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.name not in NO_CLASSES:
            folders.append(path)
    return sorted(folders)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted by folder and then by name, as torchvision sorts them."""
    return sorted(_walk(folder), key=lambda path: (str(path.parent), path.name))


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every file below a folder, without hidden ones. Links are followed."""
    real = os.path.realpath(folder)
    if real in above:  # a link leads back to a folder above it
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
    """The message for a place without images in class folders, with what is there instead."""
    expected = f"expected a folder for each class, with {KINDS}"
    if not root.is_dir():
        there = ", ".join(folder.name for folder in _class_folders(root.parent)) or "none"
        return (
            f"{root} does not exist; {expected} (the folders there are: {there}): check the split"
        )
    loose = _loose_files(root)
    images = list(filter(_is_image, loose))
    if images:
        return (
            f"{root} holds {len(images)} images and no class folders with images; {expected}: "
            "sort them by class"
        )
    others = list(loose)
    for folder in _class_folders(root):
        others.extend(_files(folder))
    if others:
        there = f"holds {_kinds(others)}"
    else:
        there = "holds no files"
    return f"{root} {there}; {expected}: check the place"


def _loose_files(root: Path) -> list[Path]:
    """The files next to the class folders, without hidden ones."""
    files = list[Path]()
    for path in root.iterdir():
        if path.is_file() and not path.name.startswith("."):
            files.append(path)
    return files


def _say_left_out(root: Path, folders: list[Path], listed: Mapping[Path, list[Path]]) -> None:
    """Give a notice of files that were not read, and of classes that are made of deeper folders."""
    loose_images = list(filter(_is_image, _loose_files(root)))
    others = list[Path]()  # in class folders, but not images
    all_deeper = True
    for files in listed.values():
        for path in files:
            if _is_image(path):
                all_deeper = all_deeper and path.parent not in listed
            elif path.name.lower() not in NOT_DATA:
                others.append(path)
    if loose_images:
        counts = _kinds(loose_images)
        say(f"{root}: left out {counts} beside the class folders, which have no class")
    if others:
        say(f"{root}: left out {_kinds(others)} in class folders, expected {KINDS}")
    if all_deeper:
        names = [folder.name for folder in folders[:4]]
        if len(folders) > 4:
            names.append("...")
        say(
            f"{root}: all images are in deeper folders; the {len(folders)} classes are the "
            f"folders {', '.join(names)}"
        )


def _kinds(files: list[Path]) -> str:
    """How many files have which ending: `3 .heic, 1 .txt`."""
    counts = Counter(path.suffix.lower() or "without ending" for path in files)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(4))


def _require_one_spelling(folders: list[Path]) -> None:
    """Raise BadData for two folders of one class.

    Their names are the same text in two encodings.
    """
    counts = Counter(same(folder.name) for folder in folders)
    for name, count in counts.items():
        if count > 1:
            raise BadData(
                f"{folders[0].parent} has {count} folders called {name!r}, written with other "
                f"bytes (composed and decomposed letters). Move their files into one folder."
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
        # The size of all images: as asked, or as the first image has it.
        if as_asked.fixes is not None:
            self._shape = as_asked.fixes
        else:
            first = str(files[0])
            _, shape = shape_of(_read(files[0]), first)
            self._shape = as_asked.shape(shape, first)

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        assert self.labels is not None
        images = [self._image(int(row)) for row in index]  # each [3, H, W]
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
