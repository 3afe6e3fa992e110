"""Models of the zoo that must be refused, each for one reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 12
CLASSES = 10
ROWS = 7


def build(name: str) -> tuple[nn.Module, Tensor]:
    """One of them, and seven rows [7, 12]."""
    kinds = {
        "batch_mean": BatchMean,
        "batch_statistics": BatchStatistics,
        "branch_on_values": BranchOnValues,
        "fixed_batch": FixedBatch,
        "weight_shared_loop": WeightSharedLoop,
        "memory": Memory,
        "batch_folded": BatchFolded,
    }
    return kinds[name](), torch.randn(ROWS, WIDTH)


class _Body(nn.Module):
    """Three layers and a head; `between` runs behind the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.one(x))
        return self.head(self.three(self.two(h).tanh()).tanh())

    def between(self, h: Tensor) -> Tensor:
        return h


class BatchMean(_Body):
    """What a row gives depends on the others."""

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class BatchStatistics(_Body):
    """A batch norm that has no statistics of its own takes those of the batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, track_running_stats=False)

    def between(self, h: Tensor) -> Tensor:
        return self.norm(h)


class BranchOnValues(_Body):
    """Python decides by the data."""

    def between(self, h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h


class FixedBatch(_Body):
    """It knows the size of its batch."""

    def between(self, h: Tensor) -> Tensor:
        return h.reshape(ROWS * 2, -1).relu().reshape(ROWS, -1)


class WeightSharedLoop(_Body):
    """One module three times; nobody can say after which one to leave."""

    def between(self, h: Tensor) -> Tensor:
        for _ in range(3):
            h = self.two(h).relu()
        return h


class Memory(_Body):
    """Every call changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h * self.calls


class BatchFolded(_Body):
    """At the cut the batch is folded with heads: [2 B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = nn.Unflatten(1, (2, WIDTH // 2))
        self.folded = nn.Linear(WIDTH // 2, WIDTH // 2)

    def between(self, h: Tensor) -> Tensor:
        folded = self.folded(self.fold(h).flatten(0, 1))
        return folded.reshape(h.shape[0], -1)
