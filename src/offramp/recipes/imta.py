"""Exits that help each other on a frozen model: each reads the one before, the last trains all.

Li, Zhang, Qi, Yang and Huang, Improved Techniques for Training Adaptive Deep Networks (IMTA), 2019,
arXiv 1908.06294: gradient equilibrium, inline subnetwork collaboration and one-for-all
distillation, in the two steps of the authors' scripts. First models and exits learn together, with
averaged gradients (recipes/_equilibrium.py). Then all of that is frozen. Every exit gets a new
linear layer, which also reads the logits of the exit before, through a small block
(exits/inline.py). Layers and blocks learn from labels and from the model's last output. Numbers are
those of
the script for ImageNet; the defaults of the authors' parser, which it does not use, are gamma 0.9
and temperature 3.
Where we differ:
- Frozen parts stay in eval mode. In the authors' code their batch norms go on moving, so the
  teacher's outputs come from batch statistics.
- The model's own last layer stays: its output is the teacher and the reference. The authors put a
  last classifier that collaborates in its place. Here that classifier is an exit: cut before the
  model's last layer too (the node "head.7" of `msdnet_even`, with a linear exit), and set
  final=True. A plan that lets all rows leave there gives the authors' outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.inline import Inline, parted
from offramp.networks.network import Network
from offramp.networks.nodes import Exit, Seen
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    trainable_exits,
)
from offramp.recipes._equilibrium import equilibrium, require_one_model
from offramp.recipes._schedules import dropped
from offramp.recipes._together import seen_of

__all__ = ["Imta"]

# Prefix of an auxiliary module: the linear layer that an exit had before. The exit's name follows.
PLAIN = "plain/"
TOGETHER = "together"


class Imta(Recipe):
    """(1 - gamma) CE(z, y) + gamma T^2 KL(last || z) for each exit but the last.

    KL is at the temperature T. It is the mean over rows and classes, as in the authors' code
    (torch's default), so it is C times smaller than the usual one. The teacher passes no gradient.
    The optimizer is SGD with momentum 0.9.

    Args:
        epochs: of the new layers and blocks.
        together: epochs of models and exits together, before, by the plain sum of cross-entropies.
            The authors use 90. Use 0 if they are trained already, for example by
            `joint?optimizer=sgd&equilibrium=true`.
        final: whether the deepest exit takes the place of the authors' last classifier. It then
            learns from labels alone, with weight 1, and has no part in `together`. It must have no
            layers except its linear one.
        gamma: the share of the loss that comes from the teacher.
        temperature: T.
        rate: of SGD, at the start of both steps.
        falls: the shares of each step after which the rate falls tenfold; on CIFAR 1/2 and 3/4.
        decay: weight decay.
        detach: whether an exit passes no gradient to the exit before it. In the authors' code it
            passes one.
    """

    def __init__(
        self,
        *,
        epochs: int = 90,
        together: int = 0,
        final: bool = False,
        gamma: float = 0.1,
        temperature: float = 1.0,
        rate: float = 0.1,
        falls: Sequence[float] = (1 / 3, 2 / 3),
        decay: float = 1e-4,
        detach: bool = False,
    ) -> None:
        self.epochs = epochs
        self.together = together
        self.final = final
        self.gamma = gamma
        self.temperature = temperature
        self.rate = rate
        self.falls = falls
        self.decay = decay
        self.detach = detach

    def prepare(self, network: Network) -> None:
        """Wrap every exit but the last in an `Inline`.

        Args:
            network: one model with exits.

        Raises:
            InvalidArgument: a number is out of range.
            BadNetwork: there is nothing to train, there are several models, an exit does not end in
                a linear layer, or layers of an exit would be frozen untrained.
        """
        if not 0 <= self.gamma <= 1:
            raise InvalidArgument(f"gamma must be between 0 and 1, got {self.gamma}")
        if not 0 < self.temperature < float("inf"):
            raise InvalidArgument(f"temperature must be above 0, got {self.temperature}")
        for share in self.falls:
            if not 0 <= share <= 1:
                raise InvalidArgument(
                    f"falls must be shares of a phase between 0 and 1, got {self.falls!r}"
                )
        trainable_exits(network)
        require_one_model(network, "imta")
        exits, plain = self._collaborating(network)
        for name, exit_ in exits.items():
            network.hang_exit(name, exit_.eval())
        network.auxiliary = {}
        if self.together:
            for name, layer in plain.items():
                network.auxiliary[PLAIN + name] = layer

    def _collaborating(self, network: Network) -> tuple[dict[str, Inline], dict[str, nn.Linear]]:
        """New exits by node, and the linear layers that the exits there end in now."""
        exits = dict[str, Inline]()
        plain = dict[str, nn.Linear]()
        names = network.topology.exits[:-1]
        untrained = network.untrained()
        before = None
        seen = seen_of(network)
        device = network.device()
        for name in names:
            exit_ = network.exit_of(name)
            if isinstance(exit_, Inline):
                # It collaborates already: it goes on, with a new plain layer.
                exits[name] = exit_
                plain[name] = nn.Linear(exit_.features, exit_.classes)
            else:
                _require_linear_end(name, exit_, seen[name])
                exits[name] = Inline(exit_, before, detach=self.detach)
                _, plain[name] = parted(exit_)
            # Layers before the linear one are frozen in the second step.
            has_layers = next(exits[name].exit.parameters(), None) is not None
            final = self.final and name == names[-1]
            if final and has_layers:
                raise BadNetwork(
                    f"exit {name!r} must have no layers before its linear one with final=True"
                )
            if has_layers and name in untrained and not self.together:
                raise BadNetwork(
                    f"Layers of the exit {name!r} were never trained and would be frozen. Train "
                    "them first, with together=90 or the recipe joint"
                )
            exits[name].to(device)
            plain[name].to(device)
            before = name
        if self.final:
            del plain[names[-1]]  # it takes no part in the first step
        return exits, plain

    def phases(self, network: Network) -> list[Phase]:
        """Models and exits together, if asked for; then the new layers and blocks."""
        sgd = partial(torch.optim.SGD, lr=self.rate, momentum=0.9, weight_decay=self.decay)
        schedule = dropped(*self.falls)
        phases = list[Phase]()

        # First step: the models, the exits' layers before the linear one, and the plain layers.
        if self.together:
            trained = list(network.backbone.parameters())
            for _, exit_ in _inline(network):
                trained.extend(exit_.exit.parameters())
            for layer in network.auxiliary.values():
                trained.extend(layer.parameters())
            during = partial(_plain_outputs, network)
            phases.append(
                Phase(TOGETHER, tuple(trained), self.together, sgd, schedule, during=during)
            )

        # Second step: the new linear layers and blocks.
        new = list[nn.Parameter]()
        for _, exit_ in _inline(network):
            new.extend(_new_parameters(exit_))
        phases.append(Phase("collaboration", tuple(new), self.epochs, sgd, schedule))
        return phases

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Cross-entropy by exit in the first step, and distillation in the second."""
        y = batch.labels()
        exits = outputs.network.topology.exits
        losses = dict[str, Tensor]()
        if batch.phase == TOGETHER:
            for name in exits:
                if PLAIN + name in outputs.network.auxiliary or name == exits[-1]:
                    losses[name] = cross_entropy(outputs.logits[name], y)
            return losses

        teacher = (outputs.logits[exits[-1]].detach() / self.temperature).softmax(1)  # [b, C]
        for name, _ in _inline(outputs.network):
            logits = outputs.logits[name]
            if self.final and name == exits[-2]:  # the authors' last classifier
                losses[name] = cross_entropy(logits, y)
                continue
            log_softmax = (logits / self.temperature).log_softmax(1)
            # The mean over rows and classes, as the authors have it; not "batchmean".
            divergence = kl_div(log_softmax, teacher, reduction="none").mean()
            hard = (1 - self.gamma) * cross_entropy(logits, y)
            losses[name] = hard + self.gamma * self.temperature**2 * divergence
        return losses


def _inline(network: Network) -> Iterator[tuple[str, Inline]]:
    """The exits that collaborate, shallow to deep."""
    for name in network.topology.exits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, Inline):
            yield name, exit_


