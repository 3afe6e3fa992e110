"""PABEE's training: all exits with the model, deeper ones weighing more.

Zhou, Xu, Ge, McAuley, Xu and Wei, 2020, arXiv 2006.04152. Its rule for leaving is the gate
`patience`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp._support.arguments import require
from offramp.errors import BadNetwork
from offramp.networks.network import Network
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    reading,
    trainable_exits,
)
from offramp.recipes._schedules import linear

__all__ = ["PatienceRecipe"]


class PatienceRecipe(Recipe):
    """The mean of the exits' cross-entropies with weights 1, 2, ... n from shallow to deep: sum_j j
    L_j / sum_j j.

    The model learns with them. All numbers are those of the authors' scripts for BERT and ALBERT,
    which start from pretrained weights: AdamW without weight decay, a rate that falls to 0 along a
    line, and gradients whose norm is at most 1. A model that is trained from scratch needs more
    epochs and a higher rate. Where we differ: torch's AdamW adds its 1e-8 after it corrects the
    second moment, theirs before, which matters only for gradients of that size. The paper's rule
    for regression is not supported.

    Args:
        epochs: over the training rows.
        rate: of AdamW at the start.
        backbone: whether the model learns. False leaves it as it is and trains the exits alone, on
            pooled features if all of them pool. That choice is ours, and needs a rate of about
            1e-3.
        clip: the largest norm of all gradients together; None does not clip.
    """

    def __init__(
        self,
        *,
        epochs: int = 5,
        rate: float = 2e-5,
        backbone: bool = True,
        clip: float | None = 1.0,
    ) -> None:
        self.epochs = epochs
        self.rate = rate
        self.backbone = backbone
        self.clip = clip

    def prepare(self, network: Network) -> None:
        """Check the network and the arguments.

        Args:
            network: with exits.

        Raises:
            BadNetwork: there are no exits to train, or no model to train with backbone=True.
            InvalidArgument: clip is not above 0.
        """
        trainable_exits(network)
        if self.clip is not None:
            require("clip", self.clip, above=0, hint="None means no clipping.")
        if self.backbone and next(network.backbone.parameters(), None) is None:
            raise BadNetwork(
                "This network's models have no parameters. Train the exits alone: backbone=False"
            )

    def phases(self, network: Network) -> list[Phase]:
        """One phase."""
        names = trainable_exits(network)
        trained = tuple(network.exits.parameters())
        reads = reading(network, names)
        if self.backbone:
            trained = (*network.backbone.parameters(), *trained)
            reads = "input"
        adam = partial(torch.optim.AdamW, lr=self.rate, weight_decay=0.0)
        return [Phase("all", trained, self.epochs, adam, linear, reads=reads, clip=self.clip)]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy by exit, weighted by its depth."""
        y = batch.labels()
        weights = depth_weights(len(outputs.logits))
        losses = dict[str, Tensor]()
        for name, weight in zip(outputs.logits, weights, strict=True):
            losses[name] = weight * cross_entropy(outputs.logits[name], y)
        return losses


def depth_weights(exits: int) -> list[float]:
    """The weights j / (1 + ... + n) of n exits, for j = 1 to n.

    >>> depth_weights(3)
    [0.16666666666666666, 0.3333333333333333, 0.5]
    """
    total = exits * (exits + 1) / 2
    return [number / total for number in range(1, exits + 1)]
