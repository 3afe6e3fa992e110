"""A separate batch norm for every route of a model, such as every resolution at which it runs.

DRNet (Zhu et al., 2021, arXiv 2106.02898) has one batch norm for each resolution, and shares the
convolutions. The layer has no switch. Instead, `route_of` returns the model of one route, a module
that shares all other parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.layer import Layer, LayerCost, dense_cost
from offramp.networks.wrappers import deep_copy

__all__ = ["SwitchableNorm", "route_of", "with_switchable_norms"]


class SwitchableNorm(Layer):
    """Batch norms, one for each route. A direct call runs the norm of the last route.

    Args:
        norms: of the routes, in order.
    """

    def __init__(self, norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    @classmethod
    def from_layer(cls, dense: nn.Module, *, routes: int = 2) -> SwitchableNorm:
        """Copy a batch norm for every route.

        Args:
            dense: the batch norm.
            routes: how many copies.

        Returns:
            A layer that starts with the output of `dense` on every route.

        Raises:
            BadNetwork: `dense` is not a batch norm.
            InvalidArgument: `routes` is below 1.
        """
        if not isinstance(dense, _BatchNorm):
            raise BadNetwork(
                f"a switchable norm must be made of a batch norm, got a {type(dense).__name__}"
            )
        if routes < 1:
            raise InvalidArgument(f"routes must be at least 1, got {routes}")
        layer = cls([copy.deepcopy(dense) for _ in range(routes)])
        layer.training = dense.training
        layer.norms.training = dense.training
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        normed: Tensor = self.norms[-1](x)
        return normed

    def options(self) -> dict[str, Any]:
        """The number of routes."""
        return {"routes": len(self.norms)}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """No multiply-adds. The numbers of all norms are stored."""
        return dense_cost(self, shape)


def with_switchable_norms(model: nn.Module, routes: int) -> nn.Module:
    """Copy a model, and replace every batch norm by a `SwitchableNorm`.

    Args:
        model: a model with batch norms; it is not changed.
        routes: norms at each place.

    Raises:
        BadNetwork: the model has no batch norm.
        InvalidArgument: `routes` is below 1.
    """
    copied = deep_copy(model)
    replaced = 0
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BatchNorm):
                setattr(module, name, SwitchableNorm.from_layer(child, routes=routes))
                replaced += 1
    if not replaced:
        raise BadNetwork(
            "the model has no batch norms, but only batch norms can differ by resolution"
        )
    return copied


def route_of(module: Any, route: int) -> Any:
    """Return the model of one route. It has the norms of this route and shares everything else.

    Modules without a switchable norm inside are the same objects. Other modules are shallow copies
    with the same parameters.

    Args:
        module: a model with switchable norms.
        route: the number of the route, from 0.
    """
    if isinstance(module, SwitchableNorm):
        return module.norms[route]
    children = {name: route_of(child, route) for name, child in module._modules.items()}
    changed = False
    for name, child in children.items():
        if child is not module._modules[name]:
            changed = True
    if not changed:
        return module
    # A shallow copy shares the dictionaries of the module; these three must be its own.
    twin = copy.copy(module)
    twin._modules = children
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    return twin
