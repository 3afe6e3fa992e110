"""JEI-DNN: exits and gates learned jointly, the exit being part of the objective.

Regol, Chataoui and Coates, 2024, arXiv 2310.09163. Shapes: b rows, E exits, the last one included;
E - 1 gates. A frozen backbone has exits, and at each the gate `uncertainty`. The exits learn on the
rows that the gates would send them, the gates towards the exit that is best for a row once its cost
counts. Steps, weights and rates are those of the authors' code (github.com/networkslab/dynn). Where
we differ:
- there is no early stop in the warm-up, and no exit goes back to an earlier epoch's weights (theirs
  does after two epochs without a better accuracy on held-out rows);
- rows that are optimal at an exit are counted on the training rows of the epoch before, theirs on
  held-out rows;
- turns are shorter in epochs of fewer than 2 `every` batches, or one side would never have its turn
  there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

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
PRICES = "prices"  # the auxiliary module that holds what leaving at each exit costs
# the auxiliary module that holds how much the ones among a gate's targets weigh
BALANCE = "balance"
FEWEST, HEAVIEST = (
    0.1,
    5.0,
)  # rows that count at least as optimal at an exit, and the largest weight


class PriceList(nn.Module):
    """Costs c_l [E] of leaving at each exit, 1 at the last, where the network lies."""

    def __init__(self, costs: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("costs", torch.tensor(costs, dtype=torch.float32))


class Balance(nn.Module):
    """What the ones among each gate's targets weigh, [E - 1]: 1 in the first epoch, then by the
    epoch before.

    Of n rows c are optimal exactly at an exit (not there or before): its ones weigh (n - c) / c, at
    most 5.
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
        counts = torch.bincount(best, minlength=len(self.optimal) + 1)
        self.optimal += counts[:-1]
        self.rows += len(best)

    def end_epoch(self) -> None:
        """Weigh by what was counted, and begin to count anew."""
        optimal = self.optimal.clamp(min=FEWEST)
        self.weight.copy_(((self.rows - optimal) / optimal).clamp(max=HEAVIEST))
        self.optimal.zero_()
        self.rows.zero_()


