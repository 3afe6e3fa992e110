"""Exits as weak learners of an additive model: each fits what the exits before it still get wrong
(BoostNet).

Yu, Wang, Hua and Shi, Boosted Dynamic Neural Networks, AAAI 2023, arXiv 2211.16726. `prepare` hangs
an `Added` on every exit but the first: F_n = f_n + weight F_{n-1} without gradient through F_{n-1}.
All exits learn at once, by the plain sum of the cross-entropies of F_n; gradients into shared
pieces are averaged (`rescale`). Optimizer and schedule are those of the CIFAR scripts. Where we
differ: thresholds and checkpoints are not chosen here, where they use test rows and augmented rows
for it; their RANet has no rescaling and one decay, here both are switches for every model. With
weights that change from exit to exit the authors train and test different sums; both are their sums
of training here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offramp._support.arguments import require
from offramp.errors import InvalidArgument
from offramp.exits.added import Added
from offramp.networks.inputs import given
from offramp.networks.network import Network, trial_rows
from offramp.networks.recipe import (
    Losses,
    MakeOptimizer,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    trainable_exits,
)
from offramp.networks.taps import tensors_of
from offramp.recipes._equilibrium import equilibrium, require_one_model
from offramp.recipes._schedules import dropped
from offramp.recipes._together import parameters_of, require_one_width

__all__ = ["Boosted"]

AVERAGES = "averages"


class Boosted(Recipe):
    """Exits that add to one another, and the model, together.

    Args:
        weight: of the running sum, the prediction reweighting of the paper (the authors'
            temperature); below 1 it leaves deep exits something to do. One number; two, from which
            N equally spaced ones are made for N exits; or N, of which the n-th multiplies F_n in
            the next exit, so that the last has no effect.
        epochs: of SGD, whose rate falls to a tenth at one half and at three quarters.
        rate: of SGD at first.
        momentum: of SGD.
        decay: of the weights. One number; two, the first and the last of N equally spaced ones; or
            N, one for each exit and the piece of the model before its tap and after the tap before.
        rescale: average the gradients of all exits behind a tap.
        equal: the authors' loss equalisation, off by default as there, where their ImageNet script
            alone has it. Each exit's loss is divided by its moving average (momentum 0.9, which
            starts at the first batch's loss), and all are multiplied by the mean of these averages.
    """

    def __init__(
        self,
        weight: float | Sequence[float] = 0.5,
        *,
        epochs: int = 300,
        rate: float = 0.1,
        momentum: float = 0.9,
        decay: float | Sequence[float] = 1e-4,
        rescale: bool = True,
        equal: bool = False,
    ) -> None:
        self.weight = weight
        self.epochs = epochs
        self.rescale = rescale
        self.equal = equal
        self.rate = rate
        self.momentum = momentum
        self.decay = decay

    def prepare(self, network: Network) -> None:
        """Hang an `Added` on every exit but the first.

        Raises InvalidArgument for a weight that is no number above 0, for a decay below 0, and for
        another count of them than 1, 2 or that of the exits; BadNetwork where there is nothing to
        train, for a ladder, and for exits with different numbers of classes.
        """
        count = len(network.topology.exits)
        weights = spread(self.weight, count, "weight")
        for weight in weights:
            require("weight", weight, above=0)
        for decay in spread(self.decay, count, "decay"):
            require("decay", decay, low=0)
        trainable_exits(network)
        require_one_model(network, "boosted")
        require_one_width(network)
        add_up(network, weights)
        if self.equal:
            network.auxiliary[AVERAGES] = Averages(count).to(network.device())

    def phases(self, network: Network) -> list[Phase]:
        """Everything at once."""
        decays = spread(self.decay, len(network.topology.exits), "decay")
        sgd: MakeOptimizer
        if len(set(decays)) == 1:
            sgd = partial(
                torch.optim.SGD, lr=self.rate, momentum=self.momentum, weight_decay=decays[0]
            )
        else:
            sgd = partial(self._ramped, decays, pieces_of(network))
        during = partial(equilibrium, network) if self.rescale else nullcontext
        return [
            Phase(
                "boosted",
                parameters_of(network),
                self.epochs,
                sgd,
                dropped(1 / 2, 3 / 4),
                during=during,
            )
        ]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy of every running sum, equalised if asked for."""
        losses = {
            name: cross_entropy(logits, batch.labels()) for name, logits in outputs.logits.items()
        }
        if not self.equal:
            return losses
        averages = outputs.network.auxiliary[AVERAGES]
        factors = averages(torch.stack([loss.detach() for loss in losses.values()]))
        return {
            name: loss * factor
            for (name, loss), factor in zip(losses.items(), factors, strict=True)
        }

    def _ramped(
        self,
        decays: Sequence[float],
        pieces: Sequence[Sequence[nn.Parameter]],
        parameters: Iterable[nn.Parameter],
    ) -> torch.optim.Optimizer:
        trained = {id(value) for value in parameters}
        groups = list[dict[str, Any]]()
        for decay, piece in zip(decays, pieces, strict=True):
            values = [value for value in piece if id(value) in trained]
            if values:
                groups.append({"params": values, "weight_decay": decay})
        return torch.optim.SGD(groups, lr=self.rate, momentum=self.momentum)


