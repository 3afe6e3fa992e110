"""A small supernet of two tasks for the tests of `designing`."""

from __future__ import annotations

import torch
from torch import nn

from offramp.designing.supernet import Supernet
from offramp.layers.residual import Block
from small import seeded

OPTIONS = ("dense", "ghost?ratio=2", "narrow?by=2", "skip")
PLACES = ("body.0", "body.1", "body.2")


class Small(nn.Module):
    """Images [B, 1, 8, 8] -> logits [B, 3] by three residual blocks of eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.body = nn.Sequential(Block(8, 8), Block(8, 8), Block(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(self.stem(x))
        logits: torch.Tensor = self.fc(h.mean((2, 3)))
        return logits


def small_model() -> Small:
    return seeded(Small, 0).eval()


def supernet_of(**changes) -> Supernet:
    """Three places with four options each, exits after two of them, two tasks."""
    choices = dict.fromkeys(PLACES, OPTIONS)
    arguments = {"head": "fc", "heads": {"three": None, "two": 2}, "exits": ["body.0", "body.1"]}
    choices = changes.pop("choices", choices)
    model = changes.pop("model", None) or small_model()
    return seeded(
        lambda: Supernet(model, choices, torch.zeros(2, 1, 8, 8), **{**arguments, **changes}), 0
    )
