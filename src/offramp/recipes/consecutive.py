"""Distil a binary network from float teachers that grow (BNext, Guo et al., 2022, arXiv
2211.12933).

The epochs are divided evenly among the assistants. At each step the student learns from the
assistant whose turn it is and from the main teacher, and not from labels:

    CE_i = - softmax(z_i) . log softmax(z)      at temperature 1, for both teachers
    alpha = softmax([CE_1, CE_2])               without gradient: the teacher with the larger
                                                cross-entropy counts more
    L = mean(alpha_1 CE_1 + alpha_2 CE_2) / 2

As in the authors' scripts: AdamW, five epochs of warm-up, a cosine to 1e-7, weight decay 1e-3, and
1e-8 for tensors of four dimensions. The temperature of binary layers falls below 1e-7 within the
epochs; in the authors' 512 epochs it does so after 153. Where we differ: alpha is computed for each
row. Their code intends this too, but multiplies the mean over the batch because of a misspelt
option.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import given
from offramp.networks.layer import outer_layers
from offramp.networks.network import Network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.recipes._together import parameters_of, require_same_classes, teacher_network

__all__ = ["Consecutive"]

MAIN = "teacher"
ASSISTANT = "assistant"
WARM_EPOCHS = 5
# The first and the last rate as shares of the rate. With a rate of 1e-3 they are 1e-5 and 1e-7.
FIRST = 1e-2
LAST = 1e-4


class Consecutive(Recipe):
    """The mean over rows of alpha_1 CE_1 + alpha_2 CE_2, halved.

    Args:
        teachers: trained models: the assistants from small to large, and the main teacher last. A
            single model is the main teacher without assistants. They are copied.
        epochs: over the training rows.
        rate: of AdamW, after the warm-up.
        decay: of weights; 4-dimensional tensors have 1e-8.
        warm: the share of the epochs in which the rate rises from a hundredth, at most five epochs.
    """

    trains_models = True

    def __init__(
        self,
        teachers: Sequence[nn.Module] | nn.Module = (),
        *,
        epochs: int = 512,
        rate: float = 1e-3,
        decay: float = 1e-3,
        warm: float = 0.01,
    ) -> None:
        self.teachers = teachers
        self.epochs = epochs
        self.rate = rate
        self.decay = decay
        self.warm = warm

    def config(self) -> dict[str, Any]:
        """The arguments. Teachers appear by class, because their weights are in the checkpoint."""
        classes = [type(teacher).__name__ for teacher in self._teachers()]
        return {**vars(self), "teachers": classes}

    def _teachers(self) -> list[nn.Module]:
        """The teachers as a list, also if there is only one."""
        if isinstance(self.teachers, nn.Module):
            return [self.teachers]
        return list(self.teachers)

    def prepare(self, network: Network) -> None:
        """Check the arguments, and copy the teachers into the network's auxiliary modules.

        Args:
            network: of one model. If it is cut, every exit is trained.

        Raises:
            BadNetwork: there are several models, or the model has no parameters.
            InvalidArgument: there is no teacher, or an argument is out of range.
        """
        if len(network.members) > 1 or not parameters_of(network):
            raise BadNetwork(
                f"consecutive trains the parameters of one model, got a ladder of "
                f"{len(network.members)}"
            )
        teachers = self._teachers()
        are_models = [isinstance(teacher, nn.Module) for teacher in teachers]
        if not teachers or not all(are_models):
            raise InvalidArgument(
                "consecutive needs teachers=[assistant, ..., main], trained models"
            )
        require("rate", self.rate, above=0)
        require("decay", self.decay, low=0)
        require("warm", self.warm, low=0, below=1)
        *assistants, main = teachers
        network.auxiliary = {MAIN: teacher_network(main, network)}
        for number, assistant in enumerate(assistants):
            network.auxiliary[f"{ASSISTANT}{number}"] = teacher_network(assistant, network)
        # Binary layers begin soft.
        for layer in outer_layers(network.model_of(network.members[0])).values():
            layer.anneal(0.0)

    def phases(self, network: Network) -> list[Phase]:
        """One phase, which needs no labels."""
        adamw = partial(_adamw, rate=self.rate, decay=self.decay)
        warm = 0.0
        if self.epochs:
            warm = min(self.warm, WARM_EPOCHS / self.epochs)
        schedule = partial(_scheduled, warm=warm)
        trained = parameters_of(network)
        return [
            Phase("consecutive", trained, self.epochs, adamw, schedule, labels=False, teacher=MAIN)
        ]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of each exit."""
        network = outputs.network
        assert outputs.teacher is not None
        teachers = [outputs.teacher]

        # The assistants take equal shares of the run, one after the other.
        count = len(network.auxiliary) - 1  # without the main teacher
        if count:
            turn = min(count - 1, int(batch.done * count))
            assistant = network.auxiliary[f"{ASSISTANT}{turn}"]
            with torch.no_grad():
                logits_by_exit = assistant(given(outputs.inputs))
            teachers.append(logits_by_exit[-1])  # [b, C]

        # Binary layers are set for the next step: this step's forward is over.
        done = min(1.0, (batch.step + 1) / max(1, batch.steps))
        for layer in outer_layers(network.model_of(network.members[0])).values():
            layer.anneal(done)

        losses = dict[str, Tensor]()
        for name, logits in outputs.logits.items():
            losses[name] = consecutive_loss(logits, teachers)
        return losses


def consecutive_loss(logits: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    """The mean over rows of the weighted cross-entropies, divided by the number of teachers.

    Args:
        logits: of the student, [b, C].
        teachers: the logits [b, C] of each teacher.

    Returns:
        A loss without dimensions.
    """
    for teacher in teachers:
        require_same_classes(logits, teacher)
    log_softmax = logits.log_softmax(-1)  # [b, C]
    by_teacher = list[Tensor]()
    for teacher in teachers:
        by_teacher.append(-(teacher.softmax(-1) * log_softmax).sum(-1))  # [b, C] -> [b]
    losses = torch.stack(by_teacher)  # [teachers, b]
    alpha = losses.detach().softmax(0)
    return (alpha * losses).sum(0).mean() / len(teachers)


def _adamw(values: Iterable[nn.Parameter], *, rate: float, decay: float) -> Optimizer:
    """AdamW in two groups: 4-dimensional tensors almost without decay."""
    deep = list[nn.Parameter]()
    others = list[nn.Parameter]()
    for value in values:
        if value.dim() == 4:  # kernels of convolutions
            deep.append(value)
        else:
            others.append(value)
    groups: list[dict[str, Any]] = []
    if others:
        groups.append({"params": others, "weight_decay": decay})
    if deep:
        groups.append({"params": deep, "weight_decay": 1e-8})
    return torch.optim.AdamW(groups, lr=rate)


def _scheduled(optimizer: Optimizer, steps: int, *, warm: float) -> LRScheduler:
    """A line up to the rate, then a cosine down."""
    rising = int(warm * steps)

    def factor(step: int) -> float:
        if step < rising:
            return FIRST + (1 - FIRST) * step / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        cosine = (1 + math.cos(math.pi * done)) / 2  # from 1 to 0
        return LAST + (1 - LAST) * cosine

    return LambdaLR(optimizer, factor)
