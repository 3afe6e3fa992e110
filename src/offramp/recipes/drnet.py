"""One model at several resolutions, and the predictor that chooses (DRNet; Zhu et al., 2021, arXiv
2106.02898).

First the model alone learns, by the sum of the losses of all resolutions, each with batch norms of
its own. Then the predictor learns too, by straight-through Gumbel choices and a hinge on the mean
cost,

    L = CE + eta * max(0, (mean(F) - alpha) / (C_max - C_min)).

Within a batch, the rows of each choice pass their own arm, so that batch norms see only these rows.
The optimizer is SGD with momentum 0.9 and weight decay 1e-4. In the paper the predictor learns at a
tenth of the model's rate, from scratch and over 100 epochs; here it learns faster, and the trained
model slower. The paper does not give the temperature; 1 is our choice. The authors' public code
only evaluates, runs all resolutions and keeps the noise; none of that is copied. Where we differ:
rates fall along a cosine, and epochs are fewer by default, for trained models. With `gate_epochs`,
the predictor first learns alone which resolution each row needs; the paper has no such phase.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Chooser, Gate, Seen
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.networks.walking import Nodes, every_path, routed, with_defaults
from offramp.plans.topology import Topology
from offramp.recipes._routing import (
    PRICES,
    PathPrices,
    gumbel,
    models_of,
    prices_of,
    rate_groups,
    require_between,
    require_choosers,
)
from offramp.recipes._schedules import cosine
from offramp.recipes._together import soft_cross_entropy

__all__ = ["Drnet"]

FIRST = "resolutions"
GATE = "gate"
SECOND = "choices"
MOST = 1e9  # the largest eta, and the most epochs of the first phase
SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-4, nesterov=True)
TEMPERATURE = 4.0  # at which small arms imitate the largest one


class Drnet(Recipe):
    """Every arm on every row, then rows on the arms that the gate chooses.

    Args:
        budget: alpha, the mean cost above which the loss grows, as a share of the largest
            resolution's MACs.
        eta: the weight of that part of the loss.
        first: epochs of all arms together. Use 0 if they are trained already.
        gate_epochs: epochs of the gate alone, between the two phases of the paper. It learns the
            cheapest arm that answers a row right, or the cheapest of all if none does. In few
            epochs, a gate learns little from straight-through choices. Use rows that did not
            train the model: it answers nearly all of its training rows right. 0 in the paper.
        epochs: with the gate. 0 leaves the second phase out.
        rate: of SGD for the model, in the first phase.
        second_rate: the same with the gate.
        gate_rate: of the gate.
        tau: the temperature of the backward softmax.
        keep: the share of each arm's loss in the first phase that comes from the largest arm's
            outputs instead of the label (Hinton et al., 2015, arXiv 1503.02531, at a temperature of
            4). 0 in the paper.
        norm: "moving" or "frozen" batch norms in the second phase. If a batch has few rows of a
            choice, moving statistics come from a handful of rows, and an arm that is rarely chosen
            loses its accuracy. "frozen" keeps the statistics of the first phase. The paper does not
            mention this; it trains from scratch, in larger batches.
    """

    forks = True

    def __init__(
        self,
        *,
        budget: float = 0.6,
        eta: float = 0.2,
        first: int = 5,
        gate_epochs: int = 0,
        epochs: int = 5,
        rate: float = 0.01,
        second_rate: float = 0.001,
        gate_rate: float = 0.01,
        tau: float = 1.0,
        keep: float = 0.0,
        norm: str = "moving",
    ) -> None:
        self.budget = budget
        self.eta = eta
        self.first = first
        self.gate_epochs = gate_epochs
        self.epochs = epochs
        self.rate = rate
        self.second_rate = second_rate
        self.gate_rate = gate_rate
        self.tau = tau
        self.keep = keep
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
        if not 0 <= self.eta <= MOST:
            raise InvalidArgument(f"eta must be at least 0, got {self.eta!r}")
        for name, epochs in (
            ("first", self.first),
            ("gate_epochs", self.gate_epochs),
            ("epochs", self.epochs),
        ):
            if not 0 <= epochs <= MOST:
                raise InvalidArgument(f"{name} must be at least 0, got {epochs!r}")
        if not 0 <= self.keep <= 1:
            raise InvalidArgument(f"keep must be at least 0 and at most 1, got {self.keep!r}")
        if self.norm not in ("moving", "frozen"):
            raise InvalidArgument(f"norm must be one of moving, frozen, got {self.norm!r}")
        if self.first + self.gate_epochs + self.epochs == 0:
            raise InvalidArgument(
                "one of first, gate_epochs and epochs must be above 0, got 0 epochs in all"
            )
        require_choosers(network, "drnet")
        if self.gate_epochs:
            require_one_fork(network.topology)
        network.auxiliary = {PRICES: prices_of(network).to(network.device())}

    def phases(self, network: Network) -> list[Phase]:
        """All arms, then the gate alone, then choices."""
        exits = tuple(network.exits.parameters())
        gates = tuple(network.gates.parameters())
        phases = list[Phase]()

        # All arms: batch norms learn here in any case.
        if self.first:
            models, _ = models_of(network, "moving")
            sgd = partial(SGD, lr=self.rate)
            phases.append(Phase(FIRST, (*models, *exits), self.first, sgd, cosine, looks=False))

        # The gate alone.
        if self.gate_epochs:
            sgd = partial(SGD, lr=self.gate_rate)
            phases.append(Phase(GATE, gates, self.gate_epochs, sgd, cosine, looks=False))

        # Choices.
        if not self.epochs:
            return phases
        both = partial(two_rates, gates=gates, rate=self.second_rate, gate_rate=self.gate_rate)
        models, still = models_of(network, self.norm)
        parameters = (*models, *exits, *gates)
        phases.append(
            Phase(SECOND, parameters, self.epochs, both, cosine, still=still, looks=False)
        )
        return phases

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of each arm, or of the final outputs and of their cost."""
        if batch.phase == FIRST:
            return self._arm_losses(outputs, batch)
        if batch.phase == GATE:
            return self._gate_loss(outputs, batch)
        return self._choice_losses(outputs, batch)

    def _arm_losses(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of each arm, with every row on every arm."""
        logits: dict[str, Tensor] = {}
        for label, node, seen in every_path(outputs.network, outputs.inputs):
            if node.has_exit and seen.own is not None:
                logits[label] = seen.own
        reference = outputs.network.topology.exit_labels[-1]
        losses: dict[str, Tensor] = {}
        for label, arm in logits.items():
            loss = cross_entropy(arm, batch.labels())
            if self.keep and label != reference:
                teacher = logits[reference].detach()  # [b, C]
                # T^2 keeps the size of the gradient, which falls with 1 / T^2.
                soft = soft_cross_entropy(arm, teacher, TEMPERATURE) * TEMPERATURE**2
                loss = (1 - self.keep) * loss + self.keep * soft
            losses[label] = loss
        return losses

    def _gate_loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy of the gate with the cheapest arm that answers each row right."""
        network = outputs.network
        topology = network.topology
        nodes = Nodes(network)
        fork = topology.node(topology.names[0])
        state = with_defaults(topology, outputs.inputs)
        nodes.run(fork, state)
        gate = network.gate_of(fork.name)
        assert isinstance(gate, Chooser)
        ratings = gate.ratings(nodes.seen(fork, fork.gate_reads, state))  # [b, K]
        y = batch.labels()
        # Arms are tried from cheap to dear. A row that an arm answers right needs no dearer one.
        needed = torch.zeros_like(y)
        rows = torch.arange(len(y), device=y.device)
        with torch.no_grad():
            for way, name in enumerate(fork.successors):
                arm = topology.node(name)
                tensors = {key: value[rows] for key, value in state.items()}
                nodes.run(arm, tensors)
                seen = nodes.seen(arm, arm.gate_reads, tensors)
                assert seen.own is not None
                right = seen.own.argmax(1) == y[rows]
                needed[rows[right]] = way
                rows = rows[~right]
                if not len(rows):
                    break
        return {"needed": cross_entropy(ratings, needed)}

    def _choice_losses(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of the final outputs and of their cost, with each row on the arm it chooses."""
        network = outputs.network

        def decide(name: str, gate: Gate, seen: Seen) -> Tensor:
            assert isinstance(gate, Chooser)
            return gumbel(gate.ratings(seen), self.tau)

        done = routed(network, outputs.inputs, decide)
        prices = network.auxiliary[PRICES]
        assert isinstance(prices, PathPrices)
        cost = prices.of(network.topology, done.choices, len(done.logits))
        return {
            "answers": cross_entropy(done.logits, batch.labels()),
            "cost": self.eta * prices.over(cost, self.budget),
        }


def require_one_fork(topology: Topology) -> None:
    """Raise BadNetwork unless the network begins with its one fork, and all arms answer."""
    gates = topology.gates
    arms = topology.node(topology.names[0]).successors
    if gates != topology.names[:1] or not set(arms) <= set(topology.exits):
        raise BadNetwork(
            "gate_epochs trains the one gate at the entrance of a network whose arms all answer, "
            f"as off.resolutions makes it, got gates at {', '.join(gates)}"
        )


def two_rates(
    parameters: Iterable[nn.Parameter],
    *,
    gates: tuple[nn.Parameter, ...],
    rate: float,
    gate_rate: float,
) -> Optimizer:
    """SGD with a separate learning rate for the gates."""
    groups = rate_groups(parameters, gates=gates, rate=rate, gate_rate=gate_rate)
    return SGD(groups, lr=rate)
