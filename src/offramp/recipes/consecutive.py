"""Distil a binary network from float teachers that grow (BNext, Guo et al., 2022, arXiv
2211.12933).

The epochs are divided evenly among the assistants; at each time the student learns from the
assistant whose turn it is and from the main teacher, and from no label:

    CE_i = - softmax(z_i) . log softmax(z)      at temperature 1, for both teachers
    alpha = softmax([CE_1, CE_2])               without gradient: the teacher that is matched worst
                                                counts more
    L = mean(alpha_1 CE_1 + alpha_2 CE_2) / 2

As in the authors' scripts: AdamW, five epochs of warm-up, a cosine to 1e-7, weight decay 1e-3, and
1e-8 for tensors of four dimensions. The temperature of binary layers falls below 1e-7 within the
epochs; in the authors' 512 epochs it does so after 153. Where we differ: alpha is of each row;
their code means it so, and multiplies the mean over the batch because of a misspelt option.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
from offramp.networks.network import Network, last_model, plain_network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.recipes._together import parameters_of

__all__ = ["Consecutive"]

MAIN = "teacher"
ASSISTANT = "assistant"
WARM_EPOCHS = 5
FIRST, LAST = 1e-2, 1e-4  # of the rate: 1e-5 and 1e-7 of 1e-3


class Consecutive(Recipe):
    """The mean over rows of alpha_1 CE_1 + alpha_2 CE_2, halved.

    Args:
        teachers: trained models, the assistants in the order in which they grow and the main one
            last; one model alone trains by itself. They are copied.
        epochs: of all of it.
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
        """The arguments; of the teachers their classes, for their weights are in the checkpoint."""
        return {**vars(self), "teachers": [type(one).__name__ for one in self._given()]}

    def _given(self) -> list[nn.Module]:
        if isinstance(self.teachers, nn.Module):
            return [self.teachers]
        return list(self.teachers)

    def prepare(self, network: Network) -> None:
        """Check the arguments and hang on the teachers.

        Args:
            network: of one model; it may be cut, and then every exit is trained.

        Raises:
            BadNetwork: a ladder, or a model without parameters.
            InvalidArgument: no teacher, or an argument out of its range.
        """
        if len(network.members) > 1 or not parameters_of(network):
            raise BadNetwork(
                f"consecutive trains the parameters of one model, got a ladder of "
                f"{len(network.members)}"
            )
        teachers = self._given()
        if not teachers or not all(isinstance(one, nn.Module) for one in teachers):
            raise InvalidArgument(
                "consecutive needs teachers=[assistant, ..., main], trained models"
            )
        require("rate", self.rate, above=0)
        require("decay", self.decay, low=0)
        require("warm", self.warm, low=0, below=1)
        *assistants, main = teachers
        network.auxiliary = {MAIN: _network_of(main, network)}
        for number, one in enumerate(assistants):
            network.auxiliary[f"{ASSISTANT}{number}"] = _network_of(one, network)
        for layer in outer_layers(network.model_of(network.members[0])).values():
            layer.anneal(0.0)

    def phases(self, network: Network) -> list[Phase]:
        """One phase, which needs no labels."""
        adamw = partial(_adamw, rate=self.rate, decay=self.decay)
        warm = min(self.warm, WARM_EPOCHS / self.epochs) if self.epochs else 0.0
        schedule = partial(_scheduled, warm=warm)
        values = parameters_of(network)
        return [
            Phase(
                "consecutive",
                values,
                self.epochs,
                adamw,
                schedule,
                labels=False,
                teacher=MAIN,
            )
        ]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """By exit."""
        assert outputs.teacher is not None
        teachers = [outputs.teacher]
        count = len(outputs.network.auxiliary) - 1
        if count:
            turn = min(count - 1, int(batch.done * count))
            assistant = outputs.network.auxiliary[f"{ASSISTANT}{turn}"]
            with torch.no_grad():
                teachers.append(assistant(given(outputs.inputs))[-1])
        done = min(1.0, (batch.step + 1) / max(1, batch.steps))
        for layer in outer_layers(outputs.network.model_of(outputs.network.members[0])).values():
            layer.anneal(done)
        return {name: consecutive_loss(logits, teachers) for name, logits in outputs.logits.items()}


def consecutive_loss(logits: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    """The mean over rows of the weighted cross-entropies, divided by the number of teachers.

    Args:
        logits: of the student, [b, C].
        teachers: logits of each, [b, C].
    """
    answers = logits.log_softmax(-1)
    each = torch.stack([-(one.softmax(-1) * answers).sum(-1) for one in teachers])  # [teachers, b]
    alpha = each.detach().softmax(0)
    return (alpha * each).sum(0).mean() / len(teachers)


def _network_of(teacher: nn.Module, student: Network) -> Network:
    """A copy of a teacher as a network of one node, behind the student's preprocessing or its
    own.
    """
    if isinstance(teacher, Network):
        made = last_model(teacher, copied=True)
    else:
        member = student.members[0]
        preprocess = copy.deepcopy(student.preprocess_of(member))
        made = plain_network(copy.deepcopy(teacher), replace(member, spec=None), preprocess)
    return made.eval().requires_grad_(False).to(student.device())


def _adamw(values: Iterable[nn.Parameter], *, rate: float, decay: float) -> Optimizer:
    """AdamW in two groups: 4-dimensional tensors almost without decay."""
    listed = list(values)
    deep = [value for value in listed if value.dim() == 4]
    others = [value for value in listed if value.dim() != 4]
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
        gone = min(1.0, (step - rising) / max(1, steps - rising))
        wave = (1 + math.cos(math.pi * gone)) / 2
        return LAST + (1 - LAST) * wave

    return LambdaLR(optimizer, factor)
