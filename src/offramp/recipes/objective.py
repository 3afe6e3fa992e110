"""JEI-DNN: exits and gates learned jointly, the exit being part of the objective.

Regol, Chataoui and Coates, 2024, arXiv 2310.09163. Shapes: b rows, E exits including the last one,
E - 1 gates. A frozen backbone has exits, each with the gate `uncertainty`. The exits learn on the
rows that the gates would send them. The gates learn to choose the best exit for a row, when the
cost of the exit counts too. Steps, weights and rates are those of the authors' code
(github.com/networkslab/dynn). Where we differ:
- The warm-up has no early stop, and no exit goes back to an earlier epoch's weights. Theirs does
  after two epochs without a better accuracy on held-out rows.
- The rows for which an exit is optimal are counted on the training rows of the epoch before; theirs
  are counted on held-out rows.
- Turns are shorter in epochs of fewer than 2 `every` batches. Otherwise one side would never have
  its turn there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offramp._support.arguments import require, require_count
from offramp.errors import BadNetwork, InvalidArgument
from offramp.gates.uncertainty import Uncertainty
from offramp.networks.network import Network, trial_rows
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    reading,
    trainable_exits,
)
from offramp.plans.pricing import Prices
from offramp.plans.schedule import full_schedule
from offramp.recipes._together import exit_parameters
from offramp.runtime.engine import kind_of
from offramp.runtime.measuring import costs_of

__all__ = ["Objective"]

WARM = "warm-up"
JOINT = "exits and gates"
PRICES = "prices"  # the name of the auxiliary module that is a `PriceList`
BALANCE = "balance"  # the name of the auxiliary module that is a `Balance`
FEWEST = 0.1  # the smallest count of rows that are optimal at an exit, so that none is 0
HEAVIEST = 5.0  # the largest weight of a gate's positive targets


class PriceList(nn.Module):
    """Costs c_l [E] of leaving at each exit, 1 at the last, on the network's device."""

    def __init__(self, costs: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("costs", torch.tensor(costs, dtype=torch.float32))


class Balance(nn.Module):
    """The weights [E - 1] of each gate's positive targets.

    They are 1 in the first epoch, and then follow from the counts of the epoch before. If c of n
    rows are optimal exactly at an exit (not at an earlier one), the weight is (n - c) / c, at most
    5.
    """

    weight: Tensor
    optimal: Tensor
    rows: Tensor

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(gates))
        self.register_buffer("optimal", torch.zeros(gates))
        self.register_buffer("rows", torch.zeros(()))

    def count(self, best: Tensor) -> None:
        """Count the best exits [b] of a batch."""
        counts = torch.bincount(best, minlength=len(self.optimal) + 1)  # [E]
        self.optimal += counts[:-1]
        self.rows += len(best)

    def end_epoch(self) -> None:
        """Set the weights from the counts, and reset the counts."""
        optimal = self.optimal.clamp(min=FEWEST)
        self.weight.copy_(((self.rows - optimal) / optimal).clamp(max=HEAVIEST))
        self.optimal.zero_()
        self.rows.zero_()


