"""All exits at once, by a weighted sum of their cross-entropies (BranchyNet).

Teerapittayanon, McDanel and Kung, 2016, arXiv 1709.01686. As in the authors' code, the loss of an
exit is the plain cross-entropy and every weight is 1. The paper prints another factor 1/C, and
reports +1 % for (1.0, 0.3) on two exits. There are two phases, as in the code: the model alone
(`alone` epochs; 0 if it is trained already), then all exits from those weights. Adam's moments of
the trunk carry over into the second phase. The last exit's own layer starts anew there, because the
code has a copy of it for each phase.
Where we differ: the loss is one sum, while the code steps the trunk and each exit's copy
separately; the result is the same. Torch's Adam adds its 1e-8 after it corrects the second moment,
Chainer's before. optimizer="sgd" is the training of MSDNet (Huang et al., 2017, arXiv 1703.09844)
as in the PyTorch port, whose loss is the same sum; the authors' Lua code uses Nesterov momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.network import Network, last_model
from offramp.networks.recipe import (
    Losses,
    MakeOptimizer,
    MakeSchedule,
    Phase,
    Recipe,
    TrainingBatch,
    TrainingOutputs,
    trainable_exits,
)
from offramp.recipes._equilibrium import equilibrium, require_one_model
from offramp.recipes._schedules import cosine, dropped
from offramp.recipes._together import last_layer, soft_cross_entropy

__all__ = ["Joint"]

NORMS = ("moving", "frozen")
RATES = {"adam": 1e-3, "sgd": 0.1}
ALONE = "models alone"
BEFORE = "before"
HEAD = "head"  # the auxiliary module with the last layer as it was when the run began


class Joint(Recipe):
    """Models and exits together: the sum of weighted cross-entropies.

    Args:
        weights: one for all exits, one per exit from shallow to deep, or by name.
        epochs: of all exits together.
        alone: epochs of the models alone, before.
        rate: by default 1e-3 with Adam and 0.1 with SGD.
        optimizer: "adam", or "sgd" with momentum 0.9 and weight decay 1e-4.
        betas: of Adam.
        decay: let the rate fall to 0 over each phase along a cosine (Loshchilov and Hutter, 2017,
            arXiv 1608.03983). BranchyNet's authors keep the rate, over many more epochs.
        falls: for "sgd", the shares of each phase after which the rate falls tenfold. With `decay`
            they have no effect. MSDNet's are 1/2 and 3/4 on CIFAR, and 1/3 and 2/3 on ImageNet (90
            epochs).
        norm: "moving" trains the models' batch norms and lets them follow the batches; "frozen"
            keeps them as they are.
        backbone: False trains the exits alone and leaves the models as they are.
        equilibrium: average the gradients of the exits behind each cut instead of summing them (Li
            et al., 2019, arXiv 1908.06294; recipes/_equilibrium.py).
        keep: the share of each exit's loss that comes from the last model's earlier outputs instead
            of the label: (1 - keep) CE(z, y) + keep T^2 CE(z / T, before / T), with T the
            temperature (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531; for a model's own
            earlier outputs Li and Hoiem, 2016, arXiv 1606.09282). keep=1 needs no labels. Use it
            for trained models, which otherwise lose accuracy. It costs one more forward of the last
            model per step.
        temperature: T.
        keep_head: whether a cut model's last layer keeps the weights from the epochs alone. In the
            authors' code it does not; see above.
    """

    forks = True  # every exit on every path

    def __init__(
        self,
        weights: float | Sequence[float] | Mapping[str, float] = 1.0,
        *,
        epochs: int = 10,
        alone: int = 0,
        rate: float | None = None,
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        decay: bool = False,
        falls: Sequence[float] = (1 / 2, 3 / 4),
        norm: str = "moving",
        backbone: bool = True,
        equilibrium: bool = False,
        keep: float = 0.0,
        temperature: float = 4.0,
        keep_head: bool = False,
    ) -> None:
        self.weights = weights
        self.epochs = epochs
        self.alone = alone
        self.rate = RATES.get(optimizer, 0.0) if rate is None else rate
        self.optimizer = optimizer
        self.betas = betas
        self.decay = decay
        self.falls = falls
        self.norm = norm
        self.backbone = backbone
        self.equilibrium = equilibrium
        self.keep = keep
        self.temperature = temperature
        self.keep_head = keep_head

    def prepare(self, network: Network) -> None:
        """Check the arguments against the network, and keep copies of what the loss needs.

        Args:
            network: to be trained.

        Raises:
            InvalidArgument: an argument is out of range, or the weights do not fit the exits.
            BadNetwork: there is nothing to train, or the network has the wrong kind.
        """
        self._check(network)
        # The copies are made before training begins: the last model as the teacher, and the last
        # layer as it goes into the second phase.
        network.auxiliary = {}
        if self.keep:
            network.auxiliary[BEFORE] = last_model(network, copied=True)
        head = self._dropped_head(network)
        if head is not None:
            network.auxiliary[HEAD] = copy.deepcopy(head)

    def _check(self, network: Network) -> None:
        """Raise InvalidArgument or BadNetwork as `prepare` says."""
        if self.norm not in NORMS:
            raise InvalidArgument(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.optimizer not in RATES:
            raise InvalidArgument(
                f"optimizer must be one of {', '.join(RATES)}, got {self.optimizer!r}"
            )
        if not self.backbone:
            trainable_exits(network)
        elif next(network.backbone.parameters(), None) is None:
            raise BadNetwork(
                "This network's models have no parameters. Train the exits alone: backbone=False"
            )
        weights_of(self.weights, network.topology.exit_labels)
        if self.keep or self.alone:
            network.topology.require_chain("joint with keep or alone")
        if self.equilibrium:
            require_one_model(network, "equilibrium=True")
        require("keep", self.keep, low=0, high=1)
        require("temperature", self.temperature, above=0)
        if self.keep and self.alone:
            raise InvalidArgument(
                f"alone must be 0 where keep is above 0, got {self.alone}. The outputs of "
                "untrained models are not worth keeping"
            )
        for share in self.falls:
            require("each of falls", share, low=0, high=1)

    def _dropped_head(self, network: Network) -> nn.Module | None:
        """The layer of a cut model that starts anew after the epochs alone, or None."""
        if not self.alone or not self.backbone or self.keep_head or len(network.members) > 1:
            return None
        return last_layer(network)

    def phases(self, network: Network) -> list[Phase]:
        """The models alone, if asked for, then everything."""
        still: tuple[nn.Module, ...] = ()
        if self.norm == "frozen":
            still = norms_of(network.backbone)
        models: tuple[nn.Parameter, ...] = ()
        if self.backbone:
            models = _without(network.backbone.parameters(), still)
        optimizer, schedule = self._stepping()

        # The models alone. When this phase ends, the last layer gets its first weights back, so
        # the optimizer's state of that layer does not carry over into the second phase.
        phases = list[Phase]()
        continued: tuple[nn.Parameter, ...] = ()
        if self.alone and models:
            head = self._dropped_head(network)
            ending: Callable[[], AbstractContextManager[None]]
            if head is None:
                ending = nullcontext
                continued = models
            else:
                ending = partial(_started_anew, head, network)
                continued = _without(models, (head,))
            phases.append(
                Phase(ALONE, models, self.alone, optimizer, schedule, still=still, during=ending)
            )

        # Models and exits together.
        during: Callable[[], AbstractContextManager[None]] = nullcontext
        if self.equilibrium:
            during = partial(equilibrium, network)
        teacher = None
        if self.keep:
            teacher = BEFORE
        phases.append(
            Phase(
                "joint",
                (*models, *network.exits.parameters()),
                self.epochs,
                optimizer,
                schedule,
                still=still,
                labels=self.keep < 1,
                during=during,
                teacher=teacher,
                continues=continued,
            )
        )
        return phases

    def _stepping(self) -> tuple[MakeOptimizer, MakeSchedule | None]:
        """The optimizer, and how its rate falls over a phase."""
        optimizer: MakeOptimizer
        schedule: MakeSchedule | None
        if self.optimizer == "adam":
            optimizer = partial(torch.optim.Adam, lr=self.rate, betas=self.betas)
            schedule = None
        else:
            optimizer = partial(torch.optim.SGD, lr=self.rate, momentum=0.9, weight_decay=1e-4)
            schedule = dropped(*self.falls)
        if self.decay:
            schedule = cosine
        return optimizer, schedule

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Weighted cross-entropy by exit."""
        losses = dict[str, Tensor]()
        if batch.phase == ALONE:
            # No exits yet: the loss is that of each model's own last output.
            for member in outputs.network.members:
                name = member.nodes()[-1]
                losses[name] = cross_entropy(outputs.logits[name], batch.labels())
            return losses
        weights = weights_of(self.weights, tuple(outputs.logits))
        for name, logits in outputs.logits.items():
            losses[name] = weights[name] * self._exit_loss(logits, outputs, batch)
        return losses

    def _exit_loss(self, logits: Tensor, outputs: TrainingOutputs, batch: TrainingBatch) -> Tensor:
        """The loss of an exit's logits [b, C], by labels and by the models' earlier outputs."""
        terms = list[Tensor]()
        if self.keep < 1:
            terms.append((1 - self.keep) * cross_entropy(logits, batch.labels()))
        if outputs.teacher is not None:
            # T^2 keeps the size of the gradient, which falls with 1 / T^2.
            soft = soft_cross_entropy(logits, outputs.teacher, self.temperature)
            terms.append(self.keep * self.temperature**2 * soft)
        return torch.stack(terms).sum()


