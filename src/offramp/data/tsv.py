"""Texts in a file of tab-separated columns, with labels, as numbers of tokens: `tsv:PATH?tokenizer=PLACE`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from offramp.data._check import Ints, X, reading
from offramp.data._texts import Tokenizer
from offramp.data.rows import Rows
from offramp.errors import BadData

LABELS = ("label", "labels", "target", "y", "class")
TEXTS = ("sentence", "text", "content", "review", "question", "x")
LENGTH = 128


class Columns(NamedTuple):
    """Where text and label stand, from 0 (label None: there is none), and whether the first line names them."""

    text: int
    label: int | None
    header: bool


def load(
    place: str, split: str, *, tokenizer: str = "", length: str = str(LENGTH), text: str = "", label: str = ""
) -> Rows:
    """x is {input_ids, attention_mask}, int64 [rows, length]: longer texts are cut, shorter ones padded.

    tokenizer: a `tokenizer.json` or the folder that holds it. text, label: columns by the name in the first line or by
    number from 1; without them `sentence`, `text`, ... and `label`, `target`, ..., or of two columns the one with an
    integer as label. No field is quoted, as in GLUE. A split s of a folder is its `s.tsv`; without one `test.tsv`,
    else `dev.tsv`. Labels are integers from 0 upward, or there are none. Raises BadData, BadFile, MissingExtra.
    """
    file, lines = _lines(place, split)
    columns = _columns(lines[0], text, label, file)
    fields = [_fields(line, number, len(lines[0]), file) for number, line in enumerate(lines, 1)]
    kept = fields[1:] if columns.header else fields
    if not kept:
        raise BadData(f"{file} has no row below its header; expected at least one: give another file")
    labels = None if columns.label is None else _labels([row[columns.label] for row in kept], columns.header, file)
    if not re.fullmatch(r"[0-9]{1,6}", length) or not int(length):
        raise BadData(f"got length={length}; expected a number of tokens from 1 upward")
    words = Tokenizer(tokenizer, int(length))
    return Rows(Texts([row[columns.text] for row in kept], labels, words), name=f"tsv:{file}")


@final
class Texts:
    """Texts in memory, made into tokens when they are taken."""

    def __init__(self, texts: Sequence[str], labels: Ints | None, tokenizer: Tokenizer) -> None:
        self.texts, self.labels, self.tokenizer, self.length = texts, labels, tokenizer, len(texts)

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        x = self.tokenizer([self.texts[int(row)] for row in index])
        return x, None if self.labels is None else self.labels[index]


def _lines(place: str, split: str) -> tuple[Path, list[list[str]]]:
    """The file that is meant, and its lines in fields."""
    path, expected = Path(place), "a .tsv file, UTF-8 text with tabs between the columns"
    with reading(place or "no place", expected):
        if not place:
            raise FileNotFoundError(place)
        if path.is_dir():
            named = [path / f"{name}.tsv" for name in ([split] if split else ["test", "dev"])]
            path = next((file for file in named if file.is_file()), named[0])
        elif split:
            raise BadData(f"{place} is one file, which has no split {split!r}; leave the split out")
    with reading(path, expected):
        whole = path.read_bytes().decode("utf-8-sig")
    if "\0" in whole:
        raise BadData(f"{path} holds zero bytes; expected text in UTF-8: write it again")
    lines = [line.removesuffix("\r").split("\t") for line in whole.split("\n")]
    while lines and lines[-1] == [""]:
        lines.pop()
    if not lines:
        raise BadData(f"{path} holds no rows; expected at least one: give another file")
    return path, lines


def _fields(line: list[str], number: int, count: int, file: Path) -> list[str]:
    if len(line) != count:
        raise BadData(
            f"line {number} of {file} has {len(line)} columns, the first {count}; expected as many, with a tab between "
            "them: mend this line"
        )
    return line


def _columns(first: list[str], text: str, label: str, file: Path) -> Columns:
    """Text and label by option, by a name in the first line, or by what two columns hold."""
    names = [name.strip().lower() for name in first]
    text_at, label_at = _asked(text, names, file), _asked(label, names, file)
    by_name = not all(word.isdigit() for word in (text, label) if word)
    if label_at is None and (label_at := _first_of(LABELS, names, but=text_at)) is not None:
        by_name = True
    if text_at is None and (text_at := _first_of(TEXTS, names, but=label_at)) is not None:
        by_name = True
    whole = [place for place, field in enumerate(first) if _is_integer(field)]
    if label_at is None and len(first) == 2 and len(whole) == 1 and text_at != whole[0]:
        label_at = whole[0]
    if text_at is None:
        rest = [place for place in range(len(first)) if place != label_at]
        if len(rest) != 1:
            raise BadData(
                f"{file} begins with the columns {names}, and which holds the text is not clear; say tsv:PATH?text=N, "
                "by name or by number from 1"
            )
        text_at = rest[0]
    named = names[text_at] in TEXTS or (label_at is not None and not _is_integer(first[label_at]))
    return Columns(text_at, label_at, by_name or named)


def _asked(word: str, names: list[str], file: Path) -> int | None:
    """The place of a column given by number from 1 or by name; None where none was given."""
    if not word:
        return None
    place = int(word) - 1 if word.isascii() and word.isdigit() else -1
    if word.lower() in names:
        place = names.index(word.lower())
    if not 0 <= place < len(names):
        raise BadData(f"{file} has no column {word!r}; expected one of {names}, or a number from 1 to {len(names)}")
    return place


def _first_of(known: Sequence[str], names: list[str], but: int | None) -> int | None:
    found = (names.index(name) for name in known if name in names)
    return next((place for place in found if place != but), None)


def _is_integer(field: str) -> bool:
    return re.fullmatch(r"\s*[0-9]{1,9}\s*", field, re.ASCII) is not None


def _labels(fields: list[str], header: bool, file: Path) -> Ints:
    for number, field in enumerate(fields, 2 if header else 1):
        if not _is_integer(field):
            raise BadData(
                f"line {number} of {file} has the label {field[:40]!r}; expected integers from 0 upward: number the "
                "classes, or name the column with label=N"
            )
    return np.array([int(field) for field in fields], dtype=np.int64)