class Averages(nn.Module):
    """Moving averages of the losses of N exits, for loss equalisation."""

    values: Tensor

    def __init__(self, count: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("values", torch.full((count,), math.nan))

    def forward(self, losses: Tensor) -> Tensor:
        """Losses [N] of a batch -> what to multiply them by [N]; the averages move where gradients
        are wanted.
        """
        losses = losses.to(self.values)
        moved = self.values * self.momentum + losses * (1 - self.momentum)
        moved = torch.where(self.values.isnan(), losses, moved)
        if torch.is_grad_enabled():
            self.values.copy_(moved)
        return moved.mean() / moved


def spread(value: float | Sequence[float], count: int, what: str) -> tuple[float, ...]:
    """One number for each of `count` exits, from one, from the first and the last, or from all.

    >>> spread((0.0, 1.0), 3, "weight")
    (0.0, 0.5, 1.0)
    """
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(numbers) == count:
        return tuple(map(float, numbers))
    if len(numbers) == 1:
        return tuple(map(float, numbers * count))
    if len(numbers) == 2:
        return tuple(np.linspace(numbers[0], numbers[1], count).tolist())
    raise InvalidArgument(
        f"{what} must have 1, 2 or {count} numbers (one for each exit), got {len(numbers)}"
    )


def pieces_of(network: Network) -> list[list[nn.Parameter]]:
    """Parameters by exit: its own, and those of the model that its tap is the first to depend on.

    All tensors that a tapped module gives count. Parameters that nothing depends on go with the
    last exit.
    """
    member = network.members[0]
    model = network.model_of(member)
    tapped = dict[str, list[Tensor]]()
    handles = []
    for cut in member.cuts:
        keep = partial(_keep, tapped, cut)
        handles.append(model.get_submodule(cut).register_forward_hook(keep))
    values = list(dict.fromkeys(parameters_of(network)))
    asked = [value.requires_grad for value in values]
    try:
        for value in values:
            value.requires_grad_(True)
        with torch.enable_grad():
            list(network.look(given(trial_rows(network, member, 2))))
        reached = [_reached(tapped[cut], values) for cut in member.cuts]
    finally:
        for handle in handles:
            handle.remove()
        for value, flag in zip(values, asked, strict=True):
            value.requires_grad_(flag)
    place_of = {id(value): len(network.topology.exits) - 1 for value in values}
    for index in reversed(range(len(reached))):
        place_of.update(dict.fromkeys(reached[index], index))
    for index, name in enumerate(network.topology.exits[: len(reached)]):
        place_of.update({id(value): index for value in network.exit_of(name).parameters()})
    pieces: list[list[nn.Parameter]] = [[] for _ in network.topology.exits]
    for value in values:
        pieces[place_of[id(value)]].append(value)
    return pieces


def _keep(
    tapped: dict[str, list[Tensor]], cut: str, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    tapped[cut] = list(tensors_of(output, "tap").values())


def _reached(outputs: Sequence[Tensor], values: Sequence[nn.Parameter]) -> list[int]:
    """The ids of the parameters that these tensors depend on."""
    ends = [output.sum() for output in outputs if output.requires_grad]
    if not ends:
        return []
    found = torch.autograd.grad(ends, values, allow_unused=True, retain_graph=True)
    return [
        id(value) for value, gradient in zip(values, found, strict=True) if gradient is not None
    ]


def add_up(network: Network, weight: float | Sequence[float]) -> None:
    """Let every exit but the first add to the one before it, in place; one that does already gets
    this weight.
    """
    weights = spread(weight, len(network.topology.exits), "weight")
    for index, (before, name) in enumerate(pairwise(network.topology.exits)):
        inner = network.exit_of(name)
        added = Added(inner.exit if isinstance(inner, Added) else inner, before, weights[index])
        network.hang_exit(name, added.eval())
