"""Numbers classes by name, so that the number of a name does not depend on what one split holds.

The names of a data set are those of its training split if there is one. Otherwise they are those of
the split that holds all names of the others. A split with an additional name is refused. A split
with fewer names keeps the numbers, and a notice names the absent classes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from offramp._support.files import Array, from_home
from offramp._support.notices import say
from offramp.data._check import Ints, brief, name_rows
from offramp.errors import BadData, BadFile

TRAINING = ("train", "training")
SPLITS = (*TRAINING, "val", "valid", "validation", "dev", "development", "eval", "test", "testing")
SHOWN = 5  # names in a message
Names = tuple[str, ...]


def is_split(word: str) -> bool:
    """Whether a folder or file of this name is a split of a data set by convention."""
    return word.lower() in SPLITS


def same(name: str) -> str:
    """A name in its composed form. Systems encode the same umlaut in two ways."""
    return unicodedata.normalize("NFC", name)


def names_of(
    splits: Mapping[str, Iterable[str]], chosen: str, path: str | Path, given: Names = ()
) -> Names:
    """Determine the class names of a data set, in the order of their numbers.

    Args:
        splits: the names that each split holds.
        chosen: the split that is read.
        path: of the data set, for messages.
        given: the names as the user states them; they need not be sorted.

    Returns:
        The name of class 0, class 1, ...

    Raises:
        BadData: the chosen split holds a name that is not among them.
    """
    held = dict[str, set[str]]()
    for split, names_in_split in splits.items():
        held[split] = {same(name) for name in names_in_split}
    reference, names = _reference(held, chosen, path, given)
    extra = sorted(held[chosen] - set(names))
    if extra:
        where = f"the split {chosen!r} of {path}" if chosen else str(path)
        which = "given" if given else f"of the split {reference!r}"
        raise BadData(
            f"{where} has the {_classes(extra)}; expected the {len(names)} classes {which}, "
            f"{_some(names)}: rename "
            "them, or give all names as ?classes=A,B,C"
        )
    return names


def say_absent(names: Names, labels: Ints, where: str | Path) -> None:
    """Give a notice of the classes without rows; they keep their numbers."""
    present = set(np.unique(labels).tolist())
    absent = [name for number, name in enumerate(names) if number not in present]
    if absent:
        say(
            f"{where} has no rows of the {_classes(absent)}; classes are numbered as all "
            f"{len(names)} are"
        )


def _reference(
    held: Mapping[str, set[str]], chosen: str, path: str | Path, given: Names
) -> tuple[str, Names]:
    """The split that decides which classes there are, and their names in order."""
    if given:
        return "", given
    # A network is trained on the training split, so its numbers are those of this split.
    for split, names in held.items():
        if split.lower() in TRAINING:
            return split, tuple(sorted(names))
    # Otherwise one split must have the names of all others, preferably the chosen one.
    everything = set().union(*held.values())
    for split in (chosen, *held):
        if held[split] == everything:
            return split, tuple(sorted(everything))
    differing = list[str]()
    for split, names in held.items():
        differing.append(f"{split}: {_some(sorted(names))}")
    raise BadData(
        f"the splits of {path} hold different classes ({'; '.join(differing)}), and none of them "
        f"holds all; expected a training split, or all names as ?classes=A,B,C"
    )


def numbered(labels: Array, names: Names, what: str) -> Ints:
    """Number labels that are texts.

    Args:
        labels: texts [n].
        names: the names of the classes in the order of their numbers.
        what: the labels in messages.

    Returns:
        The number of each label, int64 [n].

    Raises:
        BadData: a label is not among the names; the message names the rows.
    """
    known = {name: number for number, name in enumerate(names)}
    numbers = np.full(len(labels), -1, dtype=np.int64)
    for row, label in enumerate(labels):
        numbers[row] = known.get(same(str(label)), -1)
    wrong = np.flatnonzero(numbers < 0)
    if len(wrong):
        raise BadData(
            f"{what} holds {str(labels[wrong[0]])!r} at {name_rows(wrong)}; expected one of "
            f"{_some(names)}: correct them, "
            "or give all names as ?classes=A,B,C"
        )
    return numbers


def given_names(text: str) -> Names:
    """Read the option `classes=`.

    Args:
        text: A,B,C, or the path of a text file with one name a line; "" for none.

    Returns:
        The names; () for none.

    Raises:
        BadData: there are less than two different names.
        BadFile: the file cannot be read.
    """
    if not text:
        return ()
    path = from_home(text)
    # A text with commas is a list of names, also if a file is called so.
    if "," not in text and path.is_file():
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise BadFile(
                f"{path} cannot be read as names of classes ({brief(problem)}); one a line"
            ) from problem
    else:
        names = text.split(",")
    plain = list[str]()
    for name in names:
        if name.strip():  # not an empty line
            plain.append(same(name.strip()))
    if len(plain) < 2 or len(set(plain)) < len(plain):
        raise BadData(
            f"got classes={text}; expected at least two different names, A,B,C or a file with one "
            f"a line"
        )
    return tuple(plain)


def renumbering(own: Names, wanted: Names, what: str) -> Ints | None:
    """Translate the class numbers of some rows to those of a network.

    Args:
        own: the class names of the rows, in the order of their numbers.
        wanted: the class names of the network.
        what: the rows in messages.

    Returns:
        For each class of the rows its number in the network, int64 [len(own)]; None where the names
        are equal.

    Raises:
        BadData: the rows have a class that the network does not know.
    """
    ours = tuple(map(same, own))
    theirs = tuple(map(same, wanted))
    if ours == theirs:
        return None
    extra = [name for name in ours if name not in theirs]
    if extra:
        raise BadData(
            f"{what} has the {_classes(extra)}, and the network was trained the {len(theirs)} "
            f"classes {_some(theirs)}; "
            "expected the same names: give those rows, or if only the names differ set "
            "network.class_names = None"
        )
    say(
        f"{what} has the classes {_some(ours)}; they are numbered as the network knows them, "
        f"{_some(theirs)}"
    )
    return np.array([theirs.index(name) for name in ours], dtype=np.int64)


def _classes(names: Sequence[str]) -> str:
    noun = "classes" if len(names) > 1 else "class"
    return f"{noun} {_some(names)}"


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    if len(names) <= SHOWN:
        return shown
    return f"{shown} and {len(names) - SHOWN} more"
