"""Every row weighs more at the exits where it is to leave; the weights are learned by looking a
step ahead (L2W-DEN).

Han, Pu, Lai, Wang, Song, Cao, Huang, Deng and Huang, Learning to Weight Samples for Dynamic
Early-exiting Networks, ECCV 2022, arXiv 2209.08310; formulas and figures from the authors' code.
Shapes: b rows, K exits.

A batch is halved. On one half, the losses l [b, K] go without gradient through a small network g: r
= g(l), and weights v = 1 + epsilon (r - mean of r). A trial step of SGD along sum_k mean_i v_ik
l_ik leads to other weights of the network, and there the other half is sent to exits as in use; g
learns by the loss where each row leaves. Then the real step is made with the new g; then the halves
change places. g is thrown away in the end. Where we differ: g reads losses alone, not confidences;
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

AXES = {
    "mat": (0, 1),
    "col": (1,),
    "row": (0,),
}  # means over everything, over a row's exits, over an exit's rows
MOMENTS = (0.9, 0.999)

State = dict[str, Any]


class Weighted(Recipe):
    """Models and exits together, each row weighted at each exit.

    In float32 only; a model must allow gradients of gradients.

    Args:
        epsilon: how far weights may lie from 1.
        center: mat, col or row: what weights are 1 on average over.
        share: of exit k+1 against exit k in the routing that the weights are learned for (p in q_k
            ~ p^k).
        hidden: units of each hidden layer of g.
        layers: hidden layers of g; all commands of the authors have 1.
        meta_rate: of g's Adam; it falls with the other rate.
        every: g learns in every n-th batch of an epoch, from the first on, and there on both
            halves. The authors' meta
            interval: 1 on CIFAR, 100 on ImageNet.
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
        """Raise InvalidArgument for arguments out of their range, BadNetwork where there is nothing
        to train.
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
        """Two real steps, one on each half; a batch of one row is both halves.

        Reports the plain loss of each exit, of each half before its own step.
        """
        y = batch.labels()
        network = outputs.network
        memory = self._memory(optimizer, len(network.topology.exits), y.device)
        seen = list[Tensor]()
        halves = torch.arange(len(y), device=y.device).chunk(2)
        batches = max(1, batch.steps // self.epochs)  # in an epoch
        learns = batch.step % batches % self.every == 0
        for train, meta in (halves, halves[::-1]) if len(halves) == 2 else (halves * 2,):
            if learns:
                self._learn(
                    memory, self.look_ahead(outputs, y, (train, meta), optimizer, memory), optimizer
                )
            losses = losses_of(network(_rows(outputs, train)), y[train])
            seen.append(losses.detach())
            with torch.no_grad():
                weights = self.weights(memory, losses)
            optimizer.zero_grad()
            (weights * losses).mean(0).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return dict(zip(network.topology.exits, torch.cat(seen).mean(0), strict=True))

    def weights(self, weigher: Mapping[str, Tensor], losses: Tensor) -> Tensor:
        """v [b, K] of losses [b, K]: 1 on average along the chosen axis."""
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
        """The gradients of the routed loss after a trial step, with respect to the weigher and to
        nothing else.
        """
        train, meta = halves
        network = outputs.network
        values = {key: weigher[key].detach().requires_grad_() for key in keys_of(weigher)}
        group = optimizer.param_groups[0]
        trained = [value for value in group["params"] if value.requires_grad]
        with other_values(network, {}):
            losses = losses_of(network(_rows(outputs, train)), y[train])
        loss = (self.weights(values, losses) * losses).mean(0).sum()
        ways = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        ahead = {
            value: trial(value, way, optimizer.state[value].get("momentum_buffer"), group)
            for value, way in zip(trained, ways, strict=True)
            if way is not None
        }
        with other_values(network, ahead):
            loss = routed(network(_rows(outputs, meta)), y[meta], self.share)
        return list(torch.autograd.grad(loss, list(values.values())))

    def _memory(self, optimizer: Optimizer, exits: int, device: torch.device) -> State:
        """The weigher, and its Adam's moments and count, where checkpoints have them: in the
        optimizer's own state.
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
        times = float(memory["learned"])
        for key, gradient in zip(keys_of(memory), gradients, strict=True):
            way = gradient + self.decay * memory[key]
            first = memory[f"first {key}"].lerp_(way, 1 - MOMENTS[0]) / (1 - MOMENTS[0] ** times)
            second = memory[f"second {key}"].lerp_(way.square(), 1 - MOMENTS[1]) / (
                1 - MOMENTS[1] ** times
            )
            memory[key] -= rate * first / (second.sqrt() + 1e-8)


