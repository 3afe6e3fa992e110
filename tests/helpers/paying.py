"""A model where one place alone can pay, and rows for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 16


class Lift(nn.Module):
    """Appends the product of the first two numbers, which no linear exit finds before."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.same.weight.copy_(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.same(x), x[:, :1] * x[:, 1:2]], 1)


class Heavy(nn.Module):
    """Much work that changes nothing, and on the way nothing but sums."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.work = nn.Sequential(nn.Linear(width, 600), nn.Linear(600, 600), nn.Linear(600, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.work(x)


class Head(nn.Module):
    """Two classes by the sign of the last number."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x[:, -1:], x[:, -1:]], 1)


def parity(*order: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *order, Head()).eval()


def signs(count: int = 240, seed: int = 0) -> tuple[Any, Any]:
    """Rows of signs, and whether the first two agree."""
    x = np.random.default_rng(seed).choice([-1.0, 1.0], (count, WIDTH)).astype(np.float32)
    return x, (x[:, 0] * x[:, 1] > 0).astype(int)


def with_identity_first(model: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(WIDTH))
        model[0].bias.zero_()
    return model


def lifted() -> nn.Sequential:
    """A model of whose places only "1" pays: the work behind it changes nothing."""
    return with_identity_first(parity(Lift(), Heavy(WIDTH + 1)))
