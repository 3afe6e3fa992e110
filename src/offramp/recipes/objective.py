"""JEI-DNN: exits and gates learned jointly, the exit being part of the objective.

Regol, Chataoui and Coates, 2024, arXiv 2310.09163. Shapes: b rows, E exits, the last one included; E - 1 gates.
A frozen backbone has exits, and at each the gate `uncertainty`. The exits learn on the rows that the gates would send
them, the gates towards the exit that is best for a row once its cost counts. Where we differ, or chose:
- the backbone's own answer is the last exit and is not taught; it takes part in all sums;
- there is no early stop in the warm-up, and no exit is frozen before the others;
- the positive weight of a gate's loss is that of the batch, no rows being set aside for it;
- the optimiser's name is lost: one AdamW, in which exits and gates keep states of their own (under Adam the decay, as a
  gradient of its own, shrinks an exit that no row is sent to until it answers by chance);
- the cross-entropy of a gate is of g, not of the activation a: a target says "leave here or earlier".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from offramp.errors import BadInput, BadNetwork
from offramp.find import find_file
from offramp.gates.uncertainty import Uncertainty
from offramp.measuring import costs_of
from offramp.network import Network, trial_rows
from offramp.nodes import Seen, grade
from offramp.pricing import Prices
from offramp.recipe import Lesson, Losses, Phase, Recipe, View, reading, taught_exits
from offramp.recipes._together import exit_parameters

__all__ = ["Objective"]

WARM, JOINT = "warm-up", "exits and gates"
PRICES = "prices"  # the aid that holds what leaving at each exit costs


class Held(nn.Module):
    """Costs c_l [E] of leaving at each exit, 1 at the last, where the network lies."""

    def __init__(self, costs: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("costs", torch.tensor(costs, dtype=torch.float32))


class Objective(Recipe):
    """Exits alone at first (`warm` epochs), then exits and gates by turns of `every` batches for `epochs` epochs.

    price (lambda in the paper): what the whole network's cost counts in nats of cross-entropy; one trained network per
    price, and the plan still sets, and certifies, the threshold. costs: of leaving at each exit, shallow to deep or by
    name, of which the last is 1; None measures the MACs of the network's parts, exits and gates included. every: at
    most a quarter of all steps, so that gates have their turns in short runs too.
    """

    def __init__(
        self,
        price: float = 0.7,
        *,
        costs: Sequence[float] | Mapping[str, float] | None = None,
        warm: int = 6,
        epochs: int = 10,
        every: int = 200,
        rate: float = 1e-2,
        decay: float = 5e-4,
    ) -> None:
        self.price, self.costs, self.warm, self.epochs, self.every = price, costs, warm, epochs, every
        self.rate, self.decay = rate, decay

    def prepare(self, network: Network) -> None:
        """Raise BadNetwork without such gates, or where cost cannot be measured; BadInput for costs that do not fit."""
        taught_exits(network)
        other = [name for name in network.chain.gates if not isinstance(network.gate_of(name), Uncertainty)]
        if other or not network.chain.gates:
            raise BadNetwork(
                f"the gates at {', '.join(other) or 'no exit'} are not uncertainty gates, expected one at every exit; "
                "cut(model, example, at=..., gate='uncertainty')"
            )
        if self.every < 1 or self.epochs < 1 or self.warm < 0 or self.price < 0:
            raise BadInput(
                f"every is {self.every}, epochs {self.epochs}, warm {self.warm} and price {self.price}, expected at "
                "least 1, 1, 0 and 0"
            )
        network.aids = {PRICES: Held(costs_by(self.costs, network)).to(network.device())}

    def phases(self, network: Network) -> list[Phase]:
        """The warm-up, then exits and gates by turns."""
        names = taught_exits(network)
        exits = exit_parameters(network, names)
        reads = reading(network, network.chain.exits)
        adam = partial(torch.optim.AdamW, lr=self.rate, weight_decay=self.decay)
        warm = [Phase(WARM, exits, self.warm, adam, reads=reads)] if self.warm else []
        both = (*exits, *network.gates.parameters())
        return [*warm, Phase(JOINT, both, self.epochs, adam, reads=reads, by="update")]

    def loss(self, view: View, lesson: Lesson) -> Losses:
        """Of the warm-up: the exits' cross-entropies."""
        y = lesson.labels()
        return {name: cross_entropy(view.logits[name], y) for name in taught_exits(view.network)}

    def update(self, view: View, lesson: Lesson, optimiser: Optimizer) -> Losses:
        """A step of the exits or of the gates, whose turn it is; what is reported are the losses of both."""
        y, names = lesson.labels(), (*view.logits,)
        gates = torch.stack([_scored(view, name) for name in names[:-1]], 1)  # [b, E - 1], logits of g
        losses = torch.stack([cross_entropy(view.logits[name], y, reduction="none") for name in names], 1)  # [b, E]
        exits = exit_losses(losses, leaving(gates.detach().sigmoid()))
        prices = view.network.aids[PRICES].get_buffer("costs")
        taught = gate_losses(gates, targets(losses.detach() + self.price * prices))
        turn = lesson.step // min(self.every, max(1, lesson.steps // 4))
        optimiser.zero_grad()  # what has no gradient then is not moved by Adam, nor is its state
        (taught if turn % 2 else exits).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        found = dict(zip(names, exits.detach(), strict=True))
        return found | {f"gate/{name}": each for name, each in zip(names, taught.detach(), strict=False)}


