"""Any recipe that trains the models, with a price on depth: for models with stages of adaptive
depth.

The price is the ponder cost of spatially adaptive computation time (Figurnov et al., 2017, arXiv
1612.02297): tau times the mean over rows and positions of N + R, summed over the stages
(layers/adaptive_depth.py). It is added to the recipe's loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.adaptive_depth import AdaptiveDepth, stages_of
from offramp.networks.network import Network
from offramp.networks.recipe import Losses, Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.recipes.distill import Distill
from offramp.recipes.joint import Joint

__all__ = ["Pondered"]


class Pondered(Recipe):
    """The loss of the recipe `inner`, and tau times the ponder cost.

    The cost acts on gradients only and is not among the reported losses. `depths` measures it. In
    fp16 its gradient is not scaled with the others, so use "no" or "bf16". A large tau leaves one
    unit everywhere, permanently. If the model is trained already, use `ramp`.

    Args:
        inner: a recipe that trains the models. The default is `Distill(hints=0.0)`, the scheme of
            SCAI with its deepest exit as the teacher, or `Joint()` for a model without exits.
        tau: the price of a unit.
        epochs: of the default recipe, if `inner` is left out.
        rate: of the default recipe, if `inner` is left out.
        ramp: the share of each phase's steps over which the price rises from 0 to tau.
    """

    def __init__(
        self,
        inner: Recipe | None = None,
        *,
        tau: float = 0.01,
        epochs: int | None = None,
        rate: float | None = None,
        ramp: float = 0.0,
    ) -> None:
        self.inner = inner
        self.tau = tau
        self.epochs = epochs
        self.rate = rate
        self.ramp = ramp
        # The share of the current batch in this process. A list, since the hooks look it up later.
        self._share = [1.0]
        self._has_exits = True

    def _inner(self) -> Recipe:
        """The recipe whose loss is minimised."""
        if self.inner is not None:
            return self.inner
        if self._has_exits:
            return Distill(hints=0.0, epochs=self.epochs, rate=self.rate)
        if self.epochs is None:
            return Joint(rate=self.rate)
        return Joint(epochs=self.epochs, rate=self.rate)

    def prepare(self, network: Network) -> None:
        """Check the arguments and the model, and prepare the inner recipe.

        Args:
            network: whose model has stages of adaptive depth.

        Raises:
            InvalidArgument: an argument is out of range, or epochs and rate come with an inner
                recipe.
            BadNetwork: no stage has adaptive depth, or the inner recipe refuses the network.
        """
        require("tau", self.tau, low=0)
        require("ramp", self.ramp, low=0, high=1)
        if self.inner is not None and (self.epochs, self.rate) != (None, None):
            raise InvalidArgument(
                "epochs and rate must be given to the inner recipe, got them besides one"
            )
        if not stages_of(network.backbone):
            raise BadNetwork(
                "No stage of this network has adaptive depth and parameters for it. Use the inner "
                "recipe alone."
            )
        self._has_exits = any(True for _ in network.exits.parameters())
        self._inner().prepare(network)

    def phases(self, network: Network) -> list[Phase]:
        """The phases of the inner recipe, with the price.

        Args:
            network: whose model has stages of adaptive depth.

        Raises:
            BadNetwork: none of the phases trains the parameters that decide when a stage halts.
        """
        phases = list(self._inner().phases(network))
        halting = set[int]()  # ids, because == of tensors compares elementwise
        for stage in stages_of(network.backbone).values():
            halting.update(map(id, stage.halts.parameters()))
        trained = set[int]()
        for phase in phases:
            trained.update(map(id, phase.parameters))
        if not trained & halting:
            raise BadNetwork("The inner recipe must train the models. Give it backbone=True.")
        return [replace(phase, during=self._priced(network, phase.during)) for phase in phases]

    def _priced(
        self, network: Network, during: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """The context of a phase, with the price added."""

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            with during(), priced(network.backbone, self.tau, self._share):
                yield

        return entered

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """The loss of the inner recipe."""
        self._share[0] = batch.share * self._price_share(batch)
        return self._inner().loss(outputs, batch)

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """A step of the inner recipe."""
        self._share[0] = self._price_share(batch)
        return self._inner().update(outputs, batch, optimizer)

    def _price_share(self, batch: TrainingBatch) -> float:
        """The share of the price that counts at this step."""
        if not self.ramp:
            return 1.0
        return min(1.0, batch.done / self.ramp)

    def config(self) -> dict[str, Any]:
        """tau, ramp unless it is 0, and the inner recipe with its own arguments."""
        inner = self._inner()
        config: dict[str, Any] = {"tau": self.tau}
        if self.ramp:
            config["ramp"] = self.ramp
        config["inner"] = {"name": type(inner).__name__, **inner.config()}
        return config


@contextlib.contextmanager
def priced(model: nn.Module, tau: float, share: Sequence[float] = (1.0,)) -> Iterator[None]:
    """Inside this context, the outputs of stages carry the gradient of tau times their mean cost.

    Args:
        model: with stages of adaptive depth.
        tau: the price of a unit.
        share: the weight of this process's mean. The backward looks it up.
    """
    handles = list[torch.utils.hooks.RemovableHandle]()
    try:
        for stage in stages_of(model).values():
            handles += _hooked(stage, tau, share)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooked(
    stage: AdaptiveDepth, tau: float, share: Sequence[float]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Add the price to a stage, by two hooks."""
    costs: list[Tensor] = []  # of the current forward

    def record(_module: nn.Module, _inputs: Any, cost: Tensor) -> None:
        costs.append(cost)

    def attach(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        cost = costs.pop()
        if not cost.requires_grad:
            return output
        mean = tau * cost.mean()
        carrying: Tensor = _Carrying.apply(output, mean, share)  # type: ignore[no-untyped-call]
        return carrying

    # `ponder` runs inside the stage, so its hook comes first.
    return [stage.ponder.register_forward_hook(record), stage.register_forward_hook(attach)]


class _Carrying(torch.autograd.Function):
    """Return a value unchanged. In the backward the cost gets the gradient `share`, as if it were
    a term of the loss.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, cost: Tensor, share: Sequence[float]) -> Tensor:
        ctx.share = share
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient.new_full((), ctx.share[0]), None
