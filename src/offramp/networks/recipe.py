"""The contract between a recipe and the training loop (fitting/).

A recipe decides what is trained, in which phases, and by which loss. `fit` has the loop, the seed,
checkpoints and resuming. Shapes: b rows of a batch, N rows of a data set, F pooled features, C
classes.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.networks.network import Network
from offramp.networks.nodes import Exit
from offramp.plans.signature import is_input

Losses = Tensor | Mapping[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
# (optimizer, its steps in the whole phase) -> scheduler
MakeSchedule = Callable[[Optimizer, int], LRScheduler]


@runtime_checkable
class Pools(Protocol):
    """An exit that first pools its features, without parameters.

    It gives the same logits for features and for the result of its `pool`. So pooled features are
    computed once while the backbone is frozen. The exit may read inputs that `pool` needs, such as
    a mask. `pool` gets them by name as a second argument, and the exit does not need them for
    pooled features.
    """

    def pool(self, features: Tensor) -> Tensor:
        """Features [b, ...] -> [b, F]."""


def pooled_by(exit_: Exit, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Pool features for an exit.

    Args:
        exit_: an exit that `Pools`.
        features: [b, ...].
        inputs: by name; those that the exit reads are passed to its `pool`.

    Returns:
        [b, F].
    """
    # getattr, because nn.Module declares all attributes as tensors or modules.
    pool: Callable[..., Tensor] = getattr(exit_, "pool")  # noqa: B009
    read = {name: inputs[name] for name in exit_.reads if is_input(name)}
    if not read:
        return pool(features)
    return pool(features, read)


@dataclass(frozen=True)
class TrainingOutputs:
    """The outputs of a network for a batch, from a forward pass or from cached features.

    Attributes:
        logits: of the exits, shallow to deep, [b, C] each.
        features: at their nodes: the tapped values [b, ...] (the logits at a model's end) in a
            phase that reads the input, and [b, F] in one that reads pooled features.
        inputs: of the network; empty in a phase that reads pooled features. Such a phase lacks the
            nodes whose exits cannot pool.
        network: for everything else: gates, what exits hand on, the auxiliary modules that
            `prepare` added, and further forward passes with other weights.
        teacher: the last logits [b, C] of the phase's teacher for the same inputs, without
            gradient; None without a teacher.
    """

    logits: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    inputs: State
    network: Network
    teacher: Tensor | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """The labels of a batch, and where it is in the training.

    Attributes:
        y: labels, int64 [b]; None in a phase without labels.
        row: numbers of the rows, [b].
        phase: its name.
        step: number of steps of the phase before this one.
        steps: number of all steps of the phase.
        share: of the batch's rows, those in this process; the result of `loss` is weighted by it.
    """

    y: Tensor | None
    row: Tensor
    phase: str
    step: int = 0
    steps: int = 1
    share: float = 1.0

    @property
    def done(self) -> float:
        """The share of the phase's steps before this one, in [0, 1)."""
        return self.step / self.steps

    def labels(self) -> Tensor:
        """The labels, in a phase that needs them."""
        assert self.y is not None, "a phase with labels=False asked for labels"
        return self.y


