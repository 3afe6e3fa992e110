"""Reads texts from a file of tab-separated columns, with labels, as numbers of tokens.

tsv:PATH?tokenizer=PLACE
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
MOST_CLASSES = 1000  # a column with more different texts does not hold classes
LOOKED_AT = 20  # lines that are examined to find the columns
QUOTED = re.compile(r'"(?:[^"]|"")*"')
EXPECTED = "a .tsv file, UTF-8 text with tabs between the columns"


class TsvColumns(NamedTuple):
    """Which columns hold text and label, counted from 0, and whether the first line is a header.

    label is None where there are no labels.
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
    """Read texts as {input_ids, attention_mask}, both int64 [rows, length], and their labels.

    Longer texts are cut, shorter ones padded. Labels are integers of at least 0, or texts. Texts
    are numbered by name, in sorted order, over `train.tsv` next to the file where there is one.

    Args:
        location: the file, or a folder of splits.
        split: s means `s.tsv` in a folder. Without a split it is `test.tsv`, or `dev.tsv` if there
            is no such file.
        tokenizer: a `tokenizer.json`, or the folder that holds it.
        length: tokens per row.
        text: the column of texts, by its name in the first line or by number from 1. By default it
            is called `sentence`, `text`, ...
        label: the column of labels, in the same way. By default it is called `label`, `target`,
            ...; of two columns it is the one with an integer.
        quoted: yes reads fields in quotation marks as CSV does; no keeps the marks, as in GLUE. By
            default a file is quoted if all fields of its first line are, and refused if that is
            not clear.
        header: yes or no: whether the first line names the columns. By default it is examined.
        classes: names of the classes in the order of their numbers, as A,B,C or as a file with one
            name a line.

    Returns:
        The rows. Texts are tokenized when they are taken.

    Raises:
        BadData: the columns are not clear, the labels are not labels, or commas separate columns.
        BadFile: there is no such file, or it is not UTF-8 text.
        MissingExtra: the library tokenizers is not installed.
    """
    # Options and columns are checked before the tokenizer is opened, which takes longer.
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
    source = Texts(table.texts, labels, Tokenizer(tokenizer, int(length)))
    return Rows(source, name=f"tsv:{file}", class_names=names or None)


class Reading(NamedTuple):
    """The user's options for reading a file.

    Columns are names or numbers, "" where not stated. quoted and header are None where not stated.
    """

    text: str
    label: str
    quoted: bool | None
    header: bool | None


class TsvTable(NamedTuple):
    """The rows of a file below its header; `start` is the number of the first row's line."""

    texts: list[str]
    labels: list[str] | None
    others: tuple[str, ...]
    start: int


def _yes_no(name: str, text: str) -> bool | None:
    if text not in ("", "yes", "no"):
        raise BadData(f"got {name}={text}; expected yes or no")
    if not text:
        return None
    return text == "yes"


def _table(file: Path, how: Reading) -> TsvTable:
    """The texts and labels of a file, as text."""
    lines = _lines(file, how.quoted)
    columns = _columns(lines, how, file)
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        _require_width(line, number, width, file)

    start = 2 if columns.header else 1
    rows = lines[1:] if columns.header else lines
    if not rows:
        raise BadData(
            f"{file} has no row below its header; expected at least one: give another file"
        )
    texts = [row[columns.text] for row in rows]
    labels: list[str] | None = None
    if columns.label is not None:
        labels = [row[columns.label] for row in rows]
    others = list[str]()  # names of columns that are not read
    if columns.header:
        for index, name in enumerate(lines[0]):
            if index not in (columns.text, columns.label):
                others.append(name)
    return TsvTable(texts, labels, tuple(others), start)


