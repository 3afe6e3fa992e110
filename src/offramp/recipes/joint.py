"""All exits at once, by a weighted sum of their cross-entropies (BranchyNet).

Teerapittayanon, McDanel and Kung, 2016, arXiv 1709.01686. As in the authors' code the loss of an
exit is the plain cross-entropy, and every weight is 1; the paper prints another 1/C, and reports +1
% for (1.0, 0.3) on two exits. Two phases as there: the model alone (`alone` epochs; 0 where it is
trained), then all exits from those weights. What Adam knows of the trunk goes on through both; the
last exit's own layer starts anew in the second, as the code has a copy of it for each phase.
Where we differ: one summed loss, where the code steps the trunk and each exit's own copy apart,
which comes to the same; and torch's Adam adds its 1e-8 after it has corrected the second moment,
Chainer's before. optimizer="sgd" is the training of MSDNet (Huang et al., 2017, arXiv 1703.09844)
as the PyTorch port has it, whose loss is the same sum; the authors' Lua code takes Nesterov's
momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
HEAD = "head"  # the auxiliary module that holds the last layer as it was when the run began


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
            arXiv 1608.03983). BranchyNet's authors keep it, over many more epochs.
        falls: of "sgd", the shares of each phase after which the rate falls tenfold, unless `decay`
            asks for the cosine. MSDNet's are 1/2 and 3/4 on CIFAR, and 1/3 and 2/3 on ImageNet (90
            epochs).
        norm: "moving" lets batch norms of the models learn and follow the batches, "frozen" keeps
            them as they are.
        backbone: False trains the exits alone, and the models stay as they are.
        equilibrium: average the gradients of the exits behind each cut instead of summing them (Li
            et al., 2019, arXiv 1908.06294; recipes/_equilibrium.py).
        keep: how much of each exit's loss comes from what the last model answered before it was
            trained on, instead of from the label: (1 - keep) CE(z, y) + keep T^2 CE(z / T, before /
            T), T the temperature (Hinton, Vinyals and Dean, 2015, arXiv 1503.02531; for a model's
            own earlier answers Li and Hoiem, 2016, arXiv 1606.09282). keep=1 needs no labels. Meant
            for trained models, which otherwise lose accuracy of their own; costs a forward of the
            last one more per step.
        temperature: T.
        keep_head: whether a cut model's last layer keeps what it learned in the epochs alone. In
            the authors' code it does not; see above.
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
        """Raise InvalidArgument for weights that do not fit, BadNetwork where there is nothing to
        train.
        """
        if self.norm not in NORMS:
            raise InvalidArgument(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.optimizer not in RATES:
            raise InvalidArgument(
                f"optimizer must be one of {', '.join(RATES)}, got {self.optimizer!r}"
            )
        if not self.backbone:
            trainable_exits(network)
        elif not any(True for _ in network.backbone.parameters()):
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
                f"alone must be 0 where keep is above 0, got {self.alone}: the outputs of "
                f"untrained models are not "
                "worth keeping"
            )
        for share in self.falls:
            require("each of falls", share, low=0, high=1)
        if self.keep:
            network.auxiliary = {BEFORE: last_model(network, copied=True)}
        else:
            network.auxiliary = {}
        head = self._dropped_head(network)
        if head is not None:
            network.auxiliary[HEAD] = copy.deepcopy(head)

    def _dropped_head(self, network: Network) -> nn.Module | None:
        """The layer of a cut model that starts anew when the epochs alone are over."""
        if not self.alone or not self.backbone or self.keep_head or len(network.members) > 1:
            return None
        return last_layer(network)

    def phases(self, network: Network) -> list[Phase]:
        """The models alone, if asked for, then everything."""
        models = tuple(network.backbone.parameters()) if self.backbone else ()
        still = norms_of(network.backbone) if self.norm == "frozen" else ()
        frozen = {id(value) for norm in still for value in norm.parameters()}
        models = tuple(value for value in models if id(value) not in frozen)
        step, schedule = self._stepping()
        first = list[Phase]()
        known: tuple[nn.Parameter, ...] = ()
        if self.alone and models:
            head = self._dropped_head(network)
            ending: Callable[[], AbstractContextManager[None]]
            if head is None:
                ending = nullcontext
            else:
                ending = partial(_started_anew, head, network)
            first = [Phase(ALONE, models, self.alone, step, schedule, still=still, during=ending)]
            anew = () if head is None else tuple(head.parameters())
            known = tuple(value for value in models if all(value is not other for other in anew))
        during = partial(equilibrium, network) if self.equilibrium else nullcontext
        every = (*models, *network.exits.parameters())
        teacher = BEFORE if self.keep else None
        joint = Phase(
            "joint",
            every,
            self.epochs,
            step,
            schedule,
            still=still,
            labels=self.keep < 1,
            during=during,
            teacher=teacher,
            continues=known,
        )
        return [*first, joint]

    def _stepping(self) -> tuple[MakeOptimizer, MakeSchedule | None]:
        """The optimizer, and how its rate falls over a phase."""
        if self.optimizer == "adam":
            return partial(
                torch.optim.Adam, lr=self.rate, betas=self.betas
            ), cosine if self.decay else None
        sgd = partial(torch.optim.SGD, lr=self.rate, momentum=0.9, weight_decay=1e-4)
        return sgd, cosine if self.decay else dropped(*self.falls)

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """Weighted cross-entropy by exit."""
        if batch.phase == ALONE:
            ends = [member.nodes()[-1] for member in outputs.network.members]
            return {name: cross_entropy(outputs.logits[name], batch.labels()) for name in ends}
        weights = weights_of(self.weights, tuple(outputs.logits))
        return {
            name: weights[name] * self._by_both(logits, outputs, batch)
            for name, logits in outputs.logits.items()
        }

    def _by_both(self, logits: Tensor, outputs: TrainingOutputs, batch: TrainingBatch) -> Tensor:
        """The loss of an exit by labels and by what the models answered before."""
        parts = list[Tensor]()
        if self.keep < 1:
            parts.append((1 - self.keep) * cross_entropy(logits, batch.labels()))
        if outputs.teacher is not None:
            soft = soft_cross_entropy(logits, outputs.teacher, self.temperature)
            parts.append(self.keep * self.temperature**2 * soft)
        return torch.stack(parts).sum()


@contextmanager
def _started_anew(head: nn.Module, network: Network) -> Iterator[None]:
    """A phase at whose end a layer gets back the weights that it had when the run began; not where
    the run stops.
    """
    yield
    head.load_state_dict(network.auxiliary[HEAD].state_dict())


def weights_of(
    weights: float | Sequence[float] | Mapping[str, float], exits: Sequence[str]
) -> dict[str, float]:
    """A weight for every exit. Raises InvalidArgument for too few, too many, or negative ones."""
    if isinstance(weights, Mapping):
        found = dict(weights)
    else:
        if isinstance(weights, (int, float)):
            each = [weights] * len(exits)
        else:
            each = list(weights)
        found = dict(zip(exits, each, strict=False)) if len(each) == len(exits) else {}
    numbers = all(
        isinstance(each, (int, float)) and 0 <= each < float("inf") for each in found.values()
    )
    if set(found) != set(exits) or not numbers:
        raise InvalidArgument(
            f"weights must be a number of at least 0 for each of {', '.join(exits)}, got "
            f"{weights!r}"
        )
    return {name: float(found[name]) for name in exits}


def norms_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The batch norms in a module."""
    return tuple(part for part in module.modules() if isinstance(part, _BatchNorm))