def _scored(view: View, name: str) -> Tensor:
    """The logit of g at a node, [b]."""
    own = view.logits[name]
    return grade(view.network.gate_of(name), Seen(view.features[name], view.logits, own.detach()), own.detach())


def leaving(g: Tensor) -> Tensor:
    """Probabilities P [b, E] of leaving at each exit, from the gates' g [b, E - 1]; the last exit takes who is left.

    P_l = max(0, min(g_l, 1 - sum_{i<l} g_i)), with g = 1 at the last.

    >>> leaving(torch.tensor([[0.25, 0.5, 0.5]]))
    tensor([[0.2500, 0.5000, 0.2500, 0.0000]])
    """
    whole = torch.cat([g, torch.ones_like(g[:, :1])], 1)
    left = 1 - (whole.cumsum(1) - whole)
    return torch.minimum(whole, left).clamp(min=0)


def activations(p: Tensor) -> Tensor:
    """a [b, E]: the probability of leaving at an exit for who has come so far, P_l / prod_{i<l} (1 - a_i), in [0, 1].

    Who is left before l is 1 - sum_{i<l} P_i, which that product is; where nobody is left, a is 0.
    """
    left = 1 - (p.cumsum(1) - p)
    return torch.where(left > 0, p / left, 0.0).clamp(0, 1)


def exit_losses(losses: Tensor, p: Tensor) -> Tensor:
    """Cross-entropies [b, E] weighted by P, each row's rescaled to the sum that it had unweighted: [E], mean over rows.

    The scale passes no gradient: with one, the rescaled sum would be the unweighted one again.
    """
    weighted = p * losses
    scale = losses.sum(1) / weighted.sum(1).clamp(min=1e-12)
    return (scale.detach()[:, None] * weighted).mean(0)


def targets(priced: Tensor) -> Tensor:
    """1 for every gate at or behind the best exit of a row, argmin_l (CE_l + price c_l): [b, E] -> [b, E - 1].

    >>> targets(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.5]]))
    tensor([[0., 1.],
            [0., 0.]])
    """
    best = priced.argmin(1, keepdim=True)
    return (torch.arange(priced.shape[1] - 1, device=priced.device) >= best).float()


def gate_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy of each gate [E - 1]; positives weigh as much as there are negatives to each, in the batch.

    One row of each kind is added to the counts: a batch may have no positives.
    """
    positive = wanted.sum(0)
    weight = (len(wanted) - positive + 1) / (positive + 1)
    return bce(logits, wanted, pos_weight=weight, reduction="none").mean(0)


def costs_by(costs: Sequence[float] | Mapping[str, float] | None, network: Network) -> list[float]:
    """c_l of every exit, as given or measured in MACs. Raises BadInput, and BadNetwork without rows to measure with."""
    names = network.chain.exits
    if costs is not None:
        found = [*costs.values()] if isinstance(costs, Mapping) else [*costs]
        named = not isinstance(costs, Mapping) or set(costs) == set(names)
        if not named or len(found) != len(names) or min(found) < 0:
            raise BadInput(f"the costs are {costs!r}, expected a number of at least 0 for each of {', '.join(names)}")
        found = [costs[name] for name in names] if isinstance(costs, Mapping) else found
    else:
        rows = trial_rows(network)
        if not rows:
            raise BadNetwork("no rung of this network was cut, so there are no rows to measure with; give costs=")
        steps = network.chain.walk(network.chain.gates)
        parts = find_file("engines", "torch").open(network, steps, network.device())
        priced = {name.removeprefix("cost/"): each for name, each in costs_of(parts, rows, timed=False).items()}
        found = Prices(network.chain, priced).to_exit(network.chain.gates, None).tolist()
    return [float(each) / float(found[-1]) for each in found] if found[-1] else [float(each) for each in found]