def _numbered(table: TsvTable, file: Path, how: Reading, names: Names) -> tuple[Ints | None, Names]:
    """The labels as numbers, and the names of the classes if the labels are texts.

    Labels are meant as integers if one of them is an integer, or if one is another number and the
    user does not name the classes. Then the first label that is not an integer is refused.
    """
    if table.labels is None:
        return None, names
    integers = sum(map(_is_integer, table.labels))
    if any(map(_is_number, table.labels)) and (integers or not names):
        return _integers(table.labels, table.start, file), names

    texts = [label.strip() for label in table.labels]
    chosen = file.stem if is_split(file.stem) else ""
    held = _labels_beside(file, how) if chosen else {}
    held[chosen] = set(texts)
    if not names and len(held[chosen]) > MOST_CLASSES:
        raise BadData(
            f"{file} has {len(held[chosen])} different labels, such as {table.labels[0][:40]!r}; "
            f"expected integers or "
            f"at most {MOST_CLASSES} names: say which column holds them with label=N"
        )
    names = names_of(held, chosen, file, names)
    numbers = numbered(np.array(texts, dtype=object), names, f"{file}")
    say_absent(names, numbers, file)
    return numbers, names


def _labels_beside(file: Path, how: Reading) -> dict[str, set[str]]:
    """The labels of the other splits in the same folder, by split, if they are texts."""
    held = dict[str, set[str]]()
    for path in sorted(file.parent.glob(f"*{file.suffix}")):
        if path == file or not is_split(path.stem):
            continue
        labels = {label.strip() for label in _table(path, how).labels or ()}
        if labels and not any(map(_is_number, labels)):
            held[path.stem] = labels
    return held


@final
class Texts:
    """Texts in memory, tokenized when they are taken."""

    def __init__(self, texts: Sequence[str], labels: Ints | None, tokenizer: Tokenizer) -> None:
        self.texts = texts
        self.labels = labels
        self.tokenizer = tokenizer
        self.length = len(texts)

    def take(self, index: Ints) -> tuple[X, Ints | None]:
        """See Indexed."""
        texts = [self.texts[int(row)] for row in index]
        x = self.tokenizer(texts)  # each [k, length]
        if self.labels is None:
            return x, None
        return x, self.labels[index]


def _file(folder: str, split: str) -> Path:
    """The file of a split."""
    path = Path(folder)
    with reading(folder or "no place", EXPECTED):
        if not folder:
            raise FileNotFoundError(folder)
        if path.is_dir():
            wanted = path / f"{split or 'test'}.tsv"
            if not split and not wanted.is_file() and (path / "dev.tsv").is_file():
                wanted = path / "dev.tsv"
            path = wanted
        elif split:
            raise BadData(
                f"{folder} is one file, which has no split {split!r}; leave the split out"
            )
    return path


def _lines(path: Path, quoted: bool | None) -> list[list[str]]:
    """The lines of a file, each as a list of fields."""
    with reading(path, EXPECTED):
        text = path.read_bytes().decode("utf-8-sig")  # without a byte order mark
    if "\0" in text:
        raise BadData(f"{path} holds zero bytes; expected text in UTF-8: write it again")
    # Not `splitlines`, which also splits at characters that occur in texts, such as U+2028.
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
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
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
        return [line for line in reader if line]


def _require_tabs(lines: list[list[str]], path: Path) -> None:
    """Raise BadData for columns between commas or semicolons.

    Such a file would be read as one column of texts, and its header as a row. A text may contain
    commas too. So a file is only refused if its first line has the usual names, or if all lines
    have equally many columns with integers in the first or the last, or if it is called .csv.
    """
    first_lines = lines[:LOOKED_AT]
    plain = list[str]()
    for line in first_lines:
        if len(line) > 1:  # it has tabs
            return
        plain.append(line[0])
    for comma, name in ((",", "commas"), (";", "semicolons")):
        try:
            counts = [len(row) for row in csv.reader(plain, delimiter=comma) if row]
        except csv.Error:
            continue
        if counts[0] < 2:
            continue
        is_table = len(set(counts)) == 1 and _has_integers(plain[1:], comma)
        if _names_columns(plain[0], comma) or is_table or path.suffix.lower() == ".csv":
            raise BadData(
                f"{path} has {name} between its {counts[0]} columns; expected tabs: write it "
                f"again, for instance with "
                f"pandas.read_csv({path.name!r}, sep={comma!r}).to_csv('{path.stem}.tsv', "
                f"sep='\\t', index=False)"
            )


def _names_columns(line: str, comma: str) -> bool:
    """Whether one of the fields is a usual name for a column."""
    for word in line.split(comma):
        if word.strip().strip('"').lower() in (*LABELS, *TEXTS):
            return True
    return False