class Objective(Recipe):
    """Exits alone at first (`warm` epochs), then gates and exits in turn, `every` batches each, for
    `epochs` epochs.

    In the warm-up the loss is the sum of the exits' cross-entropies. The first of E exits has
    weight E, the next E - 1, and so on. The optimizer is SGD with momentum 0.9 throughout. The rate
    is constant in the warm-up. Then it falls after each epoch, along a cosine that would reach
    `least` after warm + epochs of them. Each epoch begins with the gates' turn.

    Args:
        price: lambda in the paper: the cost of the full network in nats of cross-entropy. Each
            price needs its own training. The plan still sets and certifies the threshold.
        costs: of leaving at each exit, shallow to deep or by name. They are divided by the last.
            None measures the MACs of the network's parts, including exits and gates.
        warm: epochs of the warm-up. The authors' has at most 6, and ends earlier if no exit gets
            better.
        epochs: after the warm-up. The authors' default is 10 in all, so 6 epochs of warm-up leave
            these 4; their README has 15.
        every: batches of a turn, at most half of an epoch's.
        rate: at the start.
        least: the rate at the end of the cosine.
        decay: weight decay.
        aim: the loss that counts besides cost in the choice of a row's best exit. One of the
            authors' three: "cross_entropy"; "zero_one", -1 if the exit is right; "probability",
            minus the probability of its prediction if that is right.
        detach_scale: whether the scale passes no gradient that brings a row's weighted losses back
            to their unweighted sum. In the authors' code it passes one: the scaled losses, and
            their gradients, then add up to the unweighted ones for any gates, so all exits learn
            all rows equally. True follows the paper's formulas: an exit learns most from the rows
            that leave there.
    """

    def __init__(
        self,
        price: float = 0.7,
        *,
        costs: Sequence[float] | Mapping[str, float] | None = None,
        warm: int = 6,
        epochs: int = 4,
        every: int = 200,
        rate: float = 1e-2,
        least: float = 2e-4,
        decay: float = 5e-4,
        aim: str = "cross_entropy",
        detach_scale: bool = False,
    ) -> None:
        self.price = price
        self.costs = costs
        self.warm = warm
        self.epochs = epochs
        self.every = every
        self.rate = rate
        self.least = least
        self.decay = decay
        self.aim = aim
        self.detach_scale = detach_scale

    def prepare(self, network: Network) -> None:
        """Check the arguments, and measure the costs of the exits.

        Args:
            network: with an `Uncertainty` gate at every exit but the last.

        Raises:
            InvalidArgument: an argument is out of range, or the costs do not fit the exits.
            BadNetwork: a gate is missing or of another kind, there is nothing to train, or the
                costs cannot be measured.
        """
        trainable_exits(network)
        if self.aim not in AIMS:
            raise InvalidArgument(f"aim must be one of {', '.join(AIMS)}, got {self.aim!r}")
        gates = network.topology.gates
        other = list[str]()
        for name in gates:
            if not isinstance(network.gate_of(name), Uncertainty):
                other.append(name)
        if other or not gates:
            names = ", ".join(other) or "none"
            raise BadNetwork(
                "objective needs an uncertainty gate at every exit; exits with another gate: "
                f"{names}. Use cut(model, example, at=..., gate='uncertainty')"
            )
        require_count("every", self.every)
        require_count("epochs", self.epochs)
        require_count("warm", self.warm, 0)
        require("price", self.price, low=0)
        prices = PriceList(costs_by(self.costs, network))
        balance = Balance(len(network.topology.gates))
        network.auxiliary = {
            PRICES: prices.to(network.device()),
            BALANCE: balance.to(network.device()),
        }

    def phases(self, network: Network) -> list[Phase]:
        """The warm-up, then gates and exits in turn."""
        names = trainable_exits(network)
        exits = exit_parameters(network, names)
        reads = reading(network, network.topology.exits)
        sgd = partial(torch.optim.SGD, lr=self.rate, momentum=0.9, weight_decay=self.decay)
        phases = list[Phase]()
        continued: tuple[nn.Parameter, ...] = ()
        if self.warm:
            phases.append(Phase(WARM, exits, self.warm, sgd, reads=reads))
            continued = exits  # their momentum carries over
        phases.append(
            Phase(
                JOINT,
                (*exits, *network.gates.parameters()),
                self.epochs,
                sgd,
                self._cooling,
                reads=reads,
                by="update",
                continues=continued,
            )
        )
        return phases

    def _cooling(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """A rate that falls after each epoch, along a cosine over all epochs.

        The length of the cosine includes the warm-up.
        """
        batches = max(1, steps // self.epochs)  # in an epoch
        least = min(1.0, self.least / self.rate)

        def factor(step: int) -> float:
            epoch = step // batches
            angle = math.pi * epoch / (self.warm + self.epochs)
            return least + (1 - least) * (1 + math.cos(angle)) / 2

        return LambdaLR(optimizer, factor)

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of the warm-up: the exits' cross-entropies, with more weight on earlier ones."""
        y = batch.labels()
        exits = outputs.network.topology.exits
        trained = trainable_exits(outputs.network)
        losses = dict[str, Tensor]()
        for index, name in enumerate(exits):
            if name in trained:
                weight = len(exits) - index  # E, E - 1, ... from shallow to deep
                losses[name] = weight * cross_entropy(outputs.logits[name], y)
        return losses

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """One step of the gates or of the exits, in turn.

        Args:
            outputs: the network's outputs for a batch, with gradients.
            batch: its labels, and the step within the run.
            optimizer: of exits and gates.

        Returns:
            The losses of both: those of exits by name, those of gates as `gate/NAME`.
        """
        network = outputs.network
        y = batch.labels()
        names = tuple(outputs.logits)
        batches = max(1, batch.steps // self.epochs)  # in an epoch

        # What gates and exits lose on each row.
        gates = list[Uncertainty]()
        gate_logits = list[Tensor]()
        for name in names[:-1]:
            gate = _gate_of(network, name)
            gates.append(gate)
            gate_logits.append(gate.logit(outputs.logits[name]))
        row_losses = list[Tensor]()
        for name in names:
            row_losses.append(cross_entropy(outputs.logits[name], y, reduction="none"))
        logits = torch.stack(gate_logits, 1)  # [b, E - 1]
        losses = torch.stack(row_losses, 1)  # [b, E]

        # The exits learn the rows that the gates send them.
        p = leaving(logits.detach().sigmoid())[:, :-1]  # [b, E - 1]
        of_exits = exit_losses(losses[:, :-1], p, detach=self.detach_scale)  # [E - 1]

        # The gates learn towards each row's best exit.
        balance = network.auxiliary[BALANCE]
        assert isinstance(balance, Balance)
        if batch.step and batch.step % batches == 0:
            balance.end_epoch()
        by_exit = torch.stack(list(outputs.logits.values()), 1).detach()  # [b, E, C]
        merits = AIMS[self.aim](by_exit, y)  # [b, E]
        priced = merits + self.price * network.auxiliary[PRICES].get_buffer("costs")  # [b, E]
        balance.count(priced.argmin(1))
        of_gates = gate_losses(logits, targets(priced), balance.weight)  # [E - 1]

        # One side takes a step. The other has no gradients after zero_grad, so SGD moves neither
        # its parameters nor their momentum.
        optimizer.zero_grad()
        if self._gates_turn(batch.step, batches):
            loss = of_gates.sum()
        else:
            loss = of_exits.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for index, gate in enumerate(gates):
            gate.follow(gates[:index])

        reported = dict(zip(names[:-1], of_exits.detach(), strict=True))
        reported[names[-1]] = losses[:, -1].detach().mean()
        for name, value in zip(names[:-1], of_gates.detach(), strict=True):
            reported[f"gate/{name}"] = value
        return reported

    def _gates_turn(self, step: int, batches: int) -> bool:
        """Whether it is the gates' turn at a step, in epochs of `batches` steps."""
        epoch, batch = divmod(step, batches)
        if batches == 1:  # then whole epochs alternate
            return epoch % 2 == 0
        turn = batch // min(self.every, batches // 2)
        return turn % 2 == 0


def _gate_of(network: Network, name: str) -> Uncertainty:
    """The gate of a node, which `prepare` has checked."""
    gate = network.gate_of(name)
    assert isinstance(gate, Uncertainty)
    return gate


def leaving(g: Tensor) -> Tensor:
    """Probabilities P [b, E] of leaving at each exit, from the gates' g [b, E - 1].

    All rows that are left leave at the last exit.

    P_l = max(0, min(g_l, 1 - sum_{i<l} g_i)), with g = 1 at the last.

    >>> leaving(torch.tensor([[0.25, 0.5, 0.5]]))
    tensor([[0.2500, 0.5000, 0.2500, 0.0000]])
    """
    extended = torch.cat([g, torch.ones_like(g[:, :1])], 1)  # [b, E - 1] -> [b, E]
    left = 1 - (extended.cumsum(1) - extended)  # 1 - the sum over earlier exits
    return torch.minimum(extended, left).clamp(min=0)


def activations(p: Tensor) -> Tensor:
    """The probabilities a [b, E] of leaving at an exit, for rows that have come this far.

    a_l = P_l / prod_{i<l} (1 - a_i), in [0, 1]. The product is the share that is left before l,
    1 - sum_{i<l} P_i. If nothing is left, a is 0.
    """
    left = 1 - (p.cumsum(1) - p)
    return torch.where(left > 0, p / left, 0.0).clamp(0, 1)


def exit_losses(losses: Tensor, p: Tensor, *, detach: bool = False) -> Tensor:
    """Cross-entropies of all exits but the last, weighted by P and rescaled.

    Args:
        losses: cross-entropies [b, E - 1].
        p: the probability [b, E - 1] that a row leaves at an exit.
        detach: whether the scale passes no gradient. If it passes one, the gradient is that of the
            unweighted mean.

    Returns:
        The summands [E - 1] of the mean over rows and exits. Each row's weighted losses are scaled
        to their unweighted sum.
    """
    weighted = p * losses
    scale = losses.sum(1) / weighted.sum(1).clamp(min=1e-12)
    if detach:
        scale = scale.detach()
    return (scale[:, None] * weighted).mean(0) / losses.shape[1]  # [b, E - 1] -> [E - 1]


def targets(priced: Tensor) -> Tensor:
    """Targets of the gates [b, E - 1]: 1 at and behind the best exit of a row, argmin_l priced_l.

    `priced` [b, E] is a row's loss at each exit plus the price of that exit.

    >>> targets(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.5]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    best = priced.argmin(1, keepdim=True)  # [b, 1]
    gates = torch.arange(priced.shape[1] - 1, device=priced.device)  # [E - 1]
    return (gates >= best).float()


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropies of exits: logits [b, E, C] and labels [b] -> [b, E]."""
    by_class = logits.transpose(1, 2)  # [b, C, E], as cross_entropy wants it
    labels = y[:, None].expand(logits.shape[:2])  # [b, E]
    return cross_entropy(by_class, labels, reduction="none")


def zero_one(logits: Tensor, y: Tensor) -> Tensor:
    """-1 if an exit is right and 0 otherwise: logits [b, E, C] and labels [b] -> [b, E].

    >>> zero_one(torch.tensor([[[2.0, 1.0], [0.0, 1.0]]]), torch.tensor([1]))
    tensor([[ 0., -1.]])
    """
    is_right = (logits.argmax(2) == y[:, None]).to(logits.dtype)
    return 0.0 - is_right  # not -is_right, which has -0.0


def probability(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the probability of an exit's prediction if that is right, and 0 otherwise.

    Logits [b, E, C] and labels [b] -> [b, E].
    """
    return zero_one(logits, y) * logits.softmax(2).amax(2)


AIMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropies,
    "zero_one": zero_one,
    "probability": probability,
}


def gate_losses(logits: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropies of the gates' g.

    They are of g and not of the activation, because a target means "leave here or earlier".

    Args:
        logits: of g, [b, E - 1].
        wanted: targets [b, E - 1].
        weight: of the positive targets, [E - 1].

    Returns:
        The summands [E - 1] of the mean over rows and gates.
    """
    return bce(logits, wanted, pos_weight=weight, reduction="none").mean(0) / logits.shape[1]


def costs_by(costs: Sequence[float] | Mapping[str, float] | None, network: Network) -> list[float]:
    """The cost c_l of leaving at every exit, as shares of the last one.

    Args:
        costs: by name, or one per exit from shallow to deep. None measures MACs.
        network: with exits and gates.

    Returns:
        The costs from shallow to deep, divided by the last unless that is 0.

    Raises:
        InvalidArgument: the costs do not fit the exits, or one is negative.
        BadNetwork: no rows are known to measure with.
    """
    if costs is None:
        by_exit = _measured_costs(network)
    else:
        by_exit = _costs_in_order(costs, network.topology.exits)
    last = by_exit[-1] or 1.0
    return [cost / last for cost in by_exit]


def _costs_in_order(
    costs: Sequence[float] | Mapping[str, float], names: Sequence[str]
) -> list[float]:
    """The costs that were given, in the order of the exits. Raises InvalidArgument."""
    values = list[float]()
    if not isinstance(costs, Mapping):
        values = list(costs)
    elif set(costs) == set(names):
        values = [costs[name] for name in names]
    if len(values) != len(names) or min(values) < 0:
        raise InvalidArgument(
            f"costs must be a number of at least 0 for each of {', '.join(names)}, got {costs!r}"
        )
    return list(map(float, values))


def _measured_costs(network: Network) -> list[float]:
    """The MACs up to each exit, with all exits and gates on the way. Raises BadNetwork."""
    rows = trial_rows(network)
    if not rows:
        raise BadNetwork(
            "costs cannot be measured, because no member of this network was cut and the "
            "shape of its rows is unknown. Give costs="
        )
    schedule = full_schedule(network.topology)
    parts = kind_of("torch")().open(network, schedule, network.device())
    priced = dict[str, Any]()
    for name, cost in costs_of(parts, rows, timed=False).items():
        priced[name.removeprefix("cost/")] = cost
    prices = Prices(network.topology, priced)
    return list(map(float, prices.to_exit(network.topology.gates, None)))
