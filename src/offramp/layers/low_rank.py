"""Two thin layers instead of one: the truncated singular value decomposition of its weights.

A linear layer of C inputs and O outputs becomes C -> R -> O, a convolution becomes a kxk one to R
channels and a 1x1 one to O. It saves work where R < C O k^2 / (C k^2 + O).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from offramp.layers._replacing import (
    copied,
    decomposed,
    geometry,
    placed_like,
    rank_of,
    require_dense,
    require_one_rule,
)
from offramp.networks.layer import Layer, LayerCost, dense_cost

__all__ = ["LowRank"]


class LowRank(Layer):
    """The layers `first` and `second` in a row, with no function between them.

    Args:
        first: to the inner width.
        second: from there to the outputs; it has the bias.
    """

    kinds = (nn.Conv2d, nn.Linear)

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    @classmethod
    def from_layer(
        cls, dense: nn.Module, *, rank: int | None = None, energy: float | None = None
    ) -> LowRank:
        """Replace a layer by two, the best approximation of its weights of some rank.

        Args:
            dense: a Conv2d without groups, or a Linear layer.
            rank: the inner width R; None lets `energy` decide.
            energy: the share of the sum of squared singular values to keep, by default 0.9. It
                must be left out where `rank` is given.

        Raises:
            BadNetwork: `dense` is another kind of layer, a grouped convolution, or its weights
                are not finite.
            InvalidArgument: the rank or the energy is out of its range.
            SavesNothing: the energy needs a rank that saves nothing.
        """
        require_one_rule(energy, rank=rank)
        layer = require_dense(dense, "low_rank")
        weight = layer.weight.detach()
        matrix = weight.flatten(1).double()  # [O, C k k]
        left, values, right = decomposed(matrix, "low_rank")
        outputs, inputs = matrix.shape
        # the largest R with R (outputs + inputs) < outputs * inputs
        saves = (outputs * inputs - 1) // (outputs + inputs)
        inner = rank_of(
            values, rank, energy, largest=len(values), method="low_rank", saves=saves, name="rank"
        )
        # both layers get the root of the singular values, so their weights have a similar scale
        root = values[:inner].sqrt()  # [R]
        first_weight = (root[:, None] * right[:inner]).to(weight.dtype)  # [R, C k k]
        second_weight = (left[:, :inner] * root).to(weight.dtype)  # [O, R]
        first: nn.Conv2d | nn.Linear
        second: nn.Conv2d | nn.Linear
        if isinstance(layer, nn.Conv2d):
            first = nn.Conv2d(layer.in_channels, inner, bias=False, **geometry(layer))
            second = nn.Conv2d(inner, outputs, 1)
            first_weight = first_weight.view(first.weight.shape)  # [R, C, k, k]
            second_weight = second_weight[:, :, None, None]  # [O, R, 1, 1]
        else:
            first = nn.Linear(inputs, inner, bias=False)
            second = nn.Linear(inner, outputs)
        first.weight = nn.Parameter(first_weight.contiguous())
        second.weight = nn.Parameter(second_weight.contiguous())
        second.bias = copied(layer.bias)
        return placed_like(cls(first, second), dense)

    def options(self) -> dict[str, Any]:
        """The inner width."""
        weight = self.first.weight
        assert isinstance(weight, Tensor)
        return {"rank": weight.shape[0]}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of both layers."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the replaced layer."""
        out: Tensor = self.second(self.first(x))
        return out
