"""Arrays in one `.npz` file, read without pickles.

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
    """x (or images, image, data, features, inputs) and, where there are any, y (or labels, target,
    class, ...).

    Args:
        place: the file.
        split: s means `x_s` and `y_s`, or `s_x` and `s_y`. Without one x and y are meant, else
            those of test.
        x, y: the arrays, where their names are not known here. Capitals do not count.
        classes: the names of the classes in the order of their numbers, A,B,C or a file with one a
            line.

    Several inputs are arrays `x/NAME`. Labels are integers [n] or [n, 1] of at least 0, or texts.
    Texts are numbered by name, in sorted order, over the training labels in the same file where
    there are any; an array `class_names` of texts says the order otherwise.

    Raises:
        BadData: no such arrays, labels that are none.
        BadFile: damaged, pickled, or far larger unpacked than the file or the free memory.
    """
    path = Path(location)
    if location and path.is_dir():
        raise BadFile(f"{location} is a folder; expected one .npz file with x and y: {HOW}")
    with (
        reading(location or "no place", "an .npz file of arrays without pickles"),
        open(location, "rb") as file,
    ):
        if file.read(6) == b"\x93NUMPY":
            raise BadFile(
                f"{location} is a single array (.npy); expected an .npz of x and y: "
                f"np.savez(file, x=np.load('x.npy'), "
                "y=np.load('y.npy'))"
            )
        file.seek(0)
        sizes = npz_sizes(file)
        with np.load(file, allow_pickle=False) as loaded:
            inputs, labels = _names(loaded.files, location, split, x, y)
            asked = [*inputs.values(), *([labels] if labels else [])]
            chosen = [sizes[name] for name in asked]
            require_memory(
                location, sum(size[0] for size in chosen), sum(size[1] for size in chosen)
            )
            values = {name: loaded[stored] for name, stored in inputs.items()}
            targets, names = _labels(loaded, labels, split, location, given_names(classes))
    _say_what_is_left(loaded.files, asked, location, labels)
    stored = ", ".join(inputs.values())
    given: Any = values if SEVERAL in stored else next(iter(values.values()))
    return Rows(
        arrays(given, targets, f"{stored} in {location}"),
        name=f"npz:{location}",
        class_names=names or None,
    )


def _names(
    files: Sequence[str], path: str, split: str, x: str, y: str
) -> tuple[dict[str, str], str | None]:
    """The arrays that are x by the name of the input, and the name of the labels (None without)."""
    for asked in filter(None, (x, y)):
        if asked not in files:
            raise BadData(
                f"{path} holds {list(files)}; expected {asked!r} among them: check ?x= and ?y="
            )
    several = {name.removeprefix(SEVERAL): name for name in files if name.startswith(SEVERAL)}
    if several and not split and not x:
        return several, y or _first(files, LABELS, "")
    for part in [split] if split else ["", "test"]:
        found = x or _first(files, INPUTS, part)
        if found is not None:
            return {found: found}, y or _first(files, LABELS, part)
    if split:
        wanted = f"x_{split} and y_{split} (or {split}_x and {split}_y)"
    else:
        wanted = "x and y"
    raise BadData(
        f"{path} holds {list(files)}; expected the names {wanted}: {HOW}, or say which with "
        f"?x=NAME&y=NAME"
    )


def _first(files: Sequence[str], words: Sequence[str], split: str) -> str | None:
    """The first name in a file that is one of the words, with the split before or behind; capitals
    do not count.
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
    """The labels as stored, or numbered by name where they are texts; and the names of the classes,
    if known.
    """
    if name is None:
        return None, names
    labels = loaded[name]
    stored = next((each for each in loaded if each.lower() in NAMES and each != name), None)
    if (
        not names
        and stored is not None
        and loaded[stored].dtype.kind in "US"
        and loaded[stored].ndim == 1
    ):
        names = tuple(_text(one) for one in loaded[stored])
    if labels.dtype.kind not in "US":
        return labels, names
    texts = np.array([_text(one) for one in labels.reshape(-1)], dtype=object)
    beside = {word: _first(list(loaded), LABELS, word) for word in SPLITS}
    held = {
        word: {_text(one) for one in loaded[each].reshape(-1)}
        for word, each in beside.items()
        if each
    }
    chosen = next((word for word, each in beside.items() if each == name), split)
    held[chosen] = {_text(one) for one in texts}
    found = names_of(held, chosen, path, names)
    numbers = numbered(texts, found, f"{name} in {path}")
    say_absent(found, numbers, f"{name} in {path}")
    return numbers, found


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _say_what_is_left(
    files: Sequence[str], used: Sequence[str], path: str, labels: str | None
) -> None:
    """Say that there are no labels where the file holds arrays that could be some under another
    name.
    """
    words = {_first(files, kind, split) for kind in (INPUTS, LABELS) for split in ("", *SPLITS)}
    others = [
        name
        for name in files
        if name not in used and name not in words and name.lower() not in NAMES
    ]
    if labels is None and others:
        say(
            f"{path}: no labels found, it also holds {', '.join(others)}; name them with "
            f"npz:PATH?y=NAME"
        )
