"""One thing, one name, and it is the field's: no word that was replaced comes back, in names or in
texts.

`NAMES` are words inside of identifiers (`_`-separated), `TEXTS` are words of comments, docstrings,
messages, help and documents. `FROZEN` are the places where an old word has to stay, each with its
reason.
"""

from __future__ import annotations

import fnmatch
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import house

# The old word inside of an identifier, and the word that took its place.
NAMES = {
    "rung": "member",
    "rungs": "members",
    "lesson": "batch",
    "lessons": "loader",
    "roll": "index",
    "course": "config",
    "looking": "forward",
    "tallying": "metrics",
    "aid": "aux",
    "aids": "auxiliary",
    "taught": "trained",
    "untaught": "untrained",
    "teach": "train",
    "teaches": "trains",
    "teaching": "training",
    "learned": "training_rows, trained_on",
    "watch": "detector",
    "watches": "detectors",
    "glance": "spot_check",
    "glances": "spot_checks",
    "filling": "buffer",
    "placing": "placement",
    "survey": "archive",
    "descent": "moves",
    "families": "baselines",
    "screening": "branchynet_grid",
    "optimiser": "optimizer",
    "optimisers": "optimizers",
    "optimising": "optimizing",
    "regulariser": "regularizer",
    "regularisers": "regularizers",
    "centre": "center",
    "centres": "centers",
    "normalised": "normalized",
    "standardised": "standardized",
    "quantising": "quantizing",
}
# The old word in a text, and what is written instead.
TEXTS = {
    "rung": "member, model",
    "rungs": "members, models",
    "lesson": "batch",
    "lessons": "batches",
    "aids": "auxiliary modules",
    "taught": "trained",
    "untaught": "untrained",
    "teach": "train",
    "teaches": "trains",
    "teaching": "training",
    "glance": "spot check",
    "glances": "spot checks",
    "optimiser": "optimizer",
    "optimisers": "optimizers",
    "regulariser": "regularizer",
    "regularisers": "regularizers",
}
# (file, word): why it stays.
FROZEN = {
    ("src/offramp/networks/network.py", "rungs"): "a field of network.json",
    ("src/offramp/building/saving.py", "rungs"): "a field of network.json",
    ("tests/*", "rungs"): "the field of network.json",
    ("tests/*", "learned"): "the column of a trace, as an argument",
    ("tests/fitting/test_checkpoint.py", "roll"): "torch's own name",
    ("src/offramp/plans/trace.py", "taught"): "a field of a trace's header",
    ("src/offramp/plans/header.py", "taught"): "a field of a trace's header",
    ("src/offramp/fitting/checkpoint.py", "aids"): "a file of a checkpoint",
    ("src/offramp/fitting/checkpoint.py", "optimiser"): "a field of a checkpoint",
    ("src/offramp/partition/checking.py", "roll"): "torch's own name",
    ("tests/data/test_data_digests.py", "roll"): "numpy's own name",
    ("docs/results/*", "*"): "what was measured then, with the words of then",
    ("CHANGELOG.md", "*"): "what happened, with the words of then",
    ("tests/documents/test_words.py", "*"): "the list itself",
}
READ = ("src", "tests", "examples", "benchmarks", "docs")
TOP = ("README.md", "CONTRIBUTING.md")


def files(*endings: str) -> list[Path]:
    """Files of the project with these endings, without results that a benchmark wrote."""
    found = [house.ROOT / name for name in TOP if Path(name).suffix in endings]
    for folder in READ:
        found += sorted(file for file in (house.ROOT / folder).rglob("*") if file.suffix in endings)
    return [
        file
        for file in found
        if not {"results", "golden"} & set(file.parts) or file.suffix == ".py"
    ]


def may_stay(file: Path, word: str) -> bool:
    """Whether a reason is given for an old word in this file."""
    name = file.relative_to(house.ROOT).as_posix()
    return any(fnmatch.fnmatch(name, where) and kept in (word, "*") for where, kept in FROZEN)


def old_names(source: str) -> Iterator[tuple[int, str, str]]:
    """The lines, identifiers and old words in them of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
            for word in re.split(r"_+", token.string.lower()):
                if word in NAMES:
                    yield token.start[0], token.string, word


def old_texts(source: str) -> Iterator[tuple[int, str]]:
    """The lines and old words of a text."""
    for number, line in enumerate(source.splitlines(), 1):
        for word in re.findall(r"(?<![\w/])[A-Za-z]+(?!\w)", line):
            if word.lower() in TEXTS:
                yield number, word.lower()


def python_texts(source: str) -> str:
    """The strings and comments of a Python file, each in its line."""
    lines = [""] * (source.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for number, text in enumerate(token.string.splitlines(), token.start[0]):
                lines[number - 1] += " " + text
    return "\n".join(lines)


def test_names():
    found = []
    for file in files(".py"):
        for line, name, word in old_names(file.read_text(encoding="utf-8")):
            if not may_stay(file, word):
                where = file.relative_to(house.ROOT)
                found.append(f"{where}:{line} {name} ({word} is now {NAMES[word]})")
    assert not found


def test_texts():
    found = []
    for file in files(".py", ".md", ".toml", ".html", ".js"):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            text = python_texts(text)
        for line, word in old_texts(text):
            if not may_stay(file, word):
                where = file.relative_to(house.ROOT)
                found.append(f"{where}:{line} {word} is now {TEXTS[word]}")
    assert not found


def test_every_class_name_means_one_thing():
    """No two classes of the package have one name, underscores aside."""
    where: dict[str, list[str]] = {}
    for file in files(".py"):
        if "src" in file.parts:
            for name in re.findall(r"(?m)^class _?(\w+)", file.read_text(encoding="utf-8")):
                where.setdefault(name, []).append(file.relative_to(house.HOUSE).as_posix())
    assert {name: places for name, places in where.items() if len(places) > 1} == {}


def test_what_is_looked_for_is_noticed():
    assert list(old_names("first_rung = 1\nx.aids\n")) == [
        (1, "first_rung", "rung"),
        (2, "aids", "aids"),
    ]
    assert list(old_texts("Teach the rungs.\nstrung")) == [(1, "teach"), (1, "rungs")]
    assert "taught" in python_texts('raise ValueError("never taught")')
    assert "rung" not in python_texts("rung = 1")


@pytest.mark.parametrize(("where", "word"), FROZEN)
def test_every_exception_is_needed(where, word):
    """An exception for a word that is gone is taken off the list."""
    if word == "*":
        return
    for file in house.ROOT.glob(where if "*" not in where else where.replace("*", "**/*.py")):
        text = file.read_text(encoding="utf-8").lower()
        if re.search(rf"(?<![a-z]){word}(?![a-z])", text) and file.name != "test_words.py":
            return
    raise AssertionError(f"{where} has no {word!r} any more")
