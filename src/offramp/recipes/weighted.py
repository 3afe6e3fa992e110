"""Weights for each row at each exit, learned from a trial step (L2W-DEN).

Han, Pu, Lai, Wang, Song, Cao, Huang, Deng and Huang, Learning to Weight Samples for Dynamic
Early-exiting Networks, ECCV 2022, arXiv 2209.08310; formulas and figures from the authors' code.
Shapes: b rows, K exits.

A row should have more weight at the exit where it will leave. A batch is halved. On one half, the
losses l [b, K] go without gradient through a small network g (the weigher): r = g(l), and weights
v = 1 + epsilon (r - mean of r). A trial step of SGD along sum_k mean_i v_ik l_ik gives other
parameters of the network. With these the other half is sent to exits as in use, and g learns by the
loss at the exit where each row leaves. Then the real step is made with the new g. Then the halves
change places. g is dropped after training. Where we differ: g reads only losses, not confidences;
sizes without a script (see `Weighted`) are those for CIFAR.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from offramp._support.arguments import require, require_count
from offramp.errors import InvalidArgument
from offramp.networks.inputs import given
from offramp.networks.network import Network
from offramp.networks.recipe import (
    Losses,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    trainable_exits,
)
from offramp.recipes._schedules import cosine
from offramp.recipes._together import parameters_of

__all__ = ["Weighted"]

# The axes of [b, K] over which weights have mean 1: all, a row's exits, an exit's rows.
AXES = {"mat": (0, 1), "col": (1,), "row": (0,)}
MOMENTS = (0.9, 0.999)  # of g's Adam

State = dict[str, Any]


class Weighted(Recipe):
    """Models and exits together, each row weighted at each exit.

    In float32 only; a model must allow gradients of gradients.

    Args:
        epsilon: the largest distance of a weight from 1.
        center: where the weights have mean 1: "mat" over the batch, "col" over each row's exits,
            "row" over each exit's rows.
        share: the rows that leave at exit k+1 relative to exit k, in the routing that the weights
            are learned for (p in q_k ~ p^k).
        hidden: units of each hidden layer of g.
        layers: hidden layers of g; all commands of the authors have 1.
        meta_rate: of g's Adam; it falls with the other rate.
        every: g learns in every n-th batch of an epoch, from the first on, and there on both
            halves. The authors' meta interval: 1 on CIFAR, 100 on ImageNet.
        epochs: over the training rows.
        rate: of SGD at the start; it falls along a cosine.
        momentum: of SGD.
        decay: weight decay, of SGD and of g's Adam.
    """

    def __init__(
        self,
        epsilon: float = 0.8,
        *,
        center: str = "col",
        share: float = 0.75,
        hidden: int = 500,
        layers: int = 1,
        meta_rate: float = 1e-4,
        every: int = 1,
        epochs: int = 300,
        rate: float = 0.8,
        momentum: float = 0.9,
        decay: float = 1e-4,
    ) -> None:
        self.epsilon = epsilon
        self.center = center
        self.share = share
        self.hidden = hidden
        self.layers = layers
        self.meta_rate = meta_rate
        self.every = every
        self.epochs = epochs
        self.rate = rate
        self.momentum = momentum
        self.decay = decay

    def prepare(self, network: Network) -> None:
        """Check the arguments and the network.

        Args:
            network: with exits.

        Raises:
            InvalidArgument: an argument is out of range.
            BadNetwork: there is nothing to train.
        """
        if self.center not in AXES:
            raise InvalidArgument(f"center must be one of {', '.join(AXES)}, got {self.center!r}")
        require("epsilon", self.epsilon, low=0, below=1)
        require("share", self.share, above=0)
        require_count("every", self.every)
        require_count("hidden", self.hidden)
        require_count("layers", self.layers)
        trainable_exits(network)

    def phases(self, network: Network) -> list[Phase]:
        """Everything at once."""
        sgd = partial(
            torch.optim.SGD, lr=self.rate, momentum=self.momentum, weight_decay=self.decay
        )
        return [
            Phase(
                "weighted",
                parameters_of(network),
                self.epochs,
                sgd,
                cosine,
                by="update",
                looks=False,
            )
        ]

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """Two real steps, one on each half. A batch of one row is both halves.

        Args:
            outputs: the inputs of a batch, and the network.
            batch: its labels, and the step within the run.
            optimizer: SGD, of models and exits.

        Returns:
            The plain loss of each exit, of each half before its own step.
        """
        y = batch.labels()
        network = outputs.network
        memory = self._memory(optimizer, len(network.topology.exits), y.device)
        batches = max(1, batch.steps // self.epochs)  # in an epoch
        learns = batch.step % batches % self.every == 0
        halves = torch.arange(len(y), device=y.device).chunk(2)  # rows of the batch
        if len(halves) == 2:
            pairs = [(halves[0], halves[1]), (halves[1], halves[0])]
        else:
            pairs = [(halves[0], halves[0])]

        plain = list[Tensor]()
        for train, meta in pairs:
            # The weigher first, since its step decides the weights of the real one.
            if learns:
                gradients = self.look_ahead(outputs, y, (train, meta), optimizer, memory)
                self._learn(memory, gradients, optimizer)
            losses = losses_of(network(_rows(outputs, train)), y[train])  # [b / 2, K]
            plain.append(losses.detach())
            with torch.no_grad():
                weights = self.weights(memory, losses)  # [b / 2, K]
            optimizer.zero_grad()
            (weights * losses).mean(0).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        means = torch.cat(plain).mean(0)  # [b, K] -> [K]
        return dict(zip(network.topology.exits, means, strict=True))

    def weights(self, weigher: Mapping[str, Tensor], losses: Tensor) -> Tensor:
        """The weights v [b, K] of losses [b, K], with mean 1 along the chosen axes."""
        raw = weigh(weigher, losses.detach())
        return 1 + self.epsilon * (raw - raw.mean(AXES[self.center], keepdim=True))

    def look_ahead(
        self,
        outputs: TrainingOutputs,
        y: Tensor,
        halves: tuple[Tensor, Tensor],
        optimizer: Optimizer,
        weigher: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """The gradients of the routed loss after a trial step, with respect to the weigher.

        Args:
            outputs: the inputs of a batch, and the network.
            y: labels [b].
            halves: the rows of the trial step, and those of the routed loss.
            optimizer: whose step is tried.
            weigher: g's weights and biases.

        Returns:
            A gradient for each of `keys_of(weigher)`. The network and its gradients stay as they
            are.
        """
        train, meta = halves
        network = outputs.network
        values = dict[str, Tensor]()  # copies of g's weights that collect gradients
        for key in keys_of(weigher):
            values[key] = weigher[key].detach().requires_grad_()
        group = optimizer.param_groups[0]
        trained = [value for value in group["params"] if value.requires_grad]

        # The trial step, as a function of g: create_graph keeps its gradient differentiable.
        with other_values(network, {}):
            losses = losses_of(network(_rows(outputs, train)), y[train])
        loss = (self.weights(values, losses) * losses).mean(0).sum()
        gradients = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        ahead = dict[Tensor, Tensor]()
        for value, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                momentum = optimizer.state[value].get("momentum_buffer")
                ahead[value] = trial(value, gradient, momentum, group)

        # The loss that g learns by, with the parameters after that step.
        with other_values(network, ahead):
            loss = routed(network(_rows(outputs, meta)), y[meta], self.share)
        return list(torch.autograd.grad(loss, list(values.values())))

    def _memory(self, optimizer: Optimizer, exits: int, device: torch.device) -> State:
        """The weigher, and the moments and the step count of its Adam.

        They are in the optimizer's state of its first parameter, so that checkpoints have them.
        """
        memory: State = optimizer.state[optimizer.param_groups[0]["params"][0]]
        if "learned" not in memory:
            widths = [exits, *[self.hidden] * self.layers, exits]
            for number, (width_in, width) in enumerate(pairwise(widths), 1):
                layer = nn.Linear(width_in, width, device=device)
                memory[f"weight{number}"] = layer.weight.detach()
                memory[f"bias{number}"] = layer.bias.detach()
            for key in keys_of(memory):
                memory[f"first {key}"] = torch.zeros_like(memory[key])
                memory[f"second {key}"] = torch.zeros_like(memory[key])
            memory["learned"] = torch.zeros((), device=device)
        return memory

    def _learn(self, memory: State, gradients: Sequence[Tensor], optimizer: Optimizer) -> None:
        """A step of Adam on the weigher."""
        memory["learned"] += 1
        rate = self.meta_rate * optimizer.param_groups[0]["lr"] / self.rate
        steps = float(memory["learned"])
        for key, gradient in zip(keys_of(memory), gradients, strict=True):
            decayed = gradient + self.decay * memory[key]
            # Moments, corrected for their start at 0.
            first = memory[f"first {key}"].lerp_(decayed, 1 - MOMENTS[0])
            second = memory[f"second {key}"].lerp_(decayed.square(), 1 - MOMENTS[1])
            first = first / (1 - MOMENTS[0] ** steps)
            second = second / (1 - MOMENTS[1] ** steps)
            memory[key] -= rate * first / (second.sqrt() + 1e-8)


def weigh(weigher: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """g: losses [b, K] -> [b, K] in -1 to 1, by one hidden layer or more."""
    depth = len(keys_of(weigher)) // 2
    values = losses
    for number in range(1, depth + 1):
        # [b, hidden], at the end [b, K]
        values = values @ weigher[f"weight{number}"].T + weigher[f"bias{number}"]
        if number < depth:
            values = torch.relu(values)
    return torch.tanh(values)


def keys_of(weigher: Mapping[str, Any]) -> list[str]:
    """The names of g's weights and biases, layer by layer."""
    keys: list[str] = []
    number = 1
    while f"weight{number}" in weigher:
        keys.append(f"weight{number}")
        keys.append(f"bias{number}")
        number += 1
    return keys


