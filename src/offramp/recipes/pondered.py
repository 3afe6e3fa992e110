"""Any recipe that trains the models, with a price on depth: for models with stages of adaptive
depth.

The ponder cost of spatially adaptive computation time (Figurnov et al., 2017, arXiv 1612.02297):
tau times the mean over rows and positions of N + R, summed over the stages
(layers/adaptive_depth.py), is added to what is minimised.
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
    """What the recipe `inner` minimises, and tau times the ponder cost.

    inner: by default `Distill(hints=0.0)`, the scheme of SCAI with its deepest exit as the teacher;
    of a model without exits `Joint()`, its cross-entropy. `epochs` and `rate` are then its own. The
    cost shows in gradients alone, not among the losses that are reported: `depths` tells what it
    came to. Its gradient is not scaled with others in fp16, so take "no" or "bf16". Large tau
    leaves one unit everywhere, for good: from a trained model let it rise over the first part of
    each phase.

    Args:
        inner: see above.
        tau: the price of a unit.
        epochs: of the recipe `inner`, where it is left out.
        rate: likewise.
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
        self._share = [1.0]  # of the batch that is under way, where several processes have it
        self._has_exits = True

    def _inner(self) -> Recipe:
        if self.inner is not None:
            return self.inner
        if self._has_exits:
            return Distill(hints=0.0, epochs=self.epochs, rate=self.rate)
        if self.epochs is None:
            return Joint(rate=self.rate)
        return Joint(epochs=self.epochs, rate=self.rate)

    def prepare(self, network: Network) -> None:
        """Raise InvalidArgument for bad arguments, BadNetwork without stages of adaptive depth;
        then as the recipe.
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
        """Those of the recipe. Raises BadNetwork where none of them trains a stage when to halt."""
        phases = [*self._inner().phases(network)]
        stages = stages_of(network.backbone).values()
        halting = {id(value) for stage in stages for value in stage.halts.parameters()}
        if not any(id(value) in halting for phase in phases for value in phase.parameters):
            raise BadNetwork("The inner recipe must train the models. Give it backbone=True.")
        return [replace(phase, during=self._priced(network, phase.during)) for phase in phases]

    def _priced(
        self, network: Network, during: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> Callable[[], contextlib.AbstractContextManager[None]]:
        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            with during(), priced(network.backbone, self.tau, self._share):
                yield

        return entered

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Losses:
        """That of the recipe."""
        self._share[0] = batch.share * self._risen(batch)
        return self._inner().loss(outputs, batch)

    def update(
        self, outputs: TrainingOutputs, batch: TrainingBatch, optimizer: Optimizer
    ) -> Losses:
        """That of the recipe."""
        self._share[0] = self._risen(batch)
        return self._inner().update(outputs, batch, optimizer)

    def _risen(self, batch: TrainingBatch) -> float:
        """How much of the price counts by now."""
        return min(1.0, batch.done / self.ramp) if self.ramp else 1.0

    def config(self) -> dict[str, Any]:
        """tau, and the recipe with its own arguments."""
        inner = self._inner()
        config = {"tau": self.tau} | ({"ramp": self.ramp} if self.ramp else {})
        return config | {"inner": {"name": type(inner).__name__, **inner.config()}}


@contextlib.contextmanager
def priced(model: nn.Module, tau: float, share: Sequence[float] = (1.0,)) -> Iterator[None]:
    """While it lasts, what a stage of adaptive depth gives carries the gradient of tau times its
    mean cost.

    share: the weight of this process's mean, looked up in the backward.
    """
    handles = []
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
    costs: list[Tensor] = []  # of the forward that is under way

    def heard(_module: nn.Module, _inputs: Any, cost: Tensor) -> None:
        costs.append(cost)

    def attached(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        cost = costs.pop()
        if not cost.requires_grad:
            return output
        carrying: Tensor = _Carrying.apply(output, tau * cost.mean(), share)  # type: ignore[no-untyped-call]
        return carrying

    return [stage.ponder.register_forward_hook(heard), stage.register_forward_hook(attached)]


class _Carrying(torch.autograd.Function):
    """The value as it is; in the backward the cost gets the gradient that a summand of the loss
    would.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, cost: Tensor, share: Sequence[float]) -> Tensor:
        ctx.share = share
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient.new_full((), ctx.share[0]), None
