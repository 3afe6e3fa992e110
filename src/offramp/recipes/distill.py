"""Be Your Own Teacher: the last exit trains the earlier ones, by labels, by its answers and by
features.

Zhang, Song, Gao, Chen, Bao and Ma, 2019, arXiv 1905.08094. The paper omits alpha, lambda and the
temperature; numbers and the form of the loss are those of the authors' released code, of the
journal version. Where we differ:
- The deepest feature there is what the last linear layer reads. Here it is what the deepest exit
  before the model's end pools, or what stands at the node `hint`: so cut after the last stage as
  well.
- Each shallower exit's feature is what that exit pools, or what it calls its `feature`: that of the
  heads there, the exits `attentive` (journal) and `bottleneck` (conference), which carry
  convolutions. Of any other, the mean over positions.
- All shallower exits get hints; the authors' code leaves one out, and its comment names another.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offramp._support.arguments import require
from offramp._support.find import unknown
from offramp.networks.inputs import given
from offramp.networks.network import Network, trial_rows
from offramp.networks.nodes import Exit
from offramp.networks.recipe import (
    Losses,
    Phase,
    Pools,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    reading,
    trainable_exits,
)
from offramp.recipes._schedules import dropped
from offramp.recipes._together import exit_parameters, soft_cross_entropy, students_of

__all__ = ["Distill"]

ADAPTER = "adapter/"  # of an auxiliary module, before the name of its exit


@runtime_checkable
class Heads(Protocol):
    """An exit that makes a feature of its own, with parameters, and reads its answer from that."""

    def feature(self, features: Tensor) -> Tensor:
        """Features [b, ...] -> [b, F]."""


class Distill(Recipe):
    """(1 - alpha) CE(q_i, y) + alpha CE(q_i^T, q_n^T) + hints |A_i F_i - F| for each exit i but the
    last, CE for that.

    q^T is the softmax at `temperature`, without the factor T^2; the teacher's logits and feature F
    pass no gradient. hints (their lambda) weighs the Euclidean norm, not squared, of the whole
    batch's [b, F'] matrix; A_i is a learned linear adapter, gone after training. hint: the node of
    F, by default the deepest before the end. SGD with momentum: 250 epochs, the rate 0.1 falls
    tenfold after 83, 166 and 240.

    backbone=False leaves the models as they are and trains the exits alone from the last one's
    answers, on pooled features if all of them pool; hints would train nothing then, and alpha=1
    needs no labels. Adam, 25 epochs, 1e-3: the choice is ours.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        hints: float = 0.03,
        temperature: float = 3.0,
        hint: str | None = None,
        backbone: bool = True,
        epochs: int | None = None,
        rate: float | None = None,
        decay: float = 5e-4,
    ) -> None:
        self.alpha = alpha
        self.hints = hints
        self.temperature = temperature
        self.hint = hint
        self.backbone = backbone
        self.epochs = epochs
        self.rate = rate
        self.decay = decay

    def prepare(self, network: Network) -> None:
        """Raise InvalidArgument, BadNetwork for what does not fit; then hang on the adapters."""
        trainable_exits(network)
        require("alpha", self.alpha, low=0, high=1)
        require("hints", self.hints, low=0)
        require("temperature", self.temperature, above=0)
        if self.hint is not None and self.hint not in network.topology.exits:
            raise unknown(self.hint, network.topology.exits, "node of this network")
        if not self.backbone:
            students_of(network)
        if self.backbone and self.hints:
            network.auxiliary = self._adapters(network)
        else:
            network.auxiliary = {}

    def _adapters(self, network: Network) -> dict[str, nn.Module]:
        """A linear layer per exit that gets hints, from the width of its feature to that of the
        hint.
        """
        hint = self.hint_of(network)
        rows = trial_rows(network)
        students = [name for name in network.topology.exits[:-1] if name != hint]
        if not students or not rows:
            return {}
        with torch.no_grad():
            widths = {
                name: feature_of(network.exit_of(name), seen.features).shape[1]
                for name, seen in network.look(given(rows))
            }
        device = network.device()
        return {
            ADAPTER + name: nn.Linear(widths[name], widths[hint]).to(device) for name in students
        }

    def hint_of(self, network: Network) -> str:
        """The node whose feature is the hint."""
        return self.hint or network.topology.exits[max(0, len(network.topology.exits) - 2)]

    def phases(self, network: Network) -> list[Phase]:
        """One phase."""
        if self.backbone:
            auxiliary = tuple(
                value for aux in network.auxiliary.values() for value in aux.parameters()
            )
            sgd = partial(
                torch.optim.SGD, lr=self.rate or 0.1, momentum=0.9, weight_decay=self.decay
            )
            every = (*network.backbone.parameters(), *network.exits.parameters(), *auxiliary)
            return [
                Phase(
                    "all", every, self.epochs or 250, sgd, dropped(83 / 250, 166 / 250, 240 / 250)
                )
            ]
        names = students_of(network)
        exits = exit_parameters(network, names)
        reads = reading(network, (*names, network.topology.exits[-1]))
        adam = partial(torch.optim.Adam, lr=self.rate or 1e-3)
        return [Phase("exits", exits, self.epochs or 25, adam, reads=reads, labels=self.alpha < 1)]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """By exit."""
        network = outputs.network
        found = dict[str, Tensor]()
        last = network.topology.exits[-1]
        hint = self.hint_of(network)
        teacher = outputs.logits[last].detach()
        for name in network.topology.exits[:-1] if self.backbone else students_of(network):
            parts = [
                self.alpha * soft_cross_entropy(outputs.logits[name], teacher, self.temperature)
            ]
            if self.alpha < 1:
                parts.append((1 - self.alpha) * cross_entropy(outputs.logits[name], batch.labels()))
            if (adapter := network.auxiliary.get(ADAPTER + name)) is not None:
                target = feature_of(network.exit_of(hint), outputs.features[hint]).detach()
                own = feature_of(network.exit_of(name), outputs.features[name])
                parts.append(self.hints * torch.linalg.vector_norm(adapter(own) - target))
            found[name] = torch.stack(parts).sum()
        if self.backbone:
            found[last] = cross_entropy(outputs.logits[last], batch.labels())
        return found


def feature_of(exit_: Exit, features: Tensor) -> Tensor:
    """What an exit pools of features [b, ...], or has for a `feature`: [b, F]; else the mean over
    positions.
    """
    if isinstance(exit_, Pools):
        return exit_.pool(features)
    if isinstance(exit_, Heads):
        return exit_.feature(features)
    return features.flatten(2).mean(2) if features.dim() > 2 else features
