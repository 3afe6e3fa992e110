"""Small models to take apart."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from small import seeded

Pair = namedtuple("Pair", ["hidden", "size"])


class Around(nn.Module):
    """Two layers with a function of (hidden, input) between them."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.body = nn.Linear(width, width)
        self.last = nn.Linear(width, 3)
        self.register_buffer("table", torch.arange(width) / width, persistent=False)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.first(x).tanh())
        return self.last(self.between(h, x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)
        self.deep = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + self.deep(h))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.spare = nn.Linear(4, 4)
        self.side = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.body(x))
        self.side(h)
        return self.last(h)


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.other = nn.Linear(3, 3)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        folded = (x @ torch.ones(4, 6)).view(-1, 2, 3).flatten(0, 1)
        return self.last(self.one(x) + self.other(folded).view(x.shape[0], 6))


class Folded(Around):
    def __init__(self) -> None:
        super().__init__(lambda h, _: h)
        self.fold = nn.Flatten(0, 1)
        self.unfold = nn.Unflatten(0, (-1, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.fold(self.first(x).view(-1, 2, 3))
        return self.last(self.body(self.unfold(h).flatten(1)))


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


def model_of(make: Any) -> nn.Module:
    return seeded(make, 0).eval()


def rows(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
