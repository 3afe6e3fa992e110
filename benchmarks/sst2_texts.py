"""The texts of benchmarks/sst2.py: what trains, what is held out, and the words that are told
apart.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SHORT, LONG, LONGEST, HELD = (
    16,
    32,
    48,
    500,
)  # words of phrases that train, and of any text; sentences held out
Row = tuple[str, str]  # label, text


def read(file: Path) -> list[Row]:
    """The rows of a file, without its header."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [(label, text.strip()) for label, text in (line.split("\t") for line in lines)]


def write(file: Path, rows: list[Row]) -> None:
    """A file with a header."""
    file.write_text(
        "\n".join(["label\tsentence", *(f"{label}\t{text}" for label, text in rows)]) + "\n",
        "utf-8",
    )


def chosen(data: Path, count: tuple[int, int]) -> tuple[list[Row], list[Row], list[Row]]:
    """Short and long phrases that train, and held-out sentences none of whose phrases is among
    those.

    Nor is a text of dev.tsv. Every text counts once.
    """
    rows = list({text: (label, text) for label, text in read(data / "train.tsv")}.values())
    draw = random.Random(0)
    dev = {text for _, text in read(data / "dev.tsv")}
    draw.shuffle(rows)
    held = [row for row in rows if len(row[1].split()) > SHORT and row[1] not in dev][:HELD]
    whole = "\n".join(f" {text} " for _, text in held)
    rest = [row for row in rows if row[1] not in dev and f" {row[1]} " not in whole]
    short = [row for row in rest if len(row[1].split()) <= SHORT]
    long = [row for row in rest if len(row[1].split()) > SHORT]
    return short[: count[0]], long[: count[1]], held


def tokenizer(texts: list[str], file: Path) -> None:
    """A tokenizer.json of all words that occur at least twice."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]"]
    made.train_from_iterator(
        texts,
        trainers.WordLevelTrainer(min_frequency=2, special_tokens=special, show_progress=False),
    )
    made.save(str(file))


def distinct(rows: list[Row], known: set[str], but: set[tuple[str, ...]]) -> list[Row]:
    """Rows that differ from each other, and from `but`, also where unknown words look alike."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        words = tuple(word if word in known else "[UNK]" for word in row[1].split())[:LONGEST]
        if words not in but:
            found.setdefault(words, row)
    but |= found.keys()
    return [*found.values()]


def prepared(data: Path, cache: Path, count: tuple[int, int]) -> tuple[dict[str, str], int]:
    """Data specs of the parts, by name, and the number of words; files are written into the cache
    once.
    """
    home = cache / "sst2-texts"
    if not (home / "long.tsv").exists():
        home.mkdir(parents=True, exist_ok=True)
        short, long, held = chosen(data / "sst2", count)
        tokenizer([text for _, text in (*short, *long)], home / "tokenizer.json")
        known = set(json.loads((home / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
        but: set[tuple[str, ...]] = set()
        distinct(read(data / "sst2" / "dev.tsv"), known, but)
        for name, rows in (("held", held), ("short", short), ("long", long)):
            write(home / f"{name}.tsv", distinct(rows, known, but))
    words = len(json.loads((home / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])

    def spec(file: Path, length: int) -> str:
        return f"tsv:{file}?tokenizer={home / 'tokenizer.json'}&length={length}"

    parts = {"short": SHORT, "long": LONG, "held": LONGEST}
    specs = {name: spec(home / f"{name}.tsv", length) for name, length in parts.items()}
    return specs | {"dev": spec(data / "sst2" / "dev.tsv", LONGEST)}, words
