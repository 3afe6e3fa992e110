"""Reads images from one folder per class: `DIR/<class>/*.jpg`, or `DIR/<split>/<class>/*.jpg`.

imagefolder:photos/test
imagefolder/validation:photos
imagefolder/test:photos?resize=256&crop=224
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from offramp._support.notices import say
from offramp.data._check import reading
from offramp.data._classes import given_names, is_split, names_of, same, say_absent
from offramp.data._image_files import (
    KINDS,
    NOT_DATA,
    NOT_FOLDERS,
    Images,
    files_below,
    is_image,
    kinds_of,
    loose_files,
    walk,
)
from offramp.data._images import Size, resizing
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile


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
        listed = {folder: files_below(folder) for folder in folders}
        # The classes of all splits, so that each of them has the same numbers.
        names_by_split = dict[str, list[str]]()
        for split_name, split_root in splits.items():
            names_by_split[split_name] = [folder.name for folder in _class_folders(split_root)]

    # The rows: sorted by class, then by folder and name.
    files = list[Path]()
    class_of_file = list[str]()
    for folder in folders:
        for path in listed[folder]:
            if is_image(path):
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
        for path in walk(class_folder):
            if is_image(path):
                return True
    return False


def _class_folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those of systems."""
    if not root.is_dir():
        return []
    folders = list[Path]()
    for path in root.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.name not in NOT_FOLDERS:
            folders.append(path)
    return sorted(folders)


def _nothing_there(root: Path) -> str:
    """The message for a place without images in class folders, with what is there instead."""
    expected = f"expected a folder for each class, with {KINDS}"
    if not root.is_dir():
        there = ", ".join(folder.name for folder in _class_folders(root.parent)) or "none"
        return (
            f"{root} does not exist; {expected} (the folders there are: {there}): check the split"
        )
    loose = loose_files(root)
    images = list(filter(is_image, loose))
    if images:
        return (
            f"{root} holds {len(images)} images and no class folders with images; {expected}: "
            f"sort them by class, or read them without labels, images:{root}"
        )
    others = list(loose)
    for folder in _class_folders(root):
        others.extend(files_below(folder))
    if others:
        there = f"holds {kinds_of(others)}"
    else:
        there = "holds no files"
    return f"{root} {there}; {expected}: check the place"


def _say_left_out(root: Path, folders: list[Path], listed: Mapping[Path, list[Path]]) -> None:
    """Give a notice of files that were not read, and of classes that are made of deeper folders."""
    loose_images = list(filter(is_image, loose_files(root)))
    others = list[Path]()  # in class folders, but not images
    all_deeper = True
    for files in listed.values():
        for path in files:
            if is_image(path):
                all_deeper = all_deeper and path.parent not in listed
            elif path.name.lower() not in NOT_DATA:
                others.append(path)
    if loose_images:
        counts = kinds_of(loose_images)
        say(f"{root}: left out {counts} beside the class folders, which have no class")
    if others:
        say(f"{root}: left out {kinds_of(others)} in class folders, expected {KINDS}")
    if all_deeper:
        names = [folder.name for folder in folders[:4]]
        if len(folders) > 4:
            names.append("...")
        say(
            f"{root}: all images are in deeper folders; the {len(folders)} classes are the "
            f"folders {', '.join(names)}"
        )


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
