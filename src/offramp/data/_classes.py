"""Classes by name: which number a name has must not depend on what one split happens to hold.

The names of a data set are those of its training split where there is one, else those of the split
that holds all others' names. A split with a name more is refused; one with fewer keeps the numbers,
and a notice says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from offramp._support.files import Array
from offramp._support.notices import say
from offramp.data._check import Ints, brief, name_rows
from offramp.errors import BadData, BadFile

TRAINING = ("train", "training")
SPLITS = (*TRAINING, "val", "valid", "validation", "dev", "development", "eval", "test", "testing")
SHOWN = 5
Names = tuple[str, ...]


def is_split(word: str) -> bool:
    """Whether a folder or file of this name is a split of a data set by convention."""
    return word.lower() in SPLITS


def same(name: str) -> str:
    """A name in the one form in which names are compared: systems write the same umlaut in two
    ways.
    """
    return unicodedata.normalize("NFC", name)


def names_of(
    splits: Mapping[str, Iterable[str]], chosen: str, path: str | Path, given: Names = ()
) -> Names:
    """The class names of a data set, by whose order its classes are numbered from 0.

    Args:
        splits: the names that each split holds.
        chosen: the split that is read.
        place: for the message.
        given: the names as the user states them; they need not be sorted.

    Raises:
        BadData: the split holds a name that the others lack; it is named.
    """
    held = {split: {same(name) for name in names} for split, names in splits.items()}
    reference, names = _reference(held, chosen, path, given)
    if extra := sorted(held[chosen] - set(names)):
        where = f"the split {chosen!r} of {path}" if chosen else str(path)
        which = "given" if given else f"of the split {reference!r}"
        raise BadData(
            f"{where} has the {_classes(extra)}; expected the {len(names)} classes {which}, "
            f"{_some(names)}: rename "
            "them, or give all names as ?classes=A,B,C"
        )
    return names


def say_absent(names: Names, labels: Ints, where: str | Path) -> None:
    """Say which classes have no rows: their numbers are kept."""
    counts = np.bincount(labels, minlength=len(names))
    if absent := [name for name, count in zip(names, counts, strict=False) if not count]:
        say(
            f"{where} has no rows of the {_classes(absent)}; classes are numbered as all "
            f"{len(names)} are"
        )


def _reference(
    held: Mapping[str, set[str]], chosen: str, path: str | Path, given: Names
) -> tuple[str, Names]:
    """The split that says which classes there are, and their names in order."""
    if given:
        return "", given
    training = [split for split in held if split.lower() in TRAINING]
    if training:
        return training[0], tuple(sorted(held[training[0]]))
    everything = set().union(*held.values())
    complete = [split for split in (chosen, *held) if held[split] == everything]
    if not complete:
        differing = "; ".join(f"{split}: {_some(sorted(names))}" for split, names in held.items())
        raise BadData(
            f"the splits of {path} hold different classes ({differing}), and none of them holds "
            f"all; expected a "
            "training split, or all names as ?classes=A,B,C"
        )
    return complete[0], tuple(sorted(everything))


def numbered(labels: Array, names: Names, what: str) -> Ints:
    """Labels as text -> int64 [n], their places among the names. Raises BadData with the rows of
    unknown ones.
    """
    known = {name: number for number, name in enumerate(names)}
    found = np.array([known.get(same(str(label)), -1) for label in labels], dtype=np.int64)
    wrong = np.flatnonzero(found < 0)
    if len(wrong):
        raise BadData(
            f"{what} holds {str(labels[wrong[0]])!r} at {name_rows(wrong)}; expected one of "
            f"{_some(names)}: mend them, "
            "or give all names as ?classes=A,B,C"
        )
    return found


def given_names(text: str) -> Names:
    """The names of `classes=A,B,C`, or of a text file with a name in each line. Raises BadData,
    BadFile.
    """
    if not text:
        return ()
    path = Path(text).expanduser()
    if "," not in text and path.is_file():
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise BadFile(
                f"{path} cannot be read as names of classes ({brief(problem)}); one a line"
            ) from problem
    else:
        names = text.split(",")
    plain = tuple(same(name.strip()) for name in names if name.strip())
    if len(plain) < 2 or len(set(plain)) < len(plain):
        raise BadData(
            f"got classes={text}; expected at least two different names, A,B,C or a file with one "
            f"a line"
        )
    return plain


def renumbering(own: Names, wanted: Names, what: str) -> Ints | None:
    """For each class of some rows its number in a network, int64 [len(own)]; None where they are
    equal.

    Raises BadData where the rows have a class that the network does not know.
    """
    ours = tuple(map(same, own))
    theirs = tuple(map(same, wanted))
    if ours == theirs:
        return None
    if extra := [name for name in ours if name not in theirs]:
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
    return f"class{'es' if len(names) > 1 else ''} {_some(names)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
