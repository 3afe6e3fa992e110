"""Forks trained by reward. D2NN-style: the paper's formulas are not public.

Liu and Deng, 2018, arXiv 1701.00299, describe control nodes that are trained by reinforcement
learning together with the modules that they choose among, and rewards of small sets of rows
(mini-bags), such as an F-score. They do not give the reward, the loss, the exploration and the
sizes. Ours are

    r = lambda A + (1 - lambda) E,   E = 1 - MACs that ran / MACs of the dearest path,
    loss of a gate = (Q(z)[a] - r)^2,

where A is 1 for a right output, or the F-score of the row's mini-bag. In each batch one gate
explores (epsilon-greedy, drawn anew), the others take their best way, and only the explorer is
trained. In a mini-bag the mean of the chosen Q predicts the reward of the bag. Segments and exits
learn by the cross-entropy of the output along the path taken. Before that they are trained along
random ways, so that no fork prefers the arm that happens to learn first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.errors import InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Chooser, Gate, Seen
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.networks.walking import Routed, routed
from offramp.recipes._routing import (
    PRICES,
    PathPrices,
    answer_losses,
    best_way,
    one_hot,
    prices_of,
    random_then_chosen,
    require_between,
    require_choosers,
)

__all__ = ["D2nn"]

RANDOM = "random ways"
REWARD = "reward"
AIMS = ("accuracy", "f_score")


class D2nn(Recipe):
    """Q-learning of one step for the gates, cross-entropy for the rest.

    Args:
        weight: lambda, of A against the cost.
        warm: epochs along random ways, without gates.
        epochs: with gates.
        first_epsilon: how often the explorer takes a random way at first.
        epsilon: the same from the middle of the phase on.
        rate: of Adam, for segments and exits.
        gate_rate: of Adam, for the gates.
        aim: the reward A: "accuracy" of each row, or "f_score" of mini-bags.
        bag: rows of a mini-bag.
        positive: the class of the F-score.
        models: False trains gates and exits alone.
        norm: "moving" or "frozen" batch norms of the models.
    """

    forks = True

    def __init__(
        self,
        *,
        weight: float = 0.9,
        warm: int = 5,
        epochs: int = 10,
        first_epsilon: float = 1.0,
        epsilon: float = 0.1,
        rate: float = 1e-3,
        gate_rate: float = 1e-3,
        aim: str = "accuracy",
        bag: int = 16,
        positive: int = 1,
        models: bool = True,
        norm: str = "moving",
    ) -> None:
        self.weight = weight
        self.warm = warm
        self.epochs = epochs
        self.first_epsilon = first_epsilon
        self.epsilon = epsilon
        self.rate = rate
        self.gate_rate = gate_rate
        self.aim = aim
        self.bag = bag
        self.positive = positive
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
        require_between("weight", self.weight, 0, 1)
        for name, value in (("first_epsilon", self.first_epsilon), ("epsilon", self.epsilon)):
            if not 0 <= value <= 1:
                raise InvalidArgument(f"{name} must be between 0 and 1, got {value!r}")
        if self.aim not in AIMS:
            raise InvalidArgument(f"aim must be one of {', '.join(AIMS)}, got {self.aim!r}")
        if self.bag < 1:
            raise InvalidArgument(f"bag must be at least 1 row, got {self.bag!r}")
        if self.warm < 0:
            raise InvalidArgument(f"warm must be at least 0 epochs, got {self.warm!r}")
        if self.norm not in ("moving", "frozen"):
            raise InvalidArgument(f"norm must be one of moving, frozen, got {self.norm!r}")
        require_choosers(network, "d2nn")
        network.auxiliary = {PRICES: prices_of(network).to(network.device())}

    def phases(self, network: Network) -> list[Phase]:
        """Random ways, then the ways that the gates choose."""
        return random_then_chosen(
            network,
            names=(RANDOM, REWARD),
            epochs=(self.warm, self.epochs),
            rates=(self.rate, self.gate_rate),
            models=self.models,
            norm=self.norm,
        )

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy along the path taken, and the squared error of the explorer's Q."""
        network = outputs.network
        explorer = ""
        if batch.phase != RANDOM:
            explorer = self._explorer(network)
        share = self._epsilon(batch.done)
        values: dict[str, Tensor] = {}  # Q(z)[a] of the explorer

        def decide(name: str, gate: Gate, seen: Seen) -> Tensor:
            count = len(network.topology.node(name).successors)
            rows = len(seen.features)
            at_random = torch.randint(count, (rows,), device=seen.features.device)  # [n]
            if batch.phase == RANDOM:
                return one_hot(at_random, count)
            ways = best_way(gate, seen, count)
            if name == explorer and isinstance(gate, Chooser):
                explores = torch.rand(rows, device=ways.device) < share
                ways = torch.where(explores, at_random, ways)
                ratings = gate.ratings(seen)  # [n, count]
                values[name] = ratings.gather(1, ways[:, None])[:, 0]  # [n]
            return one_hot(ways, count)

        done = routed(network, outputs.inputs, decide)
        y = batch.labels()
        losses = answer_losses(network, done, y)
        if explorer:
            # No row may have arrived at the explorer; then it has nothing to learn.
            chosen = values.get(explorer)
            reward = self._reward(network, done, y)  # [b]
            here = done.arrived.get(explorer)  # [n], rows of the batch
            if chosen is not None and here is not None:
                losses["reward"] = self._error(chosen, reward, here)
        return losses

    def _explorer(self, network: Network) -> str:
        """The gate whose turn it is, drawn anew for every batch."""
        choosers = list[str]()
        for name in network.topology.gates:
            if isinstance(network.gate_of(name), Chooser):
                choosers.append(name)
        return choosers[int(torch.randint(len(choosers), ()))]

    def _epsilon(self, done: float) -> float:
        """How often the explorer takes a random way. It falls along a line over the first half."""
        fallen = min(1.0, 2 * done)
        return self.first_epsilon + (self.epsilon - self.first_epsilon) * fallen

    def _reward(self, network: Network, done: Routed, y: Tensor) -> Tensor:
        """The reward [b] of every row, or of the row's mini-bag."""
        prices = network.auxiliary[PRICES]
        assert isinstance(prices, PathPrices)
        with torch.no_grad():
            cost = prices.of(network.topology, done.choices, len(y)) / prices.most  # [b]
            saved = 1 - cost
            predicted = done.logits.argmax(1)  # [b]
            if self.aim == "accuracy":
                return self.weight * (predicted == y).float() + (1 - self.weight) * saved
            # A bag is `self.bag` rows of the batch in their order.
            rewards = torch.empty_like(saved)
            for start in range(0, len(y), self.bag):
                bag = slice(start, start + self.bag)
                score = f_score(predicted[bag], y[bag], self.positive)
                rewards[bag] = self.weight * score + (1 - self.weight) * saved[bag].mean()
            return rewards

    def _error(self, chosen: Tensor, reward: Tensor, here: Tensor) -> Tensor:
        """The mean of (Q - r)^2 over the rows that arrived, or over their mini-bags.

        `chosen` [n] is Q(z)[a] of the n rows that arrived, `reward` [b] that of all rows, `here`
        [n] selects the rows that arrived. In a mini-bag, the mean of Q over the bag counts.
        """
        if self.aim == "accuracy":
            return (chosen - reward[here]).square().mean()
        bags = torch.arange(len(reward), device=reward.device)[here] // self.bag  # [n]
        errors = list[Tensor]()
        for bag in sorted(set(bags.tolist())):
            in_bag = bags == bag
            errors.append((chosen[in_bag].mean() - reward[here][in_bag].mean()).square())
        return torch.stack(errors).mean()


def f_score(answers: Tensor, y: Tensor, positive: int) -> Tensor:
    """The F1-score of one class in a bag: 1 if the class is neither present nor predicted.

    >>> f_score(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]), 1)
    tensor(0.5000)
    """
    is_predicted = answers == positive
    is_true = y == positive
    hits = (is_predicted & is_true).sum().float()
    misses = (is_predicted != is_true).sum().float()  # false positives and false negatives
    if not hits and not misses:
        return torch.ones((), device=y.device)
    return 2 * hits / (2 * hits + misses)