def weigh(weigher: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """g: losses [b, K] -> [b, K] in -1 to 1, by one hidden layer or more."""
    depth = len(keys_of(weigher)) // 2
    found = losses
    for number in range(1, depth + 1):
        # [b, hidden], at the end [b, K]
        found = found @ weigher[f"weight{number}"].T + weigher[f"bias{number}"]
        found = torch.relu(found) if number < depth else torch.tanh(found)
    return found


def keys_of(weigher: Mapping[str, Any]) -> list[str]:
    """The names of g's weights and biases, layer by layer."""
    keys: list[str] = []
    while f"weight{len(keys) // 2 + 1}" in weigher:
        number = len(keys) // 2 + 1
        keys += [f"weight{number}", f"bias{number}"]
    return keys


def losses_of(logits: Sequence[Tensor], y: Tensor) -> Tensor:
    """Cross-entropies [b, K] of the logits [b, C] of K exits."""
    return torch.stack([cross_entropy(one, y, reduction="none") for one in logits], 1)


def trial(value: Tensor, way: Tensor, momentum: Tensor | None, group: Mapping[str, Any]) -> Tensor:
    """Where a step of SGD would lead a parameter, with gradient to the weigher through its own
    gradient `way`.
    """
    step: Tensor = way + group["weight_decay"] * value.detach()
    if momentum is not None:
        step = group["momentum"] * momentum + step
    led: Tensor = value.detach() - group["lr"] * step
    return led


def routed(logits: Sequence[Tensor], y: Tensor, share: float) -> Tensor:
    """The sum over exits of the mean cross-entropy of the rows that leave there.

    Of b rows the b q_k surest that are left (rounded down) leave at exit k, q_k ~ share^k; all
    others at the last.
    """
    losses = losses_of(logits, y)
    left = torch.ones(len(y), dtype=torch.bool, device=y.device)
    powers = [share ** (index + 1) for index in range(len(logits))]
    parts = list[Tensor]()
    for index, one in enumerate(logits[:-1]):
        count = math.floor(len(y) * powers[index] / sum(powers))
        sure = one.detach().softmax(1).amax(1).masked_fill(~left, -1)
        leaving = sure.topk(count).indices
        left[leaving] = False
        parts.append(losses[leaving, index])
    parts.append(losses[left, -1])
    return torch.stack([part.mean() for part in parts if len(part)]).sum()


def _rows(outputs: TrainingOutputs, rows: Tensor) -> Any:
    """Some rows of what went in, as the network takes them."""
    return given({name: value[rows] for name, value in outputs.inputs.items()})


@contextlib.contextmanager
def other_values(network: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """While it lasts, parameters have other values, and what batch norms learn is thrown away.

    torch.func.functional_call finds tensors by names between dots, and nodes such as `blocks.0`
    have dots in theirs.
    """
    kept = [
        (held, dict(held))
        for part in network.modules()
        for held in (part._parameters, part._buffers)
    ]
    try:
        for part in network.modules():
            for key, old in part._parameters.items():
                if old is not None and old in values:
                    part._parameters[key] = cast(nn.Parameter, values[old])
            for key, kept_there in part._buffers.items():
                part._buffers[key] = None if kept_there is None else kept_there.clone()
        yield
    finally:
        for held, before in kept:
            cast(dict[str, Any], held).update(before)
