"""Learning rates over a phase."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offramp.recipe import Scheduling


def dropped(*shares: float, by: float = 0.1) -> Scheduling:
    """The rate times `by` after each of these shares of a phase's steps: papers name epochs, ours may be others."""

    def schedule(optimiser: Optimizer, steps: int) -> LRScheduler:
        ends: Sequence[float] = [share * steps for share in shares]
        return LambdaLR(optimiser, lambda step: by ** sum(step >= end for end in ends))  # its state is plain data

    return schedule