def losses_of(logits: Sequence[Tensor], y: Tensor) -> Tensor:
    """Cross-entropies [b, K] of the logits [b, C] of K exits."""
    by_exit = [cross_entropy(own, y, reduction="none") for own in logits]  # K of [b]
    return torch.stack(by_exit, 1)


def trial(
    value: Tensor, gradient: Tensor, momentum: Tensor | None, group: Mapping[str, Any]
) -> Tensor:
    """The value of a parameter after a step of SGD, differentiable in its gradient.

    Args:
        value: the parameter, whose own gradient is left out.
        gradient: of the weighted loss, with a graph to the weigher.
        momentum: SGD's buffer, or None before the first step.
        group: SGD's lr, momentum and weight_decay.
    """
    step: Tensor = gradient + group["weight_decay"] * value.detach()
    if momentum is not None:
        step = group["momentum"] * momentum + step
    moved: Tensor = value.detach() - group["lr"] * step
    return moved


def routed(logits: Sequence[Tensor], y: Tensor, share: float) -> Tensor:
    """The sum over exits of the mean cross-entropy of the rows that leave there.

    A share q_k ~ share^k of the b rows leaves at exit k (rounded down). These are the rows with the
    highest confidence among those that are left. All others leave at the last exit.

    Args:
        logits: of each exit, [b, C].
        y: labels [b].
        share: the rows of an exit relative to those of the exit before.
    """
    losses = losses_of(logits, y)  # [b, K]
    is_left = torch.ones(len(y), dtype=torch.bool, device=y.device)
    powers = [share ** (index + 1) for index in range(len(logits))]
    means = list[Tensor]()
    for index, own in enumerate(logits[:-1]):
        count = math.floor(len(y) * powers[index] / sum(powers))
        if count == 0:
            continue
        # Rows that have left get -1, below every probability.
        confidence = own.detach().softmax(1).amax(1).masked_fill(~is_left, -1)  # [b]
        leaving = confidence.topk(count).indices
        is_left[leaving] = False
        means.append(losses[leaving, index].mean())
    rest = losses[is_left, -1]
    if len(rest):
        means.append(rest.mean())
    return torch.stack(means).sum()


def _rows(outputs: TrainingOutputs, rows: Tensor) -> Any:
    """Some rows of the batch's inputs, in the form that the network takes."""
    return given({name: value[rows] for name, value in outputs.inputs.items()})


@contextlib.contextmanager
def other_values(network: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside this context, parameters have other values, and batch norms learn nothing.

    torch.func.functional_call cannot do this. It splits the names of tensors at dots, and nodes
    such as `blocks.0` have dots in their names.

    Args:
        network: whose parameters are replaced.
        values: the new value of each parameter that is replaced.
    """
    # Every module's dicts, and copies of them to go back to.
    originals = list[tuple[dict[str, Any], dict[str, Any]]]()
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            originals.append((cast(dict[str, Any], tensors), dict(tensors)))
    try:
        for module in network.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter in values:
                    module._parameters[key] = cast(nn.Parameter, values[parameter])
            # A clone takes the updates of batch norms, and is dropped with them.
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.clone()
        yield
    finally:
        for tensors, before in originals:
            tensors.update(before)
