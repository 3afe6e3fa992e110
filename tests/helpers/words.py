"""What we use of the library tokenizers, with one number per word, for machines that have it
not.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace


class Tokenizer:
    """Marks around words: 1 ... 2; unknown words are 3."""

    def __init__(self, known, padding):
        self.known = known
        self.padding = padding
        self.most = None

    @classmethod
    def from_file(cls, path):
        said = json.loads(Path(path).read_text())
        return cls(said["words"], said.get("padding"))

    def num_special_tokens_to_add(self, is_pair):
        return 2

    def token_to_id(self, token):
        return self.known.get(token)

    def enable_truncation(self, max_length):
        self.most = max_length

    def no_padding(self):
        pass

    def encode_batch(self, texts):
        found = [
            [self.known.get(word, 3) for word in text.split()][: self.most - 2] for text in texts
        ]
        return [SimpleNamespace(ids=[1, *words, 2]) for words in found]


def library() -> ModuleType:
    """The stand-in for the package."""
    fake = ModuleType("tokenizers")
    fake.Tokenizer = Tokenizer
    return fake


def write_tokenizer(folder: Path, **more: object) -> Path:
    """A tokenizer.json that the stand-in reads."""
    folder.mkdir(exist_ok=True)
    said = {"words": {"[PAD]": 0, "good": 4, "bad": 5, "film": 6, "a": 7}, **more}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder
