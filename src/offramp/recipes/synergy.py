"""All exits at once, each also matching the answers of all others, weighed by what layer selective
attention chose.

After LSANet (Jiang et al., 2022, arXiv 2209.13844): its abstract names adaptive weights of the
auxiliary losses by attention over layers, and pairwise matching of predictions among all branches
("knowledge synergy"); formulas and numbers we found none. The matching is that of DKS (Sun, Yao,
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

    w_l: the mean over rows and channels of the share that the deepest `Selective` exit takes from
    layer l, without gradient, times the number of layers, so that their mean is 1; without such
    exits every weight is 1. Adam, whose rate falls to 0 along a cosine. backbone=False trains the
    exits alone, on pooled features if all pool.
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
        """By exit; a pair counts for the one that is pulled towards the other."""
        weights = layer_weights(outputs)
        pairs = [*permutations(outputs.logits, 2)]
        found = {}
        for name, logits in outputs.logits.items():
            found[name] = weights.get(name, 1.0) * cross_entropy(logits, batch.labels())
        for one, other in pairs if self.beta else ():
            pull = soft_cross_entropy(outputs.logits[one], outputs.logits[other].detach(), 1.0)
            found[one] = found[one] + self.beta / len(pairs) * pull
        return found


def layer_weights(outputs: TrainingOutputs) -> dict[str, float | Tensor]:
    """By name of a `Selective` exit, how much the deepest of them takes from its layer; their mean
    is 1.
    """
    network = outputs.network
    handed = dict[str, Tensor]()
    exits = {name: network.exit_of(name) for name in outputs.logits}
    names = [name for name, exit_ in exits.items() if isinstance(exit_, Selective)]
    if not names:
        return {}
    with torch.no_grad():
        for name in names:
            exit_ = exits[name]
            assert isinstance(exit_, Selective)
            if not set(exit_.reads) <= handed.keys():
                raise BadNetwork(
                    f"exit {name!r} must be a selective exit, got one that reads "
                    f"{exit_.reads}. Cut with exits='selective'"
                )
            handed[name] = exit_.layers(Seen(outputs.features[name], handed))
            shares = exit_.shares(handed[name])
        return dict(zip(names, shares.mean((0, 2)) * len(names), strict=True))
