"""A batch norm with statistics and weights of its own for every route: one model, run at several
resolutions.

DRNet (Zhu et al., 2021, arXiv 2106.02898) has one batch norm for each resolution, and shares the
convolutions. There is no switch to turn: `route_of` gives the model as one route sees it, a module
of its own that shares all other parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.layer import Layer, LayerCost, dense_cost

__all__ = ["SwitchableNorm", "route_of", "with_switchable_norms"]


class SwitchableNorm(Layer):
    """Batch norms, one for each route; called itself it is that of the last route.

    Args:
        norms: of the routes, in order.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    @classmethod
    def from_layer(cls, dense: nn.Module, *, routes: int = 2) -> SwitchableNorm:
        """So many copies of a batch norm.

        Args:
            dense: the batch norm.
            routes: how many.

        Returns:
            A layer that starts by giving what `dense` gives, on every route.

        Raises:
            BadNetwork: it is no batch norm.
            InvalidArgument: there are no routes.
        """
        if not isinstance(dense, _BatchNorm):
            raise BadNetwork(
                f"a switchable norm must be made of a batch norm, got a {type(dense).__name__}"
            )
        if routes < 1:
            raise InvalidArgument(f"routes must be at least 1, got {routes}")
        made = cls([copy.deepcopy(dense) for _ in range(routes)])
        made.training = dense.training
        made.norms.training = dense.training
        return made

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        normed: Tensor = self.norms[-1](x)
        return normed

    def options(self) -> dict[str, Any]:
        """The number of routes."""
        return {"routes": len(self.norms)}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """What runs: no multiply-add; the numbers of all norms are stored."""
        return dense_cost(self, shape)


def with_switchable_norms(model: nn.Module, routes: int) -> nn.Module:
    """A copy of a model in which every batch norm is a `SwitchableNorm`. Raises BadNetwork where
    there is none.
    """
    copied = copy.deepcopy(model)
    found = 0
    for part in [*copied.modules()]:
        for name, child in [*part.named_children()]:
            if isinstance(child, _BatchNorm):
                setattr(part, name, SwitchableNorm.from_layer(child, routes=routes))
                found += 1
    if not found:
        raise BadNetwork(
            "the model has no batch norms, so that nothing of it could differ by resolution"
        )
    return copied


def route_of(module: Any, route: int) -> Any:
    """A model as one route sees it: the norms of that route in their places, everything else
    shared.

    Modules without a switchable norm in them are the same objects; the others are twins with the
    same parameters.
    """
    if isinstance(module, SwitchableNorm):
        return module.norms[route]
    children = {name: route_of(child, route) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    return twin