@dataclass(frozen=True)
class Phase:
    """A part of the training, with its own parameters and optimizer.

    Attributes:
        name: of the phase.
        parameters: those that change, of the network or of its auxiliary modules. All others stay
            as they are, and their modules stay in eval mode.
        epochs: passes over the rows.
        optimizer: makes an optimizer of the parameters.
        schedule: makes a scheduler of the optimizer and the number of steps; None keeps the rate.
        reads: "input" runs the models on every batch. "pooled" reads the results of the exits'
            `pool`, computed once, so only parameters of such exits can be trained.
        by: who makes a step: `loss` (fit), `update` (the recipe), or `solve` (the recipe, with all
            rows at once and without epochs, optimizer and schedule).
        rows: from the outputs for b rows, a mask [b] of those to train on; called once when the
            phase begins.
        still: modules that stay in eval mode although parameters in them are trained, such as batch
            norms.
        labels: whether the phase needs labels.
        during: a context that is open during the phase, such as hooks that change gradients.
        teacher: the name of an auxiliary module that is a network. In a phase that reads the input,
            it also runs on every batch, in fit's precision.
        clip: with `by="loss"`, the largest Euclidean norm of all gradients together. Longer ones
            are scaled down to it before each step. None leaves them as they are.
        looks: whether the loop runs the network on each batch before `update`. Otherwise the
            outputs only have inputs, and batch norms only see what the recipe runs.
        continues: parameters that keep their state in the optimizer of the phase before, such as
            momentum. That phase must have trained them, with an optimizer of the same kind.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    epochs: int = 1
    optimizer: MakeOptimizer = torch.optim.Adam
    schedule: MakeSchedule | None = None
    reads: Literal["input", "pooled"] = "input"
    by: Literal["loss", "update", "solve"] = "loss"
    rows: Callable[[TrainingOutputs, TrainingBatch], Tensor] | None = None
    still: tuple[nn.Module, ...] = ()
    labels: bool = True
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    teacher: str | None = None
    clip: float | None = None
    looks: bool = True
    continues: tuple[nn.Parameter, ...] = ()

    def __post_init__(self) -> None:
        """Train a parameter once, also if it is in several places, such as a head and an exit."""
        object.__setattr__(self, "parameters", tuple(dict.fromkeys(self.parameters)))


@dataclass(frozen=True)
class FeatureTable:
    """All rows of a data set, for a phase by `solve`.

    Attributes:
        exits: by node.
        features: of each exit, [N, F].
        y: labels, [N].
        copies: how often each row is there, with different augmentation: first all rows, then all
            rows again, and so on.
    """

    exits: Mapping[str, Exit]
    features: Mapping[str, Tensor]
    y: Tensor
    copies: int = 1


class Recipe(abc.ABC):
    """Contract of a way to train.

    The constructor only stores its arguments, and one object may train many networks.

    Attributes:
        forks: whether it can train networks with forks. For those the outputs have the logits of
            every exit on every path, by their labels (`Topology.exit_labels`).
        trains_models: whether `fit` with this recipe also takes a plain model, or a model and its
            preprocessing. It is trained in place, as a network of one node.
    """

    forks: ClassVar[bool] = False
    trains_models: ClassVar[bool] = False

    @abc.abstractmethod
    def phases(self, network: Network) -> Iterable[Phase]:
        """The phases, in order. It is called once, after `prepare`."""

    def prepare(self, network: Network) -> None:  # noqa: B027 - a recipe may take any network
        """Check that the recipe can train this network, and add the modules that it needs.

        Modules that are only needed during training go into `network.auxiliary` and are made anew
        each time. fit seeds torch's generator before, keeps them in its checkpoints, and removes
        them at the end.

        Raises:
            BadNetwork: the recipe cannot train it; nothing was changed.
        """

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of a phase `by="loss"`: a scalar, or its summands by exit."""
        raise NotImplementedError

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """Make a step of a phase `by="update"`, with its backward; the losses are only reported."""
        raise NotImplementedError

    def solve(
        self, phase: Phase, table: FeatureTable, development: FeatureTable | None
    ) -> Mapping[str, float]:
        """Solve a convex phase `by="solve"` on all rows at once, and set the parameters.

        Args:
            phase: to solve.
            table: the rows to train on.
            development: rows that are held out from training; None without.

        Returns:
            Figures to report, among them `gap/<exit>`, the relative duality gap.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments as plain data. A checkpoint is only continued with the same ones."""
        return {key: plain(value) for key, value in vars(self).items()}


def plain(value: object) -> Any:
    """Turn a recipe's argument into data that JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    # A function or class is identified by where it is defined.
    if hasattr(value, "__qualname__"):
        text = f"{value.__module__}:{value.__qualname__}"
    else:
        text = repr(value)
    # The address of an object differs from one process to the next.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def trainable_exits(network: Network) -> tuple[str, ...]:
    """The exits with parameters, in order. Raises BadNetwork if there are none."""
    names = list[str]()
    for name in network.topology.exits:
        if list(network.exit_of(name).parameters()):
            names.append(name)
    if not names:
        raise BadNetwork(
            "none of the exits has parameters to train. Add exits with cut(model, exits=...)."
        )
    return tuple(names)


def poolable(network: Network) -> tuple[str, ...]:
    """The exits that can be trained on pooled features.

    They pool, and all earlier exits that they read do as well.
    """
    names: list[str] = []
    # In order, so that the exits that an exit reads are known before it.
    for name in network.topology.exits:
        exit_ = network.exit_of(name)
        if isinstance(exit_, Pools) and exits_read(exit_) <= set(names):
            names.append(name)
    return tuple(names)


def exits_read(exit_: Exit) -> set[str]:
    """The earlier exits that an exit reads, without inputs."""
    return {name for name in exit_.reads if not is_input(name)}


def reading(network: Network, names: Iterable[str]) -> Literal["input", "pooled"]:
    """Choose what a phase reads that trains some exits on a frozen backbone.

    Args:
        network: with these exits.
        names: of the exits.

    Returns:
        "pooled" if all of them can be trained on pooled features, otherwise "input".
    """
    if set(names) <= set(poolable(network)):
        return "pooled"
    return "input"