class Objective(Recipe):
    """Exits alone at first (`warm` epochs), then gates and exits in turn, `every` batches each, for
    `epochs` epochs.

    Warm-up: the exits' cross-entropies, the first of E exits weighing E, the next E - 1, and so on.
    SGD with momentum 0.9 throughout; the rate stays in the warm-up, then falls after each epoch
    along a cosine that would reach `least` after warm + epochs of them. Each epoch begins with the
    gates' turn.

    Args:
        price: lambda in the paper: what the whole network's cost counts in nats of cross-entropy;
            one trained network per price, and the plan still sets, and certifies, the threshold.
        costs: of leaving at each exit, shallow to deep or by name, of which the last is 1; None
            measures the MACs of the network's parts, exits and gates included.
        warm: epochs of the warm-up. The authors' is at most 6, and ends earlier where no exit gets
            better.
        epochs: after it. The authors' default is 10 in all, of which 6 warm-up leaves these 4;
            their README has 15.
        every: batches of a turn; at most half of an epoch's.
        rate: at the start.
        least: where the cosine would end.
        decay: weight decay.
        aim: what a gate weighs against cost to find the best exit of a row, one of the authors'
            three: "cross_entropy"; "zero_one", -1 where the exit is right; "probability", minus the
            probability of its answer where it is right.
        detach_scale: whether the scale that brings a row's weighted losses back to their unweighted
            sum passes no gradient. In the authors' code it passes one: then the scaled losses add
            up to the unweighted ones whatever the gates say, and so do their gradients, so that
            exits learn all rows alike. True is what the paper's formulas mean: an exit learns most
            of the rows that leave there.
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
        """Raise BadNetwork without such gates, or where cost cannot be measured; InvalidArgument
        for costs that do not fit.
        """
        trainable_exits(network)
        if self.aim not in AIMS:
            raise InvalidArgument(f"aim must be one of {', '.join(AIMS)}, got {self.aim!r}")
        other = [
            name
            for name in network.topology.gates
            if not isinstance(network.gate_of(name), Uncertainty)
        ]
        if other or not network.topology.gates:
            raise BadNetwork(
                f"the gates at {', '.join(other) or 'no exit'} are not uncertainty gates, "
                f"expected one at every exit; "
                "cut(model, example, at=..., gate='uncertainty')"
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
        warm = [Phase(WARM, exits, self.warm, sgd, reads=reads)] if self.warm else []
        both = (*exits, *network.gates.parameters())
        known = exits if warm else ()
        joint = Phase(
            JOINT, both, self.epochs, sgd, self._cooling, reads=reads, by="update", continues=known
        )
        return [*warm, joint]

    def _cooling(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """The rate after each epoch, along a cosine over all epochs, those of the warm-up
        included.
        """
        batches = max(1, steps // self.epochs)
        least = min(1.0, self.least / self.rate)

        def factor(step: int) -> float:
            epoch = step // batches
            return (
                least
                + (1 - least) * (1 + math.cos(math.pi * epoch / (self.warm + self.epochs))) / 2
            )

        return LambdaLR(optimizer, factor)

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Of the warm-up: the exits' cross-entropies, earlier ones weighing more."""
        y = batch.labels()
        exits = outputs.network.topology.exits
        weights = {name: len(exits) - index for index, name in enumerate(exits)}
        return {
            name: weights[name] * cross_entropy(outputs.logits[name], y)
            for name in trainable_exits(outputs.network)
        }

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """A step of the gates or of the exits, whose turn it is; what is reported are the losses of
        both.
        """
        network = outputs.network
        y = batch.labels()
        names = (*outputs.logits,)
        gates = [_gate_of(network, name) for name in names[:-1]]
        logits = torch.stack(
            [gate.logit(outputs.logits[name]) for gate, name in zip(gates, names, strict=False)], 1
        )
        losses = torch.stack(
            [cross_entropy(outputs.logits[name], y, reduction="none") for name in names], 1
        )  # [b, E]
        p = leaving(logits.detach().sigmoid())[:, :-1]  # [b, E - 1]
        exits = exit_losses(losses[:, :-1], p, detach=self.detach_scale)
        balance = network.auxiliary[BALANCE]
        assert isinstance(balance, Balance)
        batches = max(1, batch.steps // self.epochs)
        if batch.step and batch.step % batches == 0:
            balance.end_epoch()
        merits = AIMS[self.aim](
            torch.stack([outputs.logits[name] for name in names], 1).detach(), y
        )
        priced = merits + self.price * network.auxiliary[PRICES].get_buffer("costs")
        balance.count(priced.argmin(1))
        trained = gate_losses(logits, targets(priced), balance.weight)
        optimizer.zero_grad()  # what has no gradient then is not moved by SGD, nor is its momentum
        chosen = trained if self._gates_turn(batch.step, batches) else exits
        chosen.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for index, gate in enumerate(gates):
            gate.follow(gates[:index])
        found = dict(zip(names, exits.detach(), strict=False)) | {
            names[-1]: losses[:, -1].detach().mean()
        }
        return found | {
            f"gate/{name}": each for name, each in zip(names, trained.detach(), strict=False)
        }

    def _gates_turn(self, step: int, batches: int) -> bool:
        """Whether it is the gates' turn at a step, in epochs of `batches` steps."""
        epoch, batch = divmod(step, batches)
        if batches == 1:
            return epoch % 2 == 0
        return batch // min(self.every, batches // 2) % 2 == 0


def _gate_of(network: Network, name: str) -> Uncertainty:
    gate = network.gate_of(name)
    assert isinstance(gate, Uncertainty)
    return gate


def leaving(g: Tensor) -> Tensor:
    """Probabilities P [b, E] of leaving at each exit, from the gates' g [b, E - 1]; the last exit
    takes who is left.

    P_l = max(0, min(g_l, 1 - sum_{i<l} g_i)), with g = 1 at the last.

    >>> leaving(torch.tensor([[0.25, 0.5, 0.5]]))
    tensor([[0.2500, 0.5000, 0.2500, 0.0000]])
    """
    whole = torch.cat([g, torch.ones_like(g[:, :1])], 1)
    left = 1 - (whole.cumsum(1) - whole)
    return torch.minimum(whole, left).clamp(min=0)


def activations(p: Tensor) -> Tensor:
    """a [b, E]: the probability of leaving at an exit for who has come so far, P_l / prod_{i<l} (1
    - a_i), in [0, 1].

    Who is left before l is 1 - sum_{i<l} P_i, which that product is; where nobody is left, a is 0.
    """
    left = 1 - (p.cumsum(1) - p)
    return torch.where(left > 0, p / left, 0.0).clamp(0, 1)


def exit_losses(losses: Tensor, p: Tensor, *, detach: bool = False) -> Tensor:
    """Cross-entropies [b, E - 1] of all exits but the last, weighted by P, each row's rescaled to
    their unweighted sum.

    Returns the summands [E - 1] of the mean over rows and exits. detach: whether the scale passes
    no gradient; with one, the gradient is that of the unweighted mean.
    """
    weighted = p * losses
    scale = losses.sum(1) / weighted.sum(1).clamp(min=1e-12)
    if detach:
        scale = scale.detach()
    return (scale[:, None] * weighted).mean(0) / losses.shape[1]


def targets(priced: Tensor) -> Tensor:
    """1 for every gate at or behind the best exit of a row, argmin_l (CE_l + price c_l): [b, E] ->
    [b, E - 1].

    >>> targets(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.5]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    best = priced.argmin(1, keepdim=True)
    return (torch.arange(priced.shape[1] - 1, device=priced.device) >= best).float()


def cross_entropies(logits: Tensor, y: Tensor) -> Tensor:
    """What exits lose: logits [b, E, C] and labels [b] -> [b, E]."""
    return cross_entropy(
        logits.transpose(1, 2), y[:, None].expand(logits.shape[:2]), reduction="none"
    )


def zero_one(logits: Tensor, y: Tensor) -> Tensor:
    """-1 where an exit is right, else 0: logits [b, E, C] and labels [b] -> [b, E].

    >>> zero_one(torch.tensor([[[2.0, 1.0], [0.0, 1.0]]]), torch.tensor([1]))
    tensor([[ 0., -1.]])
    """
    right = (logits.argmax(2) == y[:, None]).to(logits.dtype)
    return 0.0 - right


def probability(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the probability of an exit's answer where it is right, else 0: [b, E, C] and [b] -> [b,
    E].
    """
    return zero_one(logits, y) * logits.softmax(2).amax(2)


AIMS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropies,
    "zero_one": zero_one,
    "probability": probability,
}


