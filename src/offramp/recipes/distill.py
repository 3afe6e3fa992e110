"""Be Your Own Teacher: earlier exits learn from labels, and from the last exit's outputs and
features.

Zhang, Song, Gao, Chen, Bao and Ma, 2019, arXiv 1905.08094. The paper omits alpha, lambda and the
temperature; numbers and the form of the loss are those of the authors' released code, of the
journal version. Where we differ:
- The authors' deepest feature is the input of the last linear layer. Here it is the pooled input of
  the deepest exit before the model's end, or the feature at the node `hint`. So cut after the last
  stage as well.
- The feature of a shallower exit is its pooled input or its `feature`. Their heads, the exits
  `attentive` (journal) and `bottleneck` (conference), have a `feature`, because they carry
  convolutions. Any other exit has the mean over positions.
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

ADAPTER = "adapter/"  # prefix of an auxiliary module; the exit's name follows


@runtime_checkable
class Heads(Protocol):
    """An exit that computes a feature with its own parameters, and its logits from that."""

    def feature(self, features: Tensor) -> Tensor:
        """Features [b, ...] -> [b, F]."""


class Distill(Recipe):
    """(1 - alpha) CE(q_i, y) + alpha CE(q_i^T, q_n^T) + hints |A_i F_i - F| for each exit i but the
    last, CE for that.

    q^T is the softmax at `temperature`, without the factor T^2. The teacher's logits and feature F
    pass no gradient. A_i is a learned linear adapter, which is dropped after training. The
    optimizer is SGD with momentum.

    With backbone=False it is Adam, by our choice. The models stay as they are, and the exits learn
    from the last one's outputs, on pooled features if all of them pool. Hints would train nothing
    then, and alpha=1 needs no labels.

    Args:
        alpha: the share of the teacher's outputs in the loss.
        hints: the authors' lambda. It weighs the Euclidean norm, not squared, of the whole batch's
            [b, F'] matrix.
        temperature: of both softmaxes.
        hint: the node whose feature is F, by default the deepest before the end.
        backbone: whether the models are trained too.
        epochs: by default 250, and 25 with backbone=False.
        rate: at the start. By default 0.1, which falls tenfold after 83, 166 and 240 of 250 epochs;
            with backbone=False 1e-3, which does not fall.
        decay: weight decay of SGD.
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
        """Check the arguments, and add an adapter for each exit that gets hints.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: an argument is out of range, or `hint` is not a node.
            BadNetwork: there is nothing to train.
        """
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
        """A linear layer for each exit that gets hints: [b, F_i] -> [b, F]."""
        hint = self.hint_of(network)
        rows = trial_rows(network)
        students = [name for name in network.topology.exits[:-1] if name != hint]
        if not students or not rows:
            return {}
        widths = dict[str, int]()
        with torch.no_grad():
            for name, seen in network.look(given(rows)):
                feature = feature_of(network.exit_of(name), seen.features)  # [b, F_i]
                widths[name] = feature.shape[1]
        device = network.device()
        adapters = dict[str, nn.Module]()
        for name in students:
            adapters[ADAPTER + name] = nn.Linear(widths[name], widths[hint]).to(device)
        return adapters

    def hint_of(self, network: Network) -> str:
        """The node whose feature is the hint."""
        return self.hint or network.topology.exits[max(0, len(network.topology.exits) - 2)]

    def phases(self, network: Network) -> list[Phase]:
        """One phase."""
        if self.backbone:
            adapters = list[nn.Parameter]()
            for adapter in network.auxiliary.values():
                adapters.extend(adapter.parameters())
            sgd = partial(
                torch.optim.SGD, lr=self.rate or 0.1, momentum=0.9, weight_decay=self.decay
            )
            trained = (*network.backbone.parameters(), *network.exits.parameters(), *adapters)
            schedule = dropped(83 / 250, 166 / 250, 240 / 250)
            return [Phase("all", trained, self.epochs or 250, sgd, schedule)]
        names = students_of(network)
        exits = exit_parameters(network, names)
        reads = reading(network, (*names, network.topology.exits[-1]))
        adam = partial(torch.optim.Adam, lr=self.rate or 1e-3)
        return [Phase("exits", exits, self.epochs or 25, adam, reads=reads, labels=self.alpha < 1)]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of each exit: from the teacher, from labels, and from the hint."""
        network = outputs.network
        losses = dict[str, Tensor]()
        last = network.topology.exits[-1]
        hint = self.hint_of(network)
        teacher = outputs.logits[last].detach()  # [b, C]
        if self.backbone:
            students = network.topology.exits[:-1]
        else:
            students = students_of(network)
        for name in students:
            logits = outputs.logits[name]  # [b, C]
            terms = [self.alpha * soft_cross_entropy(logits, teacher, self.temperature)]
            if self.alpha < 1:
                terms.append((1 - self.alpha) * cross_entropy(logits, batch.labels()))
            adapter = network.auxiliary.get(ADAPTER + name)
            if adapter is not None:
                target = feature_of(network.exit_of(hint), outputs.features[hint]).detach()
                feature = feature_of(network.exit_of(name), outputs.features[name])
                # The norm of the whole batch's matrix [b, F], as in the authors' code.
                terms.append(self.hints * torch.linalg.vector_norm(adapter(feature) - target))
            losses[name] = torch.stack(terms).sum()
        if self.backbone:
            losses[last] = cross_entropy(outputs.logits[last], batch.labels())
        return losses


def feature_of(exit_: Exit, features: Tensor) -> Tensor:
    """The feature [b, F] that an exit computes from a tapped module's output [b, ...].

    It is the pooled input or the exit's `feature`, and otherwise the mean over positions.
    """
    if isinstance(exit_, Pools):
        return exit_.pool(features)
    if isinstance(exit_, Heads):
        return exit_.feature(features)
    if features.dim() > 2:
        return features.flatten(2).mean(2)  # [b, F, ...] -> [b, F, positions] -> [b, F]
    return features
