"""Shallow-Deep Networks: internal classifiers on a frozen backbone, or trained with it from
scratch.

Kaya, Hong and Dumitras, 2019, arXiv 1810.07052; hyper-parameters as in the authors' code. Their
classifier is the exit `sdn`, their score the gate `max_prob`; other exits and gates work too. Where
we differ: frozen parts stay in eval mode (in their code `train()` moved batch norms all the same),
and features are pooled once if all exits pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.surest import Surest
from offramp.exits.whole import Own
from offramp.networks.network import Network
from offramp.networks.nodes import Hands
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    reading,
    trainable_exits,
)
from offramp.recipes._schedules import dropped
from offramp.recipes._together import exit_parameters

__all__ = ["Sdn"]

FLOOR = 0.01  # of a weight, before the first epoch
DEEPEST = 0.9  # the weight at which the deepest internal classifier ends


class Sdn(Recipe):
    """The sum of the exits' cross-entropies, on a frozen backbone; or, with backbone=True, of all,
    growing weights.

    backbone=False ("IC-only"): Adam, 25 epochs, the rate 1e-3 falls tenfold after 15.
    backbone=True: SGD, 100 epochs, the rate 0.1 falls tenfold after 35, 60 and 85. The last exit
    has weight 1. Exit i in epoch e of E has weight min(C_i, 0.01 + e C_i / E), with e counted from
    1 as in the authors' code.

    Args:
        weights: the C_i, shallow to deep. The default is 0.9 i / K for K exits. For the paper's six
            exits at 15 to 90 % of the work these are its .15 to .90; for other numbers of exits the
            choice is ours.
        backbone: whether the model is trained too.
        epochs: instead of those above. The rate then falls at the same shares of the epochs.
        rate: instead of the one above.
        decay: weight decay, in the paper 5e-4 for VGG.
        surest: whether the model's end follows the paper's rule for rows that no exit was sure of
            (exit `Surest`).
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        *,
        backbone: bool = False,
        epochs: int | None = None,
        rate: float | None = None,
        decay: float = 1e-4,
        surest: bool = False,
    ) -> None:
        self.weights = weights
        self.backbone = backbone
        self.epochs = epochs
        self.rate = rate
        self.decay = decay
        self.surest = surest

    def prepare(self, network: Network) -> None:
        """Check the network, and put the exit `Surest` at its end if asked for.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: the weights do not fit the exits.
            BadNetwork: there is nothing to train, or surest=True does not fit the exits.
        """
        trainable_exits(network)
        self.weights_of(network)
        last = network.topology.exits[-1]
        if not self.surest or isinstance(network.exit_of(last), Surest):
            return
        # `Surest` compares plain logits, so no exit may hand anything else to later ones.
        unfit = list[str]()
        for name in network.topology.exits:
            if isinstance(network.exit_of(name), Hands):
                unfit.append(name)
        if not isinstance(network.exit_of(last), Own):
            unfit.append(last)
        if unfit:
            raise BadNetwork(
                "surest=True needs plain classifiers as exits, and the model's own output at "
                f"the end, but exit {unfit[0]!r} is something else. Leave out surest=True, or cut "
                "with exits='sdn'"
            )
        network.hang_exit(last, Surest(network.topology.exits[:-1]).eval())

    def weights_of(self, network: Network) -> dict[str, float]:
        """The C_i by exit, without the last.

        Args:
            network: with exits.

        Returns:
            The weights by name, from shallow to deep.

        Raises:
            InvalidArgument: there are too few or too many weights, or one is negative.
        """
        names = network.topology.exits[:-1]
        weights: Sequence[float]
        if self.weights is None:
            weights = [DEEPEST * number / len(names) for number in range(1, len(names) + 1)]
        else:
            weights = self.weights
        if len(weights) != len(names) or min(weights) < 0:
            raise InvalidArgument(
                f"weights must be a number of at least 0 for each of {', '.join(names)}, got "
                f"{weights!r}"
            )
        return dict(zip(names, map(float, weights), strict=True))

    def phases(self, network: Network) -> list[Phase]:
        """One phase."""
        names = trainable_exits(network)
        exits = exit_parameters(network, names)
        if not self.backbone:
            adam = partial(torch.optim.Adam, lr=self.rate or 1e-3, weight_decay=self.decay)
            reads = reading(network, names)
            return [Phase("exits", exits, self.epochs or 25, adam, dropped(15 / 25), reads)]
        sgd = partial(torch.optim.SGD, lr=self.rate or 0.1, momentum=0.9, weight_decay=self.decay)
        every = (*network.backbone.parameters(), *exits)
        return [Phase("all", every, self.epochs or 100, sgd, dropped(0.35, 0.6, 0.85))]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy by exit, weighted where the backbone learns too."""
        y = batch.labels()
        last = outputs.network.topology.exits[-1]
        losses = dict[str, Tensor]()
        if not self.backbone:
            for name in trainable_exits(outputs.network):
                losses[name] = cross_entropy(outputs.logits[name], y)
            return losses
        epochs = self.epochs or 100
        epoch = batch.step * epochs // batch.steps + 1  # counted from 1
        for name, weight in self.weights_of(outputs.network).items():
            losses[name] = ramp(weight, epoch, epochs) * cross_entropy(outputs.logits[name], y)
        if isinstance(outputs.network.exit_of(last), Surest):
            # The exit's logits may be those of an earlier exit. The model's own are its input.
            own_logits = outputs.features[last]
        else:
            own_logits = outputs.logits[last]
        losses[last] = cross_entropy(own_logits, y)
        return losses


def ramp(weight: float, epoch: int, epochs: int) -> float:
    """The weight of an exit in an epoch: tau_i(e) = min(C_i, 0.01 + e C_i / E)."""
    return min(weight, FLOOR + epoch * weight / epochs)