def _has_integers(lines: list[str], comma: str) -> bool:
    """Whether the first fields of all lines are integers, or the last fields are."""
    if not lines:
        return False
    first_are = True
    last_are = True
    for line in lines:
        first, _, _ = line.partition(comma)
        _, _, last = line.rpartition(comma)
        first_are = first_are and _is_integer(first)
        last_are = last_are and _is_integer(last)
    return first_are or last_are


def _is_quoted(lines: list[list[str]], path: Path) -> bool:
    """Whether fields are in quotation marks as CSV writes them. Raises BadData if it is unclear."""
    if all(map(QUOTED.fullmatch, lines[0])):
        return True
    # A doubled mark inside of marks is how CSV writes a mark. A text could contain it too.
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


def _require_width(line: list[str], number: int, count: int, file: Path) -> None:
    """Raise BadData for a line with another number of columns than the first one."""
    if len(line) != count:
        raise BadData(
            f"line {number} of {file} has {len(line)} columns, the first {count}; expected as "
            f"many, with a tab between "
            "them: correct this line"
        )


def _columns(lines: list[list[str]], how: Reading, file: Path) -> TsvColumns:
    """Find the columns of text and label, and whether the first line is a header.

    Each column is found by the user's option, then by a usual name in the first line. If two
    columns remain unclear, then the label is the one with an integer, and the text the other one.
    """
    first = lines[0]
    names = [name.strip().lower() for name in first]
    text_at = _asked(how.text, names, file)
    label_at = _asked(how.label, names, file)
    # A name, unlike a number, can only come from a header.
    by_name = False
    for word in (how.text, how.label):
        if word and not word.isdigit():
            by_name = True

    # By a usual name, unless the user states that there is no header.
    if how.header is not False:
        if label_at is None:
            label_at = _first_of(LABELS, names, but=text_at)
            by_name = by_name or label_at is not None
        if text_at is None:
            text_at = _first_of(TEXTS, names, but=label_at)
            by_name = by_name or text_at is not None

    # By content.
    integers = [index for index, field in enumerate(first) if _is_integer(field)]
    if label_at is None and len(first) == 2 and len(integers) == 1 and text_at != integers[0]:
        label_at = integers[0]
    if text_at is None:
        rest = list(range(len(first)))
        if label_at is not None:
            rest.remove(label_at)
        if len(rest) != 1:
            raise BadData(
                f"{file} begins with the columns {names}, and which holds the text is not clear; "
                f"say tsv:PATH?text=N, "
                "by name or by number from 1"
            )
        text_at = rest[0]

    if how.header is not None:
        return TsvColumns(text_at, label_at, how.header)
    is_header = by_name or names[text_at] in TEXTS
    if not is_header and label_at is not None:
        is_header = _heads(label_at, lines)
    return TsvColumns(text_at, label_at, is_header)


def _heads(index: int, lines: list[list[str]]) -> bool:
    """Whether the first line names the column of labels.

    It does if it is a text above numbers, or a text that no row has as its label.
    """
    column = [line[index].strip() for line in lines if len(line) > index]
    if _is_integer(column[0]):
        return False
    return any(map(_is_number, column[1:])) or column[0] not in column[1:]


def _asked(word: str, names: list[str], file: Path) -> int | None:
    """The index of a column that the user asks for by name or by number from 1; None without."""
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
    """The index of the first known name in the header, other than the column `but`."""
    for name in known:
        if name in names and names.index(name) != but:
            return names.index(name)
    return None


def _is_integer(field: str) -> bool:
    return re.fullmatch(r"\s*[0-9]{1,9}\s*", field, re.ASCII) is not None


def _is_number(field: str) -> bool:
    """Whether a label is a number of any kind, and so not a name."""
    number = r"\s*[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?\s*"
    return re.fullmatch(number, field, re.ASCII | re.IGNORECASE) is not None


def _integers(labels: list[str], start: int, file: Path) -> Ints:
    for number, label in enumerate(labels, start):
        if not _is_integer(label):
            raise BadData(
                f"line {number} of {file} has the label {label[:40]!r}; expected integers of at "
                f"least 0: number the "
                "classes, or name the column with label=N"
            )
    return np.array([int(label) for label in labels], dtype=np.int64)
