"""How a network is trained: the contract between a recipe and the one loop (fitting/).

Shapes: b rows of a batch, N rows of a data set, F pooled features, C classes.
A recipe says what is trained, in which phases and by which loss; the loop, the seed, checkpoints
and resume are fit's.
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
# the second argument: optimizer steps in the whole phase
MakeSchedule = Callable[[Optimizer, int], LRScheduler]


@runtime_checkable
class Pools(Protocol):
    """An exit whose parameters come after a pooling that has none: `exit_` gives the same for what
    its `pool` gave.

    Of the network's inputs it may read what `pool` needs, such as a mask: those are given to `pool`
    by name as a second argument, and on pooled features the exit does without them.
    """

    def pool(self, features: Tensor) -> Tensor:
        """Features [b, ...] -> [b, F]."""


def pooled_by(exit_: Exit, features: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """What an exit that pools makes of features [b, ...] and of the inputs that it reads: [b,
    F].
    """
    pool: Callable[..., Tensor] = getattr(exit_, "pool")  # noqa: B009 - nn.Module types every attribute alike
    given = {name: inputs[name] for name in exit_.reads if is_input(name)}
    return pool(features, given) if given else pool(features)


@dataclass(frozen=True)
class TrainingOutputs:
    """What a recipe looks at: the named tensors of a batch, made by a forward or taken from the
    cache.

    logits: of the exits, shallow to deep, [b, C] each. features: what stands at their nodes: in a
    phase that reads the input the tapped values [b, ...] (at a model's end its logits), in one that
    reads pooled features those [b, F].
    inputs: what went in; empty where pooled features are read. Nodes whose exits cannot pool are
    then missing.
    network: that which was looked at, for what a forward does not give: gates, what exits hand on,
    the auxiliary modules that `prepare` hung on, and steps that look again with other weights.
    teacher: the last logits [b, C] of the phase's teacher for the same inputs, without gradient, if
    it has one.
    """

    logits: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    inputs: State
    network: Network
    teacher: Tensor | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """What comes with a view: labels y [b] int64 or None, the rows' numbers [b], the phase and how
    much is done of it.

    done: the share of the phase's steps that lie behind, in [0, 1); step: their number, of `steps`
    in all.
    share: of the batch's rows in this process; what `loss` gives is weighed by it.
    """

    y: Tensor | None
    row: Tensor
    phase: str
    step: int = 0
    steps: int = 1
    share: float = 1.0

    @property
    def done(self) -> float:
        """The share of the phase's steps that lie behind."""
        return self.step / self.steps

    def labels(self) -> Tensor:
        """The labels, in a phase that needs them."""
        assert self.y is not None, "a phase with labels=False asked for labels"
        return self.y


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    parameters: those that change, of the network or of its auxiliary modules; every other one, and
    every other module's mode, stays as it is in eval mode.
    optimizer: makes one of the parameters; schedule: of an optimizer and the number of steps; None
    keeps the rate.
    reads: "input" runs the models on every batch; "pooled" reads what the exits' `pool` gives,
    computed once, and so needs parameters of such exits alone. by: how a step is made: `loss` (fit
    steps), `update` (the recipe steps), `solve` (all rows at once; epochs, optimizer and schedule
    are not used).
    rows: of a view of b rows a mask [b] of those that the phase trains on; asked once when the
    phase begins.
    still: modules that keep their eval mode although parameters in them are trained, such as batch
    norms.
    labels: whether it needs them.
    during: entered for the phase and left after it, such as hooks on modules that change the way of
    gradients.
    teacher: the name of an auxiliary module that is a network; in a phase that reads the input it
    looks at every batch as well, in fit's precision.
    clip: in a phase `by="loss"` the largest Euclidean norm of all gradients together; longer ones
    are scaled down to it before each step. None leaves them as they are.
    looks: whether the loop runs the network on each batch before `update`; without that a view has
    inputs alone, and batch norms see no more than what the recipe runs.
    continues: those of its parameters that keep what the optimizer of the phase before knows of
    them, such as momentum. That phase trained them, by an optimizer of the same kind.
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
        """A parameter that stands at several places, such as a head that is an exit too, is trained
        once.
        """
        object.__setattr__(self, "parameters", tuple(dict.fromkeys(self.parameters)))


@dataclass(frozen=True)
class FeatureTable:
    """All rows of a data set for a phase that solves: the exits by node, features [N, F] of each,
    and labels [N].

    copies: how often each row stands there, differently augmented: all rows once, then all rows
    again.
    """

    exits: Mapping[str, Exit]
    features: Mapping[str, Tensor]
    y: Tensor
    copies: int = 1


class Recipe(abc.ABC):
    """Contract of a way to train. The constructor only stores its arguments; one object may train
    many networks.


    Attributes:
        forks: whether it can train networks with forks. In those a view has the logits of every
            exit on every path, by their labels (`Topology.exit_labels`).
        trains_models: whether `fit` also takes a plain model, or a model and its preprocessing, for
            this recipe: as a network of one node, in place.
    """

    forks: ClassVar[bool] = False
    trains_models: ClassVar[bool] = False

    @abc.abstractmethod
    def phases(self, network: Network) -> Iterable[Phase]:
        """The phases, in order; asked for once, after `prepare`."""

    def prepare(self, network: Network) -> None:  # noqa: B027 - a recipe may take any network
        """Refuse what this recipe cannot train (BadNetwork), before anything is changed; hang on
        what it needs.

        What is only needed while it trains goes into `network.auxiliary`, made anew each time: fit
        has seeded torch's generator, keeps them in its checkpoints, and takes them off again.
        """

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """What a phase `by="loss"` minimises: a number, or its summands under the names of
        exits.
        """
        raise NotImplementedError

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """One step of a phase `by="update"`, with a backward of its own; returns what to report."""
        raise NotImplementedError

    def solve(
        self, phase: Phase, table: FeatureTable, development: FeatureTable | None
    ) -> Mapping[str, float]:
        """A convex phase `by="solve"` on all rows at once; sets the parameters when it is done.

        Returns figures to report, `gap/<exit>` (the relative duality gap) among them.
        """
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The arguments as plain data: a checkpoint is only continued by the recipe that began
        it.
        """
        return {key: plain(value) for key, value in vars(self).items()}


def plain(value: object) -> Any:
    """A recipe's argument as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if hasattr(value, "__qualname__"):
        told = f"{value.__module__}:{value.__qualname__}"
    else:
        told = repr(value)
    # where an object lies differs from one process to the next
    return re.sub(r" at 0x[0-9a-fA-F]+", "", told)


def trainable_exits(network: Network) -> tuple[str, ...]:
    """The exits that have something to learn. Raises BadNetwork when there is none."""
    found = tuple(
        name
        for name in network.topology.exits
        if any(True for _ in network.exit_of(name).parameters())
    )
    if not found:
        raise BadNetwork(
            "no exit of this network has parameters to train; hang some on with cut(model, "
            "exits=...)"
        )
    return found


def poolable(network: Network) -> tuple[str, ...]:
    """The exits that read nothing but pooled features, and exits that do."""
    found: list[str] = []
    for name in network.topology.exits:
        if isinstance(network.exit_of(name), Pools) and exits_read(network.exit_of(name)) <= set(
            found
        ):
            found.append(name)
    return tuple(found)


def exits_read(exit_: Exit) -> set[str]:
    """Earlier exits that an exit reads; inputs went into its pooled features."""
    return {name for name in exit_.reads if not is_input(name)}


def reading(network: Network, names: Iterable[str]) -> Literal["input", "pooled"]:
    """What a phase may read that trains these exits on a frozen backbone: pooled features, if all
    of them pool.
    """
    return "pooled" if set(names) <= set(poolable(network)) else "input"
