"""Exits as weak learners of an additive model: each fits what the exits before it still get wrong
(BoostNet).

Yu, Wang, Hua and Shi, Boosted Dynamic Neural Networks, AAAI 2023, arXiv 2211.16726. `prepare` wraps
every exit but the first in an `Added`: F_n = f_n + weight F_{n-1}, without gradient through
F_{n-1}. All exits learn at once, by the plain sum of the cross-entropies of F_n; gradients into
shared pieces are averaged (`rescale`). Optimizer and schedule are those of the CIFAR scripts. Where
we differ: this recipe chooses no thresholds and no checkpoints; the authors use test rows and
augmented rows for that. Their RANet has no rescaling and one decay; here both are switches for
every model. With weights that change from exit to exit, the authors train and test different sums;
here both are their sums of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
            temperature). Below 1 it leaves deep exits something to learn. Either one number, or
            the first and the last of N equally spaced numbers for N exits, or N numbers. The n-th
            multiplies F_n in the next exit, so the last has no effect.
        epochs: of SGD, whose rate falls to a tenth at one half and at three quarters.
        rate: of SGD at first.
        momentum: of SGD.
        decay: of the weights. Either one number, or the first and the last of N equally spaced
            numbers, or N numbers. The n-th is for the n-th exit and the piece of the model between
            the tap before and its own tap.
        rescale: average the gradients of all exits behind a tap.
        equal: the authors' loss equalisation. It is off by default, because only their ImageNet
            script has it. Each exit's loss is divided by its moving average (momentum 0.9, which
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
        """Wrap every exit but the first in an `Added`.

        Args:
            network: one model with exits.

        Raises:
            InvalidArgument: a weight is not above 0, a decay is below 0, or their count is not 1,
                2 or that of the exits.
            BadNetwork: there is nothing to train, there are several models, or the exits differ in
                their number of classes.
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
        during: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.rescale:
            during = partial(equilibrium, network)
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
        losses = dict[str, Tensor]()
        for name, logits in outputs.logits.items():
            losses[name] = cross_entropy(logits, batch.labels())
        if not self.equal:
            return losses
        averages = outputs.network.auxiliary[AVERAGES]
        plain = torch.stack(list(losses.values())).detach()  # [N]
        factors = averages(plain)  # [N]
        for name, factor in zip(losses, factors, strict=True):
            losses[name] = losses[name] * factor
        return losses

    def _ramped(
        self,
        decays: Sequence[float],
        pieces: Sequence[Sequence[nn.Parameter]],
        parameters: Iterable[nn.Parameter],
    ) -> torch.optim.Optimizer:
        """SGD with a weight decay for each piece of the model."""
        trained = set(map(id, parameters))
        groups = list[dict[str, Any]]()
        for decay, piece in zip(decays, pieces, strict=True):
            values = [value for value in piece if id(value) in trained]
            if values:  # SGD refuses an empty group
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
        """Factors [N] for the losses [N] of a batch. The averages move only while gradients are on,
        that is in training.
        """
        losses = losses.to(self.values)
        moved = self.values * self.momentum + losses * (1 - self.momentum)
        # NaN marks an average without a batch: it starts at the first loss.
        moved = torch.where(self.values.isnan(), losses, moved)
        if torch.is_grad_enabled():
            self.values.copy_(moved)
        return moved.mean() / moved


def spread(value: float | Sequence[float], count: int, what: str) -> tuple[float, ...]:
    """One number for each exit.

    Args:
        value: one number, the first and the last number, or all numbers.
        count: how many exits there are.
        what: the name of the argument, for the message.

    Returns:
        `count` numbers; between a first and a last one they are equally spaced.

    Raises:
        InvalidArgument: `value` has another count than 1, 2 or `count`.

    >>> spread((0.0, 1.0), 3, "weight")
    (0.0, 0.5, 1.0)
    """
    numbers: tuple[float, ...]
    if isinstance(value, Sequence):
        numbers = tuple(value)
    else:
        numbers = (value,)
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
    """Parameters by exit: the exit's own, and those of the model up to its tap.

    A parameter of the model belongs to the first tap that depends on it. Every tensor counts that
    a tapped module returns. Parameters that no tap depends on belong to the last exit.

    Args:
        network: one model that was cut.

    Returns:
        A list of parameters for each exit, from shallow to deep.
    """
    member = network.members[0]
    exits = network.topology.exits
    values = list(dict.fromkeys(parameters_of(network)))  # each shared parameter once
    reached = _reached_by_tap(network, values)

    # The index of each parameter's exit, by id. A shallow tap overwrites a deeper one, so the taps
    # are walked from deep to shallow. Exits come last, because they overwrite both.
    index_of = dict.fromkeys(map(id, values), len(exits) - 1)
    for index in reversed(range(len(member.cuts))):
        for value in reached[index]:
            index_of[id(value)] = index
    for index in range(len(member.cuts)):
        for value in network.exit_of(exits[index]).parameters():
            index_of[id(value)] = index

    pieces: list[list[nn.Parameter]] = [[] for _ in exits]
    for value in values:
        pieces[index_of[id(value)]].append(value)
    return pieces


def _reached_by_tap(network: Network, values: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters that each tap of a cut model depends on, found by a trial run."""
    member = network.members[0]
    model = network.model_of(member)
    tapped = dict[str, list[Tensor]]()
    handles = []
    for cut in member.cuts:
        keep = partial(_keep, tapped, cut)
        handles.append(model.get_submodule(cut).register_forward_hook(keep))
    # Frozen parameters count as well, so all require gradients while the trial runs.
    flags = [value.requires_grad for value in values]
    try:
        for value in values:
            value.requires_grad_(True)
        with torch.enable_grad():
            list(network.look(given(trial_rows(network, member, 2))))
        return [_reached(tapped[cut], values) for cut in member.cuts]
    finally:
        for handle in handles:
            handle.remove()
        for value, flag in zip(values, flags, strict=True):
            value.requires_grad_(flag)


def _keep(
    tapped: dict[str, list[Tensor]], cut: str, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    """A forward hook: note the tensors that a tapped module returns."""
    tapped[cut] = list(tensors_of(output, "tap").values())


def _reached(outputs: Sequence[Tensor], values: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters that these tensors depend on."""
    sums = list[Tensor]()
    for output in outputs:
        if output.requires_grad:
            sums.append(output.sum())
    if not sums:
        return []
    gradients = torch.autograd.grad(sums, values, allow_unused=True, retain_graph=True)
    reached = list[nn.Parameter]()
    for value, gradient in zip(values, gradients, strict=True):
        if gradient is not None:
            reached.append(value)
    return reached


def add_up(network: Network, weight: float | Sequence[float]) -> None:
    """Let every exit but the first add to the exit before it, in place.

    Args:
        network: one model with exits.
        weight: of the running sum, as `Boosted` takes it. An exit that is an `Added` already gets
            this weight instead of its own.
    """
    weights = spread(weight, len(network.topology.exits), "weight")
    for index, (before, name) in enumerate(pairwise(network.topology.exits)):
        inner = network.exit_of(name)
        if isinstance(inner, Added):
            inner = inner.exit
        added = Added(inner, before, weights[index])
        network.hang_exit(name, added.eval())
