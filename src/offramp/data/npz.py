"""Reads arrays from one `.npz` file, without pickles.

npz:rows.npz    npz/test:mnist.npz    npz:rows.npz?x=signals&y=species
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offramp._support.files import Array, npz_sizes, require_memory
from offramp._support.notices import say
from offramp.data._check import reading
from offramp.data._classes import SPLITS, given_names, names_of, numbered, say_absent
from offramp.data._sources import arrays
from offramp.data.rows import Rows
from offramp.errors import BadData, BadFile

INPUTS = ("x", "images", "image", "img", "data", "features", "pixel_values", "inputs")
SEVERAL = "x/"
LABELS = ("y", "labels", "label", "target", "targets", "class", "cls", "category")
NAMES = ("class_names", "classes", "names")
HOW = "save them with np.savez(file, x=x, y=y), several inputs as x/NAME"


def load(location: str, split: str, *, x: str = "", y: str = "", classes: str = "") -> Rows:
    """Read the inputs and, if there are any, the labels.

    The inputs are the array x (or images, image, data, features, inputs), or several arrays
    `x/NAME`. The labels are the array y (or labels, target, class, ...): integers [n] or [n, 1] of
    at least 0, or texts. Texts are numbered by name, in sorted order, over the training labels in
    the same file where there are any. An array `class_names` of texts gives another order.

    Args:
        location: the file.
        split: s means `x_s` and `y_s`, or `s_x` and `s_y`. Without a split, x and y are read, or
            those of test if there is no x.
        x: name of the array of inputs, where it is another one. Capitals do not count.
        y: name of the array of labels, where it is another one. Capitals do not count.
        classes: names of the classes in the order of their numbers, as A,B,C or as a file with one
            name a line.

    Returns:
        The rows, in memory.

    Raises:
        BadData: the file lacks these arrays, or the labels are not labels.
        BadFile: the file is damaged or pickled, or would unpack to far more than its size or than
            the free memory.
    """
    path = Path(location)
    if location and path.is_dir():
        raise BadFile(f"{location} is a folder; expected one .npz file with x and y: {HOW}")
    with (
        reading(location or "no place", "an .npz file of arrays without pickles"),
        open(location, "rb") as file,
    ):
        # np.load gives a bare array for this format, and no names.
        if file.read(6) == b"\x93NUMPY":
            raise BadFile(
                f"{location} is a single array (.npy); expected an .npz of x and y: "
                f"np.savez(file, x=np.load('x.npy'), "
                "y=np.load('y.npy'))"
            )
        # The sizes of all arrays are in the file's directory, so nothing is unpacked yet.
        file.seek(0)
        sizes = npz_sizes(file)
        with np.load(file, allow_pickle=False) as loaded:
            inputs, labels = _names(loaded.files, location, split, x, y)
            used = list(inputs.values())
            if labels:
                used.append(labels)

            # Refuse a file that would fill the memory before anything of it is unpacked.
            packed = 0
            unpacked = 0
            for name in used:
                packed += sizes[name][0]
                unpacked += sizes[name][1]
            require_memory(location, packed, unpacked)
            values = {name: loaded[stored] for name, stored in inputs.items()}
            targets, names = _labels(loaded, labels, split, location, given_names(classes))
    _say_what_is_left(loaded.files, used, location, labels)
    stored_names = ", ".join(inputs.values())
    x_values: Any = values
    if SEVERAL not in stored_names:  # a single array without a name
        x_values = next(iter(values.values()))
    return Rows(
        arrays(x_values, targets, f"{stored_names} in {location}"),
        name=f"npz:{location}",
        class_names=names or None,
    )


def _names(
    files: Sequence[str], path: str, split: str, x: str, y: str
) -> tuple[dict[str, str], str | None]:
    """The arrays of inputs by name of the input, and the name of the labels (None without)."""
    for asked in (x, y):
        if asked and asked not in files:
            raise BadData(
                f"{path} holds {list(files)}; expected {asked!r} among them: check ?x= and ?y="
            )
    if not split and not x:
        several = dict[str, str]()
        for name in files:
            if name.startswith(SEVERAL):
                several[name.removeprefix(SEVERAL)] = name
        if several:
            return several, y or _first(files, LABELS, "")

    # x and y of the split; without a split those without one in their names, or else of test.
    for part in [split] if split else ["", "test"]:
        stored = x or _first(files, INPUTS, part)
        if stored is not None:
            return {stored: stored}, y or _first(files, LABELS, part)
    if split:
        wanted = f"x_{split} and y_{split} (or {split}_x and {split}_y)"
    else:
        wanted = "x and y"
    raise BadData(
        f"{path} holds {list(files)}; expected the names {wanted}: {HOW}, or say which with "
        f"?x=NAME&y=NAME"
    )


def _first(files: Sequence[str], words: Sequence[str], split: str) -> str | None:
    """The first name in a file that is one of the words, with the split before or after it.

    Capitals do not count.
    """
    for word in words:
        forms = [word]
        if split:
            forms = [f"{word}_{split}".lower(), f"{split}_{word}".lower()]
        for name in files:
            if name.lower() in forms:
                return name
    return None


def _labels(
    loaded: Mapping[str, Array], name: str | None, split: str, path: str, names: tuple[str, ...]
) -> tuple[Array | None, tuple[str, ...]]:
    """The labels as stored, or as numbers if they are texts; and the names of the classes."""
    if name is None:
        return None, names
    labels = loaded[name]
    if not names:
        names = _stored_names(loaded, name)
    if labels.dtype.kind not in "US":
        return labels, names

    # Number the texts over all splits of the file, so that each split has the same numbers.
    texts = _flat_texts(labels)
    chosen = split
    held = dict[str, set[str]]()
    for word in SPLITS:
        stored = _first(list(loaded), LABELS, word)
        if stored == name:
            chosen = word
        if stored:
            held[word] = set(_flat_texts(loaded[stored]))
    held[chosen] = set(texts)
    names = names_of(held, chosen, path, names)
    where = f"{name} in {path}"
    numbers = numbered(np.array(texts, dtype=object), names, where)
    say_absent(names, numbers, where)
    return numbers, names


def _stored_names(loaded: Mapping[str, Array], labels: str) -> tuple[str, ...]:
    """The names of the classes that the file holds as an array of texts [C]; () without."""
    for name in loaded:
        if name.lower() in NAMES and name != labels:
            array = loaded[name]
            if array.dtype.kind in "US" and array.ndim == 1:
                return tuple(_flat_texts(array))
            return ()
    return ()


def _flat_texts(array: Array) -> list[str]:
    return [_text(item) for item in array.reshape(-1)]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _say_what_is_left(
    files: Sequence[str], used: Sequence[str], path: str, labels: str | None
) -> None:
    """Give a notice where there are no labels, but arrays that could be labels."""
    # Arrays that belong to another split have a known name and are not labels of this one.
    words = set[str | None]()
    for part in ("", *SPLITS):
        words.add(_first(files, INPUTS, part))
        words.add(_first(files, LABELS, part))
    others = list[str]()
    for name in files:
        if name not in used and name not in words and name.lower() not in NAMES:
            others.append(name)
    if labels is None and others:
        say(
            f"{path}: no labels found, it also holds {', '.join(others)}; name them with "
            f"npz:PATH?y=NAME"
        )
