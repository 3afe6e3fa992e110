"""Three convolutions instead of one: 1x1 to fewer channels, kxk among them, 1x1 to the outputs
(Tucker-2).

The weights come from a partial Tucker decomposition over input and output channels (Kim et al.,
2016, arXiv 1511.06530): the leading singular vectors of both unfoldings, then a few rounds of
alternating least squares (higher-order orthogonal iteration). The three run as plain convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.layers._replacing import (
    copied,
    decomposed,
    geometry,
    placed_like,
    rank_of,
    require_convolution,
    require_one_rule,
)
from offramp.networks.layer import Layer, LayerCost, SavesNothing, dense_cost

__all__ = ["Tucker"]

ROUNDS = 10  # of alternating least squares


class Tucker(Layer):
    """The convolutions `first` (1x1), `core` (kxk) and `last` (1x1) in a row."""

    kinds = (nn.Conv2d,)

    def __init__(self, first: nn.Conv2d, core: nn.Conv2d, last: nn.Conv2d) -> None:
        super().__init__()
        self.first = first
        self.core = core
        self.last = last

    @classmethod
    def from_layer(
        cls,
        dense: nn.Module,
        *,
        rank_in: int | None = None,
        rank_out: int | None = None,
        energy: float | None = None,
    ) -> Tucker:
        """Replace a convolution by three with fewer inner channels.

        Args:
            dense: a Conv2d without groups.
            rank_in: channels between the first and the core; None lets `energy` decide.
            rank_out: channels between the core and the last; None lets `energy` decide.
            energy: the share of the squared singular values of each unfolding to keep, by default
                0.9. It must be left out where both ranks are given.

        Raises:
            BadNetwork: `dense` is another kind of layer, a grouped convolution, or its weights
                are not finite.
            InvalidArgument: a rank or the energy is out of its range.
            SavesNothing: with the ranks from `energy` the three layers are not smaller than the
                one.
        """
        require_one_rule(energy, rank_in=rank_in, rank_out=rank_out)
        layer = require_convolution(dense, "tucker")
        if layer.groups > 1:
            raise BadNetwork(
                f"tucker cannot replace a grouped convolution, got groups={layer.groups}"
            )
        if layer.padding_mode != "zeros":
            raise BadNetwork(
                f"tucker replaces convolutions that pad with zeros, got {layer.padding_mode!r}"
            )
        # 1. Choose the ranks, from the singular values of both unfoldings.
        weight = layer.weight.detach().double()  # [O, C, k, k]
        outputs, inputs = weight.shape[:2]
        left, left_values = _leading(weight, 0)
        right, right_values = _leading(weight, 1)
        most_out = len(left_values)
        most_in = len(right_values)
        outer = rank_of(
            left_values,
            rank_out,
            energy,
            largest=most_out,
            method="tucker",
            saves=most_out,
            name="rank_out",
        )
        inner = rank_of(
            right_values,
            rank_in,
            energy,
            largest=most_in,
            method="tucker",
            saves=most_in,
            name="rank_in",
        )
        positions = weight[0, 0].numel()
        size = inputs * inner + inner * outer * positions + outer * outputs
        by_energy = rank_in is None or rank_out is None
        if by_energy and size >= weight.numel():
            raise SavesNothing(
                f"tucker at ranks {inner} and {outer} has {size:,} weights, and the dense layer "
                f"{weight.numel():,}"
            )
        # 2. Factorize, and make a convolution of each factor.
        left, right = _refined(weight, left[:, :outer], right[:, :inner])  # [O, outer], [C, inner]
        core_weight = torch.einsum("ochw,or,cs->rshw", weight, left, right)
        first = nn.Conv2d(inputs, inner, 1, bias=False)
        core = nn.Conv2d(inner, outer, bias=False, **geometry(layer))
        last = nn.Conv2d(outer, outputs, 1)
        kind = layer.weight.dtype
        first.weight = nn.Parameter(right.T[:, :, None, None].to(kind).contiguous())
        core.weight = nn.Parameter(core_weight.to(kind).contiguous())
        last.weight = nn.Parameter(left[:, :, None, None].to(kind).contiguous())
        last.bias = copied(layer.bias)
        return placed_like(cls(first, core, last), dense)

    def options(self) -> dict[str, Any]:
        """Both inner widths."""
        return {"rank_in": self.core.in_channels, "rank_out": self.core.out_channels}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of the three convolutions."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W'], as the replaced convolution."""
        out: Tensor = self.last(self.core(self.first(x)))
        return out


def _leading(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The left singular vectors [n, m] and singular values [m] of the unfolding along an axis."""
    unfolded = tensor.movedim(axis, 0).flatten(1)  # [n, all other axes]
    vectors, values, _ = decomposed(unfolded, "tucker")
    return vectors, values


def _refined(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors after some rounds of alternating least squares. Each round computes one factor
    while the other is fixed.
    """
    outer = left.shape[1]
    inner = right.shape[1]
    for _ in range(ROUNDS):
        projected = torch.einsum("ochw,cs->oshw", weight, right)  # inputs reduced
        vectors, _values = _leading(projected, 0)
        left = vectors[:, :outer]
        projected = torch.einsum("ochw,or->rchw", weight, left)  # outputs reduced
        vectors, _values = _leading(projected, 1)
        right = vectors[:, :inner]
    return left, right