def _new_parameters(exit_: Inline) -> list[nn.Parameter]:
    """The parameters of its linear layer and of its block."""
    parameters = list(exit_.linear.parameters())
    if exit_.block is not None:  # the first exit has no exit to read
        parameters.extend(exit_.block.parameters())
    return parameters


def _require_linear_end(name: str, exit_: Exit, seen: Seen) -> None:
    """Raise BadNetwork unless an exit ends in a linear layer on rows [B, F] and reads no exit."""
    if exit_.reads or not _ends_linear(exit_, seen):
        raise BadNetwork(
            f"exit {name!r} must end in a linear layer on features of its own. Use 'strided'"
        )


def _ends_linear(exit_: Exit, seen: Seen) -> bool:
    """Whether the output of an exit's last linear layer is the exit's output."""
    linear = [module for module in exit_.modules() if isinstance(module, nn.Linear)]
    if not linear:
        return False
    outputs = list[Tensor]()
    handle = linear[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with torch.no_grad():
            logits = exit_(seen)
    finally:
        handle.remove()
    # A layer that runs twice, or on [B, T, F], is not the last one on rows of features.
    return len(outputs) == 1 and outputs[0].dim() == 2 and torch.equal(outputs[0], logits)


@contextmanager
def _plain_outputs(network: Network) -> Iterator[None]:
    """Inside this context, exits use their plain linear layers, and gradients are averaged.

    An exit without such a layer is left out, and does not count among the exits behind a tap.
    """
    with ExitStack() as stack:
        left_out = list[str]()
        for name, exit_ in _inline(network):
            if PLAIN + name not in network.auxiliary:
                left_out.append(name)
                continue
            # A forward hook that returns a tensor replaces the layer's output.
            replace = partial(_replaced, network.auxiliary[PLAIN + name], exit_.features)
            handle = exit_.linear.register_forward_hook(replace)
            stack.callback(handle.remove)
        stack.enter_context(equilibrium(network, without=left_out))
        yield


def _replaced(
    plain: nn.Module, width: int, _linear: nn.Module, inputs: tuple[Any, ...], _output: Tensor
) -> Tensor:
    """The logits [B, C] of another linear layer, which reads the features [B, F] only."""
    # The inline layer's input has the block's output behind the features.
    logits: Tensor = plain(inputs[0][:, :width])
    return logits
