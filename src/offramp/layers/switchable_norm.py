"""A batch norm with statistics and weights of its own for every route: one model, run at several resolutions.

DRNet (Zhu et al., 2021, arXiv 2106.02898) has one batch norm for each resolution, and shares the convolutions. There is
no switch to turn: `route_of` gives the model as one route sees it, a module of its own that shares all other parameters.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from offramp.errors import BadInput, BadNetwork
from offramp.networks.layer import Layer, LayerCost

__all__ = ["SwitchableNorm", "route_of", "with_switchable_norms"]


class SwitchableNorm(Layer):
    """Batch norms, one for each route; called itself it is that of the last route.

    Args:
        norms: of the routes, in order.
    """

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    @classmethod
    def from_layer(cls, dense: nn.Module, *, routes: int = 2) -> SwitchableNorm:
        """So many copies of a batch norm. Raises BadNetwork for another layer, BadInput for no route."""
        if not isinstance(dense, _BatchNorm):
            raise BadNetwork(f"a switchable norm is made of a batch norm, got a {type(dense).__name__}")
        if routes < 1:
            raise BadInput(f"routes must be at least 1, got {routes}")
        return cls([copy.deepcopy(dense) for _ in range(routes)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        normed: Tensor = self.norms[-1](x)
        return normed

    def cost(self, shape: tuple[int, ...]) -> LayerCost:
        """No multiply-add that is counted elsewhere; the numbers of all norms are stored."""
        values = sum(value.numel() for value in (*self.parameters(), *self.buffers()))
        return LayerCost(macs=0.0, bit_operations=0.0, stored_bytes=4 * values)
