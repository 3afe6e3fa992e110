"""Segments and exits trained along random ways: for gates that need no training, and as a control.

At a fork every row takes a way at random; at an exit it goes on. Every exit gets the cross-entropy
of the rows that pass it. All paths learn equally, as in the warm-up of `d2nn` and `gumbel`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Gate, Seen
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.networks.walking import routed
from offramp.plans.topology import LEAVE
from offramp.recipes._routing import models_of, one_hot, require_uncut
from offramp.recipes._schedules import cosine

__all__ = ["RandomWays"]


class RandomWays(Recipe):
    """Cross-entropies along random ways.

    Args:
        epochs: over the training rows.
        rate: of Adam.
        models: False trains the exits alone.
        norm: "moving" or "frozen" batch norms of the models.
    """

    forks = True

    def __init__(
        self, *, epochs: int = 10, rate: float = 1e-3, models: bool = True, norm: str = "moving"
    ) -> None:
        self.epochs = epochs
        self.rate = rate
        self.models = models
        self.norm = norm

    def prepare(self, network: Network) -> None:
        """Check the network.

        Args:
            network: of whole models.

        Raises:
            InvalidArgument: norm is neither "moving" nor "frozen".
            BadNetwork: a member of the network is cut, or there is nothing to train.
        """
        if self.norm not in ("moving", "frozen"):
            raise InvalidArgument(f"norm must be one of moving, frozen, got {self.norm!r}")
        require_uncut(network, "random_ways")
        if not self._trained(network):
            raise BadNetwork("This network has no parameters to train")

    def _trained(self, network: Network) -> tuple[torch.nn.Parameter, ...]:
        """The parameters that are trained: those of the exits, and of the models if asked for."""
        exits = tuple(network.exits.parameters())
        if not self.models:
            return exits
        models, _ = models_of(network, self.norm)
        return (*models, *exits)

    def phases(self, network: Network) -> list[Phase]:
        """One phase."""
        _, still = models_of(network, self.norm)
        adam = partial(torch.optim.Adam, lr=self.rate)
        return [
            Phase(
                "random ways",
                self._trained(network),
                self.epochs,
                adam,
                cosine,
                still=still,
                looks=False,
            )
        ]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """By exit, over the rows that passed it."""
        topology = outputs.network.topology

        def decide(name: str, gate: Gate, seen: Seen) -> Tensor:
            # Draw among the successors that go on: no row leaves in training.
            successors = topology.node(name).successors
            device = seen.features.device
            going = list[int]()
            for index, successor in enumerate(successors):
                if successor != LEAVE:
                    going.append(index)
            drawn = torch.randint(len(going), (len(seen.features),), device=device)  # [b]
            ways = torch.as_tensor(going, device=device)[drawn]  # [b]
            return one_hot(ways, len(successors))  # [b, successors]

        done = routed(outputs.network, outputs.inputs, decide)
        y = batch.labels()
        losses: dict[str, Tensor] = {}
        for name, (rows, logits) in done.passed.items():
            if len(rows):  # weighted by the share of rows that pass this exit
                losses[name] = cross_entropy(logits, y[rows]) * (len(rows) / len(y))
        return losses