def gate_losses(logits: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropies of the gates' g, whose ones weigh `weight` [E - 1]; logits and targets
    are [b, E - 1].

    Returns the summands [E - 1] of the mean over rows and gates. It is of g and not of the
    activation: a target says "leave here or earlier".
    """
    return bce(logits, wanted, pos_weight=weight, reduction="none").mean(0) / logits.shape[1]


def costs_by(costs: Sequence[float] | Mapping[str, float] | None, network: Network) -> list[float]:
    """c_l of every exit, as given or measured in MACs. Raises InvalidArgument, and BadNetwork
    without rows to measure with.
    """
    names = network.topology.exits
    if costs is not None:
        found = [*costs.values()] if isinstance(costs, Mapping) else [*costs]
        named = not isinstance(costs, Mapping) or set(costs) == set(names)
        if not named or len(found) != len(names) or min(found) < 0:
            raise InvalidArgument(
                f"costs must be a number of at least 0 for each of {', '.join(names)}, got "
                f"{costs!r}"
            )
        found = [costs[name] for name in names] if isinstance(costs, Mapping) else found
    else:
        rows = trial_rows(network)
        if not rows:
            raise BadNetwork(
                "costs cannot be measured, because no member of this network was cut and the "
                "shape of its rows is unknown. Give costs="
            )
        schedule = full_schedule(network.topology)
        parts = kind_of("torch")().open(network, schedule, network.device())
        priced = {
            name.removeprefix("cost/"): each
            for name, each in costs_of(parts, rows, timed=False).items()
        }
        found = Prices(network.topology, priced).to_exit(network.topology.gates, None).tolist()
    if found[-1]:
        return [float(each) / float(found[-1]) for each in found]
    return [float(each) for each in found]
