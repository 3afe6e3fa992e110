"""Learning rates over a phase."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offramp.networks.recipe import MakeSchedule


def dropped(*shares: float, by: float = 0.1) -> MakeSchedule:
    """The rate times `by` after each of these shares of a phase's steps: papers name epochs, ours
    may be others.
    """

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        ends: Sequence[float] = [share * steps for share in shares]
        # its state is plain data
        return LambdaLR(optimizer, lambda step: by ** sum(step >= end for end in ends))

    return schedule


def linear(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the full rate to nothing along a line."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / max(1, steps)))


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the full rate to nothing along half a cosine (Loshchilov and Hutter, 2017, arXiv
    1608.03983).
    """
    return LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2
    )
