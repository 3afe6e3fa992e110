"""Exits as an ensemble whose members are right and err apart (deep negative correlation
classification).

Zhang, Hou, Liu, Bian, Xu, Zhou and Zhu, 2022, arXiv 2212.07070. With p_m the probability that exit
m of M gives to the true class, q their mean, and d(p, q) = -ln p + ln q + (p - q) / q >= 0 the
Bregman divergence of -ln,

    -ln q = mean_m(-ln p_m) - mean_m d(p_m, q),     because sum_m (p_m - q) = 0,

so that the loss, the sum over exits of -ln p_m - amount d(p_m, q), trains the exits apart at amount
0, the averaged answer alone at 1, and mixes in between. Only the abstract was at hand: this follows
from its description and from the identity. Gradients are the same whether q is held fixed or not.
In log space, with no clamp on probabilities. Optimizer, epochs and amount are lost, and ours: Adam
as in `joint`, and a small amount, because single exits get worse as it nears 1, and in a chain of
exits each one answers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from offramp._support.arguments import require
from offramp.networks.network import Network
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    trainable_exits,
)
from offramp.recipes._together import parameters_of

__all__ = ["Decorrelated"]


class Decorrelated(Recipe):
    """Models and exits together: cross-entropies less `amount` times how far each exit is from
    their mean.

    amount: from 0 (each exit for itself) to 1 (their averaged answer only). epochs, rate: of Adam.
    """

    def __init__(self, amount: float = 0.1, *, epochs: int = 10, rate: float = 1e-3) -> None:
        self.amount = amount
        self.epochs = epochs
        self.rate = rate

    def prepare(self, network: Network) -> None:
        """Raise InvalidArgument for an amount outside 0 to 1, BadNetwork where there is nothing to
        train.
        """
        require("amount", self.amount, low=0, high=1)  # above 1 the loss has no lower end
        trainable_exits(network)

    def phases(self, network: Network) -> list[Phase]:
        """Everything at once."""
        return [
            Phase(
                "decorrelated",
                parameters_of(network),
                self.epochs,
                partial(torch.optim.Adam, lr=self.rate),
            )
        ]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """-ln p_m - amount d(p_m, q), mean over rows, by exit."""
        own = own_logs(outputs.logits, batch.labels())
        parts = (-own - self.amount * divergence(own)).mean(1)
        return dict(zip(outputs.logits, parts.unbind(), strict=True))


def own_logs(logits: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """ln p_m of the true class [M, b], from logits [b, C] of each exit and labels [b]."""
    return torch.stack([one.log_softmax(1).gather(1, y[:, None])[:, 0] for one in logits.values()])


def divergence(own: Tensor) -> Tensor:
    """d(p_m, q) [M, b] of ln p_m [M, b], with q their mean."""
    apart = own - mean_log(own)
    return apart.expm1() - apart


def mean_log(own: Tensor) -> Tensor:
    """ln q [b]: the logarithm of the mean of M probabilities, of ln p_m [M, b]."""
    return own.logsumexp(0) - math.log(len(own))
