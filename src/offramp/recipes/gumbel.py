"""Forks and exits trained by gradients: straight-through Gumbel choices, and the mean cost in the
loss.

L = CE(y, label) + eta * max(0, (mean cost - budget) / (C_max - C_min)), as in DRNet (Zhu et al.,
2021, arXiv 2106.02898), for any network with forks. Each gate draws one way for each row,
onehot(argmax(log p + g)), and gets the gradient of softmax((log p + g) / tau). Leaving at an exit
is a way like any other, so it is part of the objective. Gates that do not rate their ways (for
example a margin) send every row to the last way during training, and their exit has its own
cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Chooser, Gate, Seen
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.networks.walking import routed
from offramp.recipes._routing import (
    PRICES,
    PathPrices,
    answer_losses,
    best_way,
    gumbel,
    one_hot,
    prices_of,
    random_then_chosen,
    require_between,
    require_choosers,
)

__all__ = ["Gumbel"]

NORMS = ("moving", "frozen")


class Gumbel(Recipe):
    """Models, exits and gates together, each row on one path.

    Args:
        budget: the mean cost of a row up to which the loss does not grow, as a share of the plain
            network's MACs.
        eta: the weight of the cost above the budget.
        epochs: with gates.
        warm: epochs before those, in which gates are not trained and ways are random.
        rate: of Adam for models and exits.
        gate_rate: of Adam for gates.
        tau: the temperature of the backward softmax.
        mixed: run every arm on all rows, so that a gate learns from all of its ways. False runs
            every arm only on the rows that chose it. That is cheaper, and batch norms then see only
            these rows.
        models: False trains the gates and exits alone.
        norm: "moving" trains the models' batch norms and lets them follow the batches; "frozen"
            keeps them as they are.
    """

    forks = True

    def __init__(
        self,
        *,
        budget: float = 0.75,
        eta: float = 1.0,
        epochs: int = 10,
        warm: int = 0,
        rate: float = 1e-3,
        gate_rate: float = 1e-3,
        tau: float = 1.0,
        mixed: bool = True,
        models: bool = True,
        norm: str = "moving",
    ) -> None:
        self.budget = budget
        self.eta = eta
        self.epochs = epochs
        self.warm = warm
        self.rate = rate
        self.gate_rate = gate_rate
        self.tau = tau
        self.mixed = mixed
        self.models = models
        self.norm = norm

    def prepare(self, network: Network) -> None:
        """Check the arguments, and measure the costs of the paths.

        Args:
            network: of whole models, with gates that rate their ways.

        Raises:
            InvalidArgument: an argument is out of range.
            BadNetwork: there is no gate that rates its ways, or costs cannot be counted.
        """
        require_between("budget", self.budget, 0, 10)
        require_between("tau", self.tau, 0, float("inf"))
        if self.eta < 0:
            raise InvalidArgument(f"eta must be at least 0, got {self.eta!r}")
        if self.warm < 0:
            raise InvalidArgument(f"warm must be at least 0 epochs, got {self.warm!r}")
        if self.norm not in NORMS:
            raise InvalidArgument(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        require_choosers(network, "gumbel")
        network.auxiliary = {PRICES: prices_of(network).to(network.device())}

    def phases(self, network: Network) -> list[Phase]:
        """Random ways, if asked for, then the ways that the gates choose."""
        return random_then_chosen(
            network,
            names=("random ways", "gumbel"),
            epochs=(self.warm, self.epochs),
            rates=(self.rate, self.gate_rate),
            models=self.models,
            norm=self.norm,
        )

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy of the final outputs, and the cost above the budget."""
        network = outputs.network
        at_random = batch.phase == "random ways"

        def decide(name: str, gate: Gate, seen: Seen) -> Tensor:
            # Choices [b, count], one-hot
            count = len(network.topology.node(name).successors)
            if at_random:
                ways = torch.randint(count, (len(seen.features),), device=seen.features.device)
                return one_hot(ways, count)
            if not isinstance(gate, Chooser):
                return one_hot(best_way(gate, seen, count), count)
            return gumbel(gate.ratings(seen), self.tau)

        # Random choices have no gradient, so running all arms on all rows would gain nothing.
        done = routed(network, outputs.inputs, decide, mixed=self.mixed and not at_random)
        losses = answer_losses(network, done, batch.labels())
        if not at_random:
            prices = network.auxiliary[PRICES]
            assert isinstance(prices, PathPrices)
            cost = prices.of(network.topology, done.choices, len(done.logits))  # [b]
            losses["cost"] = self.eta * prices.over(cost, self.budget)
        return losses
