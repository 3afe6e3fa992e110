"""The texts of benchmarks/sst2.py: training phrases, held-out sentences, and the vocabulary."""

from __future__ import annotations

import json
import random
from pathlib import Path

SHORT = 16  # the most words of a short phrase that trains
LONG = 32  # the most words of a long phrase that trains
LONGEST = 48  # the most words of any text
HELD = 500  # sentences that are held out
UNKNOWN = "[UNK]"

Row = tuple[str, str]  # label, text
Words = tuple[str, ...]


def read(file: Path) -> list[Row]:
    """The rows of a file, without its header."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        label, text = line.split("\t")
        rows.append((label, text.strip()))
    return rows


def write(file: Path, rows: list[Row]) -> None:
    """Write rows with a header."""
    lines = ["label\tsentence"]
    for label, text in rows:
        lines.append(f"{label}\t{text}")
    file.write_text("\n".join(lines) + "\n", "utf-8")


def chosen(data: Path, count: tuple[int, int]) -> tuple[list[Row], list[Row], list[Row]]:
    """Split SST-2 into phrases that train and sentences that are held out.

    Every text counts once, and texts of dev.tsv are left out. A phrase of a held-out sentence does
    not train either.

    Args:
        data: the folder of SST-2.
        count: how many short and how many long phrases train.

    Returns:
        Short phrases, long phrases, and held-out sentences.
    """
    by_text = {}
    for label, text in read(data / "train.tsv"):
        by_text[text] = (label, text)
    rows = list(by_text.values())
    random.Random(0).shuffle(rows)
    dev = {text for _, text in read(data / "dev.tsv")}

    held: list[Row] = []
    for label, text in rows:
        if _is_long(text) and text not in dev and len(held) < HELD:
            held.append((label, text))

    # A phrase is part of a sentence if its words follow each other there, between spaces.
    all_held = "\n".join(f" {text} " for _, text in held)
    short: list[Row] = []
    long: list[Row] = []
    for label, text in rows:
        if text in dev or f" {text} " in all_held:
            continue
        if _is_long(text):
            long.append((label, text))
        else:
            short.append((label, text))
    short_count, long_count = count
    return short[:short_count], long[:long_count], held


def _is_long(text: str) -> bool:
    """Whether a text has more words than a short phrase."""
    return len(text.split()) > SHORT


def tokenizer(texts: list[str], file: Path) -> None:
    """A tokenizer.json of all words that occur at least twice."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", UNKNOWN]
    trainer = trainers.WordLevelTrainer(
        min_frequency=2, special_tokens=special, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    words.save(str(file))


def vocabulary(file: Path) -> set[str]:
    """The words of a tokenizer.json."""
    return set(json.loads(file.read_text("utf-8"))["model"]["vocab"])


def distinct(rows: list[Row], known: set[str], used: set[Words]) -> list[Row]:
    """Rows that the model can tell apart, from each other and from other rows.

    Unknown words all look the same to it, and words after the longest length are not read.

    Args:
        rows: labels and texts.
        known: the vocabulary.
        used: the other rows as the model sees them. The new ones are added.

    Returns:
        The first row of each kind.
    """
    by_words: dict[Words, Row] = {}
    for label, text in rows:
        seen = []  # the text as the model sees it
        for word in text.split()[:LONGEST]:
            if word in known:
                seen.append(word)
            else:
                seen.append(UNKNOWN)
        words = tuple(seen)
        if words not in used:
            by_words.setdefault(words, (label, text))
    used |= by_words.keys()
    return list(by_words.values())


def prepared(data: Path, cache: Path, count: tuple[int, int]) -> tuple[dict[str, str], int]:
    """Data specs of the parts, by name, and the number of words.

    Files are written into the cache once.

    Args:
        data: the folder with SST-2 in `sst2`.
        cache: where the files are written.
        count: how many short and how many long phrases train.
    """
    home = cache / "sst2-texts"
    file = home / "tokenizer.json"
    dev = data / "sst2" / "dev.tsv"
    if not (home / "long.tsv").exists():  # the last file that is written
        home.mkdir(parents=True, exist_ok=True)
        short, long, held = chosen(data / "sst2", count)
        tokenizer([text for _, text in (*short, *long)], file)
        known = vocabulary(file)
        used: set[Words] = set()
        distinct(read(dev), known, used)
        write(home / "held.tsv", distinct(held, known, used))
        write(home / "short.tsv", distinct(short, known, used))
        write(home / "long.tsv", distinct(long, known, used))

    def spec(path: Path, length: int) -> str:
        return f"tsv:{path}?tokenizer={file}&length={length}"

    specs = {
        "short": spec(home / "short.tsv", SHORT),
        "long": spec(home / "long.tsv", LONG),
        "held": spec(home / "held.tsv", LONGEST),
        "dev": spec(dev, LONGEST),
    }
    return specs, len(vocabulary(file))
