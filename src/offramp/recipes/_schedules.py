"""Learning rates over a phase."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offramp.networks.recipe import MakeSchedule


def dropped(*shares: float, by: float = 0.1) -> MakeSchedule:
    """A rate that is multiplied by `by` after each of these shares of a phase's steps.

    Shares and not epochs, because the epochs of a paper can be replaced by others.
    """

    def schedule(optimizer: Optimizer, steps: int) -> LRScheduler:
        ends = [share * steps for share in shares]

        def factor(step: int) -> float:
            passed = 0
            for end in ends:
                if step >= end:
                    passed += 1
            return by**passed

        # LambdaLR's state is plain data, so checkpoints can hold it.
        return LambdaLR(optimizer, factor)

    return schedule


def linear(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A rate that falls to 0 along a line."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / max(1, steps)))


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """A rate that falls to 0 along half a cosine.

    Loshchilov and Hutter, 2017, arXiv 1608.03983.
    """

    def factor(step: int) -> float:
        done = min(1.0, step / max(1, steps))
        return (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)
