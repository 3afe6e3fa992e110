"""Texts in a file of tab-separated columns, with labels, as numbers of tokens:
`tsv:PATH?tokenizer=PLACE`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from offramp._support.notices import say
from offramp.data._check import Ints, X, reading
from offramp.data._classes import Names, given_names, is_split, names_of, numbered, say_absent
from offramp.data._texts import Tokenizer
from offramp.data.rows import Rows
from offramp.errors import BadData

LABELS = ("label", "labels", "target", "targets", "y", "class", "cls", "category", "sentiment")
TEXTS = ("sentence", "text", "content", "review", "question", "x")
LENGTH = 128
MOST_CLASSES = 1000  # names: as many different texts are no classes
LOOKED_AT = 20  # lines by which columns are looked for
QUOTED = re.compile(r'"(?:[^"]|"")*"')
EXPECTED = "a .tsv file, UTF-8 text with tabs between the columns"


class TsvColumns(NamedTuple):
    """Where text and label stand, from 0 (label None: there is none), and whether the first line
    names them.
    """

    text: int
    label: int | None
    header: bool


def load(
    location: str,
    split: str,
    *,
    tokenizer: str = "",
    length: str = str(LENGTH),
    text: str = "",
    label: str = "",
    quoted: str = "",
    header: str = "",
    classes: str = "",
) -> Rows:
    """x is {input_ids, attention_mask}, int64 [rows, length]: longer texts are cut, shorter ones
    padded.

    Args:
        place: the file, or a folder of splits.
        split: s means `s.tsv` in a folder; without one `test.tsv`, else `dev.tsv`.
        tokenizer: a `tokenizer.json` or the folder that holds it.
        length: tokens of each row.
        text, label: columns by the name in the first line or by number from 1; without them
            `sentence`, `text`, ... and `label`, `target`, ..., or of two columns the one with an
            integer as label.
        quoted: yes reads fields in quotation marks as CSV does; no keeps the marks, as in GLUE. By
            default a file is quoted where all fields of its first line are, and refused where it
            cannot be told.
        header: yes or no, whether the first line names the columns; by default it is looked for.
        classes: the names of the classes in the order of their numbers, A,B,C or a file with one a
            line.

    Labels are integers of at least 0, or texts. Texts are numbered by name, in sorted order, over
    `train.tsv` beside the file where there is one.

    Raises:
        BadData: columns that are not clear, labels that are none, commas instead of tabs.
        BadFile: no such file, or no UTF-8 text.
        MissingExtra: without the library tokenizers.
    """
    how = Reading(text, label, _yes_no("quoted", quoted), _yes_no("header", header))
    file = _file(location, split)
    table = _table(file, how)
    labels, names = _numbered(table, file, how, given_names(classes))
    if not re.fullmatch(r"[0-9]{1,6}", length) or not int(length):
        raise BadData(f"got length={length}; expected a number of tokens of at least 1")
    if labels is None and table.others:
        say(
            f"{file}: no labels found, its other columns are {', '.join(table.others)}; name them "
            f"with label=NAME"
        )
    words = Tokenizer(tokenizer, int(length))
    return Rows(Texts(table.texts, labels, words), name=f"tsv:{file}", class_names=names or None)


class Reading(NamedTuple):
    """How the user says that a file is read: columns by name or number, and yes, no or None for
    unsaid.
    """

    text: str
    label: str
    quoted: bool | None
    header: bool | None


class TsvTable(NamedTuple):
    """The rows of a file below its header; `start` is the line of the first."""

    texts: list[str]
    labels: list[str] | None
    others: tuple[str, ...]
    start: int


def _yes_no(name: str, text: str) -> bool | None:
    if text not in ("", "yes", "no"):
        raise BadData(f"got {name}={text}; expected yes or no")
    return None if not text else text == "yes"


def _table(file: Path, how: Reading) -> TsvTable:
    """The texts and labels of a file, as text."""
    lines = _lines(file, how.quoted)
    columns = _columns(lines, how, file)
    fields = [_fields(line, number, len(lines[0]), file) for number, line in enumerate(lines, 1)]
    kept = fields[1:] if columns.header else fields
    if not kept:
        raise BadData(
            f"{file} has no row below its header; expected at least one: give another file"
        )
    labels = None if columns.label is None else [row[columns.label] for row in kept]
    others: tuple[str, ...] = ()
    if columns.header:
        used = (columns.text, columns.label)
        others = tuple(name for index, name in enumerate(lines[0]) if index not in used)
    return TsvTable([row[columns.text] for row in kept], labels, others, 2 if columns.header else 1)


def _numbered(table: TsvTable, file: Path, how: Reading, names: Names) -> tuple[Ints | None, Names]:
    """The labels as numbers, and the names of the classes where the labels are texts.

    Labels of which more than half are integers are meant as integers: then the first other one is
    refused.
    """
    if table.labels is None:
        return None, names
    whole = sum(map(_is_integer, table.labels))
    if any(map(_is_number, table.labels)) and (whole or not names):
        return _integers(table.labels, table.start, file), names
    held = {"": {label.strip() for label in table.labels}}
    chosen = ""
    if is_split(file.stem):
        chosen = file.stem
        beside = [
            path for path in sorted(file.parent.glob(f"*{file.suffix}")) if is_split(path.stem)
        ]
        held = {
            path.stem: {one.strip() for one in _table(path, how).labels or ()}
            for path in beside
            if path != file
        }
        held = {
            split: labels
            for split, labels in held.items()
            if labels and not any(map(_is_number, labels))
        }
        held[chosen] = {label.strip() for label in table.labels}
    if not names and len(held[chosen]) > MOST_CLASSES:
        raise BadData(
            f"{file} has {len(held[chosen])} different labels, such as {table.labels[0][:40]!r}; "
            f"expected integers or "
            f"at most {MOST_CLASSES} names: say which column holds them with label=N"
        )
    found = names_of(held, chosen, file, names)
    numbers = numbered(
        np.array([label.strip() for label in table.labels], dtype=object), found, f"{file}"
    )
    say_absent(found, numbers, file)
    return numbers, found


@final
class Texts:
    """Texts in memory, made into tokens when they are taken."""

    def __init__(self, texts: Sequence[str], labels: Ints | None, tokenizer: Tokenizer) -> None:
        self.texts = texts
        self.labels = labels
        self.tokenizer = tokenizer
        self.length = len(texts)

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        x = self.tokenizer([self.texts[int(row)] for row in index])
        return x, None if self.labels is None else self.labels[index]


def _file(folder: str, split: str) -> Path:
    """The file that is meant."""
    path = Path(folder)
    with reading(folder or "no place", EXPECTED):
        if not folder:
            raise FileNotFoundError(folder)
        if path.is_dir():
            named = [path / f"{name}.tsv" for name in ([split] if split else ["test", "dev"])]
            path = next((file for file in named if file.is_file()), named[0])
        elif split:
            raise BadData(
                f"{folder} is one file, which has no split {split!r}; leave the split out"
            )
    return path


def _lines(path: Path, quoted: bool | None) -> list[list[str]]:
    """The lines of a file in fields."""
    with reading(path, EXPECTED):
        whole = path.read_bytes().decode("utf-8-sig")
    if "\0" in whole:
        raise BadData(f"{path} holds zero bytes; expected text in UTF-8: write it again")
    lines = [line.removesuffix("\r").split("\t") for line in whole.split("\n")]
    while lines and lines[-1] == [""]:
        lines.pop()
    if not lines:
        raise BadData(f"{path} holds no rows; expected at least one: give another file")
    _require_tabs(lines, path)
    if quoted is None:
        quoted = _is_quoted(lines, path)
    if not quoted:
        return lines
    with reading(path, "a .tsv file with fields in quotation marks"):
        return [
            line
            for line in csv.reader(io.StringIO(whole, newline=""), delimiter="\t", strict=True)
            if line
        ]


def _require_tabs(lines: list[list[str]], path: Path) -> None:
    """Raise BadData for a table of commas or semicolons: as one column its header would be a
    row.
    """
    if any(len(line) > 1 for line in lines[:LOOKED_AT]):
        return
    for comma, name in ((",", "commas"), (";", "semicolons")):
        rows = csv.reader((line[0] for line in lines[:LOOKED_AT]), delimiter=comma)
        try:
            counts = [len(row) for row in rows if row]
        except csv.Error:
            continue
        first = [word.strip().strip('"').lower() for word in lines[0][0].split(comma)]
        named = counts[0] > 1 and any(word in (*LABELS, *TEXTS) for word in first)
        ends = [
            (line[0].rpartition(comma)[2], line[0].partition(comma)[0])
            for line in lines[1:LOOKED_AT]
        ]
        numbers = bool(ends) and any(
            all(map(_is_integer, column)) for column in zip(*ends, strict=True)
        )
        table = counts[0] > 1 and len(set(counts)) == 1 and numbers
        if named or table or (path.suffix.lower() == ".csv" and counts[0] > 1):
            raise BadData(
                f"{path} has {name} between its {counts[0]} columns; expected tabs: write it "
                f"again, for instance with "
                f"pandas.read_csv({path.name!r}, sep={comma!r}).to_csv('{path.stem}.tsv', "
                f"sep='\\t', index=False)"
            )


def _is_quoted(lines: list[list[str]], path: Path) -> bool:
    """Whether fields are in quotation marks as CSV writes them. Raises BadData where it cannot be
    told.
    """
    if all(QUOTED.fullmatch(field) for field in lines[0]):
        return True
    for number, line in enumerate(lines, 1):
        for field in line:
            if QUOTED.fullmatch(field) and '""' in field[1:-1]:
                raise BadData(
                    f"line {number} of {path} has a field in quotation marks with doubled ones in "
                    f"it, {field[:40]!r}; "
                    "say tsv:PATH?quoted=yes if they were put there by a program, or quoted=no if "
                    "they belong to the "
                    "text"
                )
    return False


def _fields(line: list[str], number: int, count: int, file: Path) -> list[str]:
    if len(line) != count:
        raise BadData(
            f"line {number} of {file} has {len(line)} columns, the first {count}; expected as "
            f"many, with a tab between "
            "them: mend this line"
        )
    return line


def _columns(lines: list[list[str]], how: Reading, file: Path) -> TsvColumns:
    """Text and label by option, by a name in the first line, or by what two columns hold."""
    first = lines[0]
    names = [name.strip().lower() for name in first]
    text_at = _asked(how.text, names, file)
    label_at = _asked(how.label, names, file)
    by_name = not all(word.isdigit() for word in (how.text, how.label) if word)
    if how.header is not False:
        if label_at is None and (label_at := _first_of(LABELS, names, but=text_at)) is not None:
            by_name = True
        if text_at is None and (text_at := _first_of(TEXTS, names, but=label_at)) is not None:
            by_name = True
    whole = [index for index, field in enumerate(first) if _is_integer(field)]
    if label_at is None and len(first) == 2 and len(whole) == 1 and text_at != whole[0]:
        label_at = whole[0]
    if text_at is None:
        rest = [index for index in range(len(first)) if index != label_at]
        if len(rest) != 1:
            raise BadData(
                f"{file} begins with the columns {names}, and which holds the text is not clear; "
                f"say tsv:PATH?text=N, "
                "by name or by number from 1"
            )
        text_at = rest[0]
    if how.header is not None:
        return TsvColumns(text_at, label_at, how.header)
    named = names[text_at] in TEXTS or (label_at is not None and _heads(label_at, lines))
    return TsvColumns(text_at, label_at, by_name or named)


def _heads(index: int, lines: list[list[str]]) -> bool:
    """Whether the first line names the column of labels: no integer above integers, or a text that
    no row has.
    """
    column = [line[index].strip() for line in lines if len(line) > index]
    if _is_integer(column[0]):
        return False
    return any(map(_is_number, column[1:])) or column[0] not in column[1:]


def _asked(word: str, names: list[str], file: Path) -> int | None:
    """The place of a column given by number from 1 or by name; None where none was given."""
    if not word:
        return None
    index = int(word) - 1 if word.isascii() and word.isdigit() else -1
    if word.lower() in names:
        index = names.index(word.lower())
    if not 0 <= index < len(names):
        raise BadData(
            f"{file} has no column {word!r}; expected one of {names}, or a number from 1 to "
            f"{len(names)}"
        )
    return index


def _first_of(known: Sequence[str], names: list[str], but: int | None) -> int | None:
    found = (names.index(name) for name in known if name in names)
    return next((index for index in found if index != but), None)


def _is_integer(field: str) -> bool:
    return re.fullmatch(r"\s*[0-9]{1,9}\s*", field, re.ASCII) is not None


def _is_number(field: str) -> bool:
    """Whether a label is a number of any kind, and so no name."""
    return (
        re.fullmatch(r"\s*[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?\s*", field, re.ASCII | re.IGNORECASE)
        is not None
    )


def _integers(labels: list[str], start: int, file: Path) -> Ints:
    for number, label in enumerate(labels, start):
        if not _is_integer(label):
            raise BadData(
                f"line {number} of {file} has the label {label[:40]!r}; expected integers of at "
                f"least 0: number the "
                "classes, or name the column with label=N"
            )
    return np.array([int(label) for label in labels], dtype=np.int64)