@contextmanager
def _started_anew(head: nn.Module, network: Network) -> Iterator[None]:
    """Give a layer its first weights back when the phase ends.

    If the run stops inside the phase, the layer stays as it is.
    """
    yield
    head.load_state_dict(network.auxiliary[HEAD].state_dict())


def weights_of(
    weights: float | Sequence[float] | Mapping[str, float], exits: Sequence[str]
) -> dict[str, float]:
    """A weight for every exit.

    Args:
        weights: one for all exits, one per exit from shallow to deep, or by name.
        exits: the names of the exits, from shallow to deep.

    Returns:
        The weights by name, in the order of `exits`.

    Raises:
        InvalidArgument: there are too few or too many weights, or one is not a number of at least
            0.
    """
    by_name: Mapping[str, float]
    if isinstance(weights, Mapping):
        by_name = weights
    elif isinstance(weights, (int, float)):
        by_name = dict.fromkeys(exits, weights)
    elif len(weights) == len(exits):
        by_name = dict(zip(exits, weights, strict=True))
    else:
        by_name = {}  # refused below, since no exit has a weight
    is_complete = set(by_name) == set(exits)
    if not is_complete or not all(map(_is_weight, by_name.values())):
        raise InvalidArgument(
            f"weights must be a number of at least 0 for each of {', '.join(exits)}, got "
            f"{weights!r}"
        )
    return {name: float(by_name[name]) for name in exits}


def _is_weight(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return isinstance(value, (int, float)) and 0 <= value < float("inf")


def norms_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The batch norms in a module."""
    return tuple(part for part in module.modules() if isinstance(part, _BatchNorm))


def _without(
    parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module]
) -> tuple[nn.Parameter, ...]:
    """The parameters that are in none of these modules."""
    left_out = set[int]()  # ids, because == of tensors compares elementwise
    for module in modules:
        left_out.update(map(id, module.parameters()))
    return tuple(value for value in parameters if id(value) not in left_out)
