"""Texts into tokens by a `tokenizer.json` of Hugging Face; the library tokenizers is imported where
used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from offramp.data._check import X, reading
from offramp.errors import BadData, MissingExtra

PADDING = ("[PAD]", "<pad>", "<|pad|>")


@final
class Tokenizer:
    """Texts -> {input_ids, attention_mask}, int64 [n, length]; nothing of it but this one file is
    read.
    """

    def __init__(self, path: str, length: int) -> None:
        self.length = length
        self.file = _file(path)
        self._made: Any = None
        self.pad = 0
        self._open()

    def _open(self) -> None:
        library = _library()
        with reading(self.file, "a tokenizer.json"), _silent():
            made = library.Tokenizer.from_file(str(self.file))
            least = made.num_special_tokens_to_add(False) + 1
        if self.length < least:
            raise BadData(
                f"got length={self.length}; expected at least {least}, as {self.file} adds marks: "
                f"raise it"
            )
        self.pad = self._padding(made)
        with reading(self.file, "a tokenizer.json"), _silent():
            made.enable_truncation(max_length=self.length)
            made.no_padding()
            made.encode_batch(["a"])  # most damage that shows only in use shows here
        self._made = made

    def _padding(self, made: Any) -> int:
        """The number of the token that fills a row up: as the file says, or by a usual name."""
        said = made.padding or {}
        if "pad_id" in said:
            return int(said["pad_id"])
        for token in (*_configured(self.file.parent / "tokenizer_config.json"), *PADDING):
            if (number := made.token_to_id(token)) is not None:
                return int(number)
        raise BadData(
            f"{self.file} has no token to fill rows up with; expected one, such as [PAD]: name it "
            f"as pad_token in "
            "tokenizer_config.json beside it"
        )

    def __call__(self, texts: Sequence[str]) -> X:
        """Tokens of each text, cut and padded at the end, and a mask that is 1 where a token
        stands.
        """
        ids = np.full((len(texts), self.length), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        with reading(self.file, "a tokenizer.json"):  # some damage shows only here
            encoded = self._made.encode_batch(list(texts))
        for row, found in enumerate(encoded):
            ids[row, : len(found.ids)] = found.ids
            mask[row, : len(found.ids)] = 1
        return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without standard error, to which the library writes a report of its own when a damaged file
    makes it panic.
    """
    try:
        before = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _file(folder: str) -> Path:
    if not folder:
        raise BadData(
            "the texts got no tokenizer; expected tsv:PATH?tokenizer=PLACE, a tokenizer.json or "
            "its folder"
        )
    path = Path(folder).expanduser()
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise BadData(
            f"{path} has no tokenizer.json; expected one: transformers writes it with "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    return path / "tokenizer.json" if path.is_dir() else path


def _configured(path: Path) -> list[str]:
    """The padding token that a tokenizer_config.json names, if it is there and names one."""
    if not path.is_file():
        return []
    with reading(path, "a tokenizer_config.json"):
        said = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
    token = said.get("content") if isinstance(said, dict) else said
    return [token] if isinstance(token, str) else []


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as problem:
        raise MissingExtra("tokenizers", "text", "reading texts") from problem
    return tokenizers
