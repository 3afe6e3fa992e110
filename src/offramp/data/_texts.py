"""Turns texts into tokens with a `tokenizer.json` of Hugging Face.

The library tokenizers is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np

from offramp._support.files import from_home
from offramp.data._check import X, reading
from offramp.errors import BadData, MissingExtra

PADDING = ("[PAD]", "<pad>", "<|pad|>")


@final
class Tokenizer:
    """Turns texts into {input_ids, attention_mask}, both int64 [n, length].

    Args:
        path: a tokenizer.json or its folder. No other code or file of the tokenizer is used, except
            the padding token that tokenizer_config.json names.
        length: tokens per row.

    Raises:
        BadData: the length is too small, or there is no token to fill rows up with.
        BadFile: the file is missing or damaged.
        MissingExtra: the library tokenizers is not installed.
    """

    def __init__(self, path: str, length: int) -> None:
        self.length = length
        self.file = _file(path)
        self._tokenizer: Any = None
        self.pad = 0
        self._open()

    def _open(self) -> None:
        library = _library()
        with reading(self.file, "a tokenizer.json"), _silent():
            tokenizer = library.Tokenizer.from_file(str(self.file))
            least = tokenizer.num_special_tokens_to_add(False) + 1
        if self.length < least:
            raise BadData(
                f"got length={self.length}; expected at least {least}, as {self.file} adds marks: "
                f"raise it"
            )
        self.pad = self._padding(tokenizer)
        with reading(self.file, "a tokenizer.json"), _silent():
            tokenizer.enable_truncation(max_length=self.length)
            tokenizer.no_padding()
            tokenizer.encode_batch(["a"])  # most damage that shows only in use shows here
        self._tokenizer = tokenizer

    def _padding(self, tokenizer: Any) -> int:
        """The id of the token that fills rows up: as the file states, or by a usual name."""
        padding = tokenizer.padding or {}
        if "pad_id" in padding:
            return int(padding["pad_id"])
        configured = _configured(self.file.parent / "tokenizer_config.json")
        for token in (*configured, *PADDING):
            number = tokenizer.token_to_id(token)
            if number is not None:
                return int(number)
        raise BadData(
            f"{self.file} has no token to fill rows up with; expected one, such as [PAD]: name it "
            f"as pad_token in "
            "tokenizer_config.json beside it"
        )

    def __call__(self, texts: Sequence[str]) -> X:
        """Tokenize texts.

        Args:
            texts: n of them. They are cut and padded at the end.

        Returns:
            input_ids and attention_mask, both int64 [n, length]; the mask is 1 where a token is.
        """
        ids = np.full((len(texts), self.length), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        with reading(self.file, "a tokenizer.json"):  # some damage shows only here
            encoded = self._tokenizer.encode_batch(list(texts))
        for row, encoding in enumerate(encoded):
            tokens = len(encoding.ids)
            ids[row, :tokens] = encoding.ids
            mask[row, :tokens] = 1
        return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """While it is open, standard error goes nowhere.

    The library is written in Rust, and prints a report if a damaged file makes it panic.
    """
    try:
        before = os.dup(2)
    except OSError:  # the process has no standard error
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
    """The tokenizer.json itself. Raises BadData where none is stated, or a folder has none."""
    if not folder:
        raise BadData(
            "the texts got no tokenizer; expected tsv:PATH?tokenizer=PLACE, a tokenizer.json or "
            "its folder"
        )
    path = from_home(folder)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise BadData(
            f"{path} has no tokenizer.json; expected one: transformers writes it with "
            "AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    if path.is_dir():
        return path / "tokenizer.json"
    return path


def _configured(path: Path) -> list[str]:
    """The padding token that a tokenizer_config.json names, if it is there and names one."""
    if not path.is_file():
        return []
    with reading(path, "a tokenizer_config.json"):
        token = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
    if isinstance(token, dict):  # a token with settings of its own
        token = token.get("content")
    if isinstance(token, str):
        return [token]
    return []


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as problem:
        raise MissingExtra("tokenizers", "text", "reading texts") from problem
    return tokenizers
