"""All exits at once, with weights from attention over layers; each also matches all the others.

After LSANet (Jiang et al., 2022, arXiv 2209.13844). Its abstract names adaptive weights of the
auxiliary losses by attention over layers, and pairwise matching of predictions among all branches
("knowledge synergy"). We found no formulas and no numbers. The matching is that of DKS (Sun, Yao,
Zhang and Ren, 2019, arXiv 1906.00675); the weights, beta and the schedule are our choice.
Shapes: b rows of a batch, C classes, m layers.
"""

from __future__ import annotations

from functools import partial
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp._support.arguments import require
from offramp.errors import BadNetwork
from offramp.exits.selective import Selective
from offramp.networks.network import Network
from offramp.networks.nodes import Seen
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    reading,
    trainable_exits,
)
from offramp.recipes._schedules import cosine
from offramp.recipes._together import parameters_of, soft_cross_entropy

__all__ = ["Synergy"]


class Synergy(Recipe):
    """sum_l w_l CE_l + CE of the last exit + beta times the mean over ordered pairs (i, j) of
    CE(p_i, stopgrad p_j).

    w_l is the mean over rows and channels of the share that the deepest `Selective` exit takes from
    layer l, without gradient, times the number of layers, so that their mean is 1. Without such
    exits every weight is 1. The optimizer is Adam.

    Args:
        beta: the weight of the matching.
        epochs: over the training rows.
        rate: at the start. It falls to 0 along a cosine.
        backbone: whether the models learn too. False trains the exits alone, on pooled features if
            all exits pool.
    """

    def __init__(
        self, *, beta: float = 1.0, epochs: int = 10, rate: float = 1e-3, backbone: bool = True
    ) -> None:
        self.beta = beta
        self.epochs = epochs
        self.rate = rate
        self.backbone = backbone

    def prepare(self, network: Network) -> None:
        """Raise InvalidArgument for a negative beta, BadNetwork where there is nothing to train."""
        trainable_exits(network)
        require("beta", self.beta, low=0)

    def phases(self, network: Network) -> list[Phase]:
        """One phase."""
        adam = partial(torch.optim.Adam, lr=self.rate)
        if self.backbone:
            return [Phase("all", parameters_of(network), self.epochs, adam, cosine)]
        reads = reading(network, network.topology.exits)
        return [
            Phase(
                "exits", tuple(network.exits.parameters()), self.epochs, adam, cosine, reads=reads
            )
        ]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of each exit. A pair counts for its student, the exit that matches the other."""
        weights = layer_weights(outputs)
        losses = dict[str, Tensor]()
        for name, logits in outputs.logits.items():
            losses[name] = weights.get(name, 1.0) * cross_entropy(logits, batch.labels())
        if not self.beta:
            return losses
        pairs = list(permutations(outputs.logits, 2))
        for student, teacher in pairs:
            target = outputs.logits[teacher].detach()
            matching = soft_cross_entropy(outputs.logits[student], target, 1.0)
            losses[student] = losses[student] + self.beta / len(pairs) * matching
        return losses


def layer_weights(outputs: TrainingOutputs) -> dict[str, float | Tensor]:
    """The weights of `Selective` exits, by name; their mean is 1.

    A weight is the share that the deepest of these exits takes from the exit's layer.

    Args:
        outputs: features of a batch, and the network.

    Raises:
        BadNetwork: a selective exit reads an exit of another kind.
    """
    network = outputs.network
    exits = dict[str, Selective]()
    for name in outputs.logits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, Selective):
            exits[name] = exit_
    if not exits:
        return {}
    handed = dict[str, Tensor]()
    with torch.no_grad():
        # Each exit hands its layers on; the shares of the last one remain.
        for name, exit_ in exits.items():
            if not set(exit_.reads) <= handed.keys():
                raise BadNetwork(
                    f"exit {name!r} must be a selective exit, got one that reads "
                    f"{exit_.reads}. Cut with exits='selective'"
                )
            handed[name] = exit_.layers(Seen(outputs.features[name], handed))
            shares = exit_.shares(handed[name])
        weights = shares.mean((0, 2)) * len(exits)  # [b, m, channels] -> [m]
        return dict(zip(exits, weights, strict=True))
