"""A small encoder of words with masks, and rows for it, as Hugging Face's look from outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from small import seeded

WORDS = 30
WIDTH = 8
CLASSES = 3
LONGEST = 32


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Block(nn.Module):
    """One head of attention in which padding is not seen, and a residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        weights = (self.query(h) @ self.key(h).transpose(1, 2) + bias).softmax(-1)
        return h + self.mix(weights @ self.value(h)).tanh()


class Encoder(nn.Module):
    """Words [B, T] and a mask [B, T] -> an Answer; `halves` drops every second position behind the
    first block.
    """

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.halves = halves

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Answer:
        length = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = self.words(input_ids) + self.places.weight[:length]
        for number, block in enumerate(self.blocks):
            bias = (1.0 - mask[:, None, :]).expand(-1, h.shape[1], -1) * -1e4
            h = block(h, bias)
            if self.halves and not number:
                h = h[:, ::2].contiguous()
                mask = mask[:, ::2].contiguous()
        return Answer(self.head(h[:, 0]), h)


def encoder(*, halves: bool = False) -> Encoder:
    """A seeded one in eval mode."""
    return seeded(lambda: Encoder(halves), 3).eval()


def texts(count: int, length: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Rows of words padded to one length; row i keeps `length - i` of them, and at least one."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, WORDS, (count, length), generator=draw)
    kept = (length - torch.arange(count) % length)[:, None]
    mask = (torch.arange(length) < kept).long()
    return {"input_ids": words * mask, "attention_mask": mask}
