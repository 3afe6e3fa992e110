"""Exits as an ensemble whose members make different errors (deep negative correlation
classification).

Zhang, Hou, Liu, Bian, Xu, Zhou and Zhu, 2022, arXiv 2212.07070. Let p_m be the probability of the
true class at exit m of M, q their mean, and d(p, q) = -ln p + ln q + (p - q) / q >= 0 the Bregman
divergence of -ln. Then

    -ln q = mean_m(-ln p_m) - mean_m d(p_m, q),     because sum_m (p_m - q) = 0,

so the loss, the sum over exits of -ln p_m - amount d(p_m, q), trains the exits separately at amount
0, only the averaged output at 1, and mixes both in between. Only the abstract was available: this
follows from its description and from the identity. Gradients are the same whether q is held fixed
or not. It is computed in log space, without a clamp on probabilities. Optimizer, epochs and amount
are not known and therefore ours: Adam as in `joint`, and a small amount, because single exits get
worse as it approaches 1, and in a chain of exits rows leave with the output of a single one.
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

    Args:
        amount: from 0 (each exit for itself) to 1 (only their averaged output).
        epochs: over the training rows.
        rate: of Adam.
    """

    def __init__(self, amount: float = 0.1, *, epochs: int = 10, rate: float = 1e-3) -> None:
        self.amount = amount
        self.epochs = epochs
        self.rate = rate

    def prepare(self, network: Network) -> None:
        """Check the arguments and the network.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: amount is not between 0 and 1.
            BadNetwork: there is nothing to train.
        """
        require("amount", self.amount, low=0, high=1)  # above 1 the loss has no lower bound
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
        own = own_logs(outputs.logits, batch.labels())  # [M, b]
        by_exit = (-own - self.amount * divergence(own)).mean(1)  # [M]
        return dict(zip(outputs.logits, by_exit.unbind(), strict=True))


def own_logs(logits: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """ln p_m of the true class [M, b], from logits [b, C] of each exit and labels [b]."""
    by_exit = list[Tensor]()
    for own in logits.values():
        log_softmax = own.log_softmax(1)  # [b, C]
        by_exit.append(log_softmax.gather(1, y[:, None])[:, 0])  # [b]
    return torch.stack(by_exit)


def divergence(own: Tensor) -> Tensor:
    """d(p_m, q) [M, b] of ln p_m [M, b], with q the mean of the p_m."""
    # With r = ln(p / q) it is exp(r) - 1 - r.
    ratio = own - mean_log(own)
    return ratio.expm1() - ratio


def mean_log(own: Tensor) -> Tensor:
    """ln q [b]: the logarithm of the mean of M probabilities, of ln p_m [M, b]."""
    return own.logsumexp(0) - math.log(len(own))
