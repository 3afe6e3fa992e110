"""Exits that help each other on a frozen model: each reads the one before, the last trains all.

Li, Zhang, Qi, Yang and Huang, Improved Techniques for Training Adaptive Deep Networks (IMTA), 2019,
arXiv 1908.06294: gradient equilibrium, inline subnetwork collaboration and one-for-all
distillation, in the two steps of the authors' scripts. First models and exits together, with
gradients averaged (recipes/_equilibrium.py). Then all of that is frozen; every exit gets a new
linear layer, which also reads what a small block makes of the logits before it (exits/inline.py);
and layers and blocks learn from labels and from the model's own last answer. Numbers are those of
the script for ImageNet; the defaults of the authors' parser, which it does not use, are gamma 0.9
and temperature 3.
Where we differ:
- What is frozen stays in eval mode. There batch norms go on moving, so that the teacher answers
  from batch statistics.
- The model's own last layer stays: its answer is the teacher and the reference. The authors put a
  last classifier that collaborates in its place. Here that one is an exit: cut before the model's
  last layer too (the node "head.7" of `msdnet_even`, with a linear exit), and say final=True. A
  plan that lets all rows leave there answers as theirs.
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

# of an auxiliary module, before the name of its exit: the linear layer that it had before
PLAIN = "plain/"
TOGETHER = "together"


class Imta(Recipe):
    """(1 - gamma) CE(z, y) + gamma T^2 KL(last || z) for each exit but the last.

    KL is at the temperature T. It is the mean over rows and classes, as in the authors' code
    (torch's default), so it is C times less than the usual one. The teacher passes no gradient. SGD
    with momentum 0.9.

    Args:
        epochs: of the new layers and blocks.
        together: epochs of models and exits together, before, by the plain sum of cross-entropies;
            the authors' 90. 0 where they have been trained, such as by
            `joint?optimizer=sgd&equilibrium=true`.
        final: whether the deepest exit stands for the authors' last classifier. It then learns from
            labels alone, with weight 1, and takes no part in `together`. It may have no layers but
            its linear one.
        gamma: how much of the loss comes from the teacher.
        temperature: T.
        rate: of SGD, at the start of both steps.
        falls: the shares of each step after which the rate falls tenfold; on CIFAR 1/2 and 3/4.
        decay: weight decay.
        detach: whether an exit passes no gradient to the one before it, as the paper is said to
            have it. In the authors' code it does.
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
        """Hang an `Inline` on every exit but the last.

        Raises InvalidArgument for numbers out of range; BadNetwork where there is nothing to train,
        for a ladder, for exits that do not end in a linear layer, and for layers of exits that
        would be frozen untrained.
        """
        if not 0 <= self.gamma <= 1:
            raise InvalidArgument(f"gamma must be between 0 and 1, got {self.gamma}")
        if not 0 < self.temperature < float("inf"):
            raise InvalidArgument(f"temperature must be above 0, got {self.temperature}")
        if not all(0 <= share <= 1 for share in self.falls):
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
            network.auxiliary = {PLAIN + name: layer for name, layer in plain.items()}

    def _collaborating(self, network: Network) -> tuple[dict[str, Inline], dict[str, nn.Linear]]:
        """By node: the exit that will hang there, and the linear layer the one there ends in."""
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
                exits[name] = exit_
                plain[name] = nn.Linear(exit_.features, exit_.classes)
            else:
                _require_linear_end(name, exit_, seen[name])
                exits[name] = Inline(exit_, before, detach=self.detach)
                _, plain[name] = parted(exit_)
            inside = any(True for _ in exits[name].exit.parameters())
            final = self.final and name == names[-1]
            if final and inside:
                raise BadNetwork(
                    f"exit {name!r} has layers before its linear one, and final=True takes none"
                )
            if inside and name in untrained and not self.together:
                raise BadNetwork(
                    f"layers of the exit {name!r} were never trained and would be frozen; train "
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
        found = list[Phase]()
        if self.together:
            inside = [value for _, exit_ in _inline(network) for value in exit_.exit.parameters()]
            plain = [value for layer in network.auxiliary.values() for value in layer.parameters()]
            every = (*network.backbone.parameters(), *inside, *plain)
            during = partial(_plain_answers, network)
            found.append(Phase(TOGETHER, every, self.together, sgd, schedule, during=during))
        new = [value for _, exit_ in _inline(network) for value in _new_parameters(exit_)]
        return [*found, Phase("collaboration", tuple(new), self.epochs, sgd, schedule)]

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """By exit."""
        y = batch.labels()
        exits = outputs.network.topology.exits
        if batch.phase == TOGETHER:
            plain = [name for name in exits if PLAIN + name in outputs.network.auxiliary] + [
                exits[-1]
            ]
            return {name: cross_entropy(outputs.logits[name], y) for name in plain}
        teacher = (outputs.logits[exits[-1]].detach() / self.temperature).softmax(1)
        found = dict[str, Tensor]()
        for name, _ in _inline(outputs.network):
            logits = outputs.logits[name]
            if self.final and name == exits[-2]:
                found[name] = cross_entropy(logits, y)
                continue
            logs = (logits / self.temperature).log_softmax(1)
            apart = kl_div(logs, teacher, reduction="none").mean()
            hard = (1 - self.gamma) * cross_entropy(logits, y)
            found[name] = hard + self.gamma * self.temperature**2 * apart
        return found


def _inline(network: Network) -> Iterator[tuple[str, Inline]]:
    """The exits that collaborate, shallow to deep."""
    for name in network.topology.exits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, Inline):
            yield name, exit_


def _new_parameters(exit_: Inline) -> list[nn.Parameter]:
    """Those of its linear layer and of its block."""
    block = () if exit_.block is None else exit_.block.parameters()
    return [*exit_.linear.parameters(), *block]


def _require_linear_end(name: str, exit_: Exit, seen: Seen) -> None:
    """Raise BadNetwork unless an exit ends in a linear layer on rows [B, F] and reads no exit."""
    last = [part for part in exit_.modules() if isinstance(part, nn.Linear)][-1:]
    heard = list[Tensor]()
    if last and not exit_.reads:
        handle = last[0].register_forward_hook(lambda _, __, output: heard.append(output))
        try:
            with torch.no_grad():
                logits = exit_(seen)
        finally:
            handle.remove()
    ends = len(heard) == 1 and heard[0].dim() == 2 and torch.equal(heard[0], logits)
    if not ends:
        raise BadNetwork(
            f"exit {name!r} does not end in a linear layer on features of its own; use 'strided'"
        )


@contextmanager
def _plain_answers(network: Network) -> Iterator[None]:
    """While it lasts, exits answer by their linear layers from before, with averaged gradients.

    An exit without such a layer is left out, and does not count among those behind a tap.
    """
    with ExitStack() as until_the_end:
        left_out = [name for name, _ in _inline(network) if PLAIN + name not in network.auxiliary]
        until_the_end.enter_context(equilibrium(network, without=left_out))
        for name, exit_ in _inline(network):
            if name not in left_out:
                instead = partial(_instead, network.auxiliary[PLAIN + name], exit_.features)
                handle = exit_.linear.register_forward_hook(instead)
                until_the_end.callback(handle.remove)
        yield


def _instead(
    plain: nn.Module, width: int, _linear: nn.Module, inputs: tuple[Any, ...], _output: Tensor
) -> Tensor:
    """The logits [B, C] of another linear layer, which reads the features [B, F] alone."""
    logits: Tensor = plain(inputs[0][:, :width])
    return logits
