"""Segments and exits trained along random ways: for gates that need no training, and as a control.

At a fork every row takes a way at random; at an exit it goes on. Every exit that a row passes has
its cross-entropy. So all paths learn equally, as in the warm-up that `d2nn` and `gumbel` have.
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
from offramp.recipes._routing import models_of, one_hot
from offramp.recipes._schedules import cosine

__all__ = ["RandomWays"]


class RandomWays(Recipe):
    """Cross-entropies along random ways.

    Args:
        epochs: of all of it.
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
        """Raise InvalidArgument for another norm, BadNetwork for a network that is cut, or has
        nothing to train.
        """
        if self.norm not in ("moving", "frozen"):
            raise InvalidArgument(f"norm must be one of moving, frozen, got {self.norm!r}")
        cut_members = [member.name for member in network.members if member.cuts]
        if cut_members:
            raise BadNetwork(
                f"random_ways trains networks of whole models (off.route), and {cut_members[0]!r} "
                f"is cut"
            )
        if not self._trained(network):
            raise BadNetwork("this network has no parameters to train")

    def _trained(self, network: Network) -> tuple[torch.nn.Parameter, ...]:
        models, _ = models_of(network, self.norm)
        return (*(models if self.models else ()), *network.exits.parameters())

    def phases(self, network: Network) -> list[Phase]:
        """One."""
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
            successors = topology.node(name).successors
            going = [number for number, successor in enumerate(successors) if successor != LEAVE]
            drawn = torch.randint(len(going), (len(seen.features),), device=seen.features.device)
            ways = torch.as_tensor(going, device=seen.features.device)[drawn]
            return one_hot(ways, len(successors))

        done = routed(outputs.network, outputs.inputs, decide)
        y = batch.labels()
        losses: dict[str, Tensor] = {}
        for name, (rows, logits) in done.passed.items():
            if len(rows):
                losses[name] = cross_entropy(logits, y[rows]) * (len(rows) / len(y))
        return losses
