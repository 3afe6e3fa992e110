"""A layer or a block is left out: its output is its input.

A residual network still works without some of its blocks (Veit, Wilber and Belongie, 2016, arXiv
1605.06431), so this is the cheapest of all substitutes. It fits if the input and the output of the
layer have the same shape. `convert` can check that only if it has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from offramp.networks.layer import Layer, LayerCost

__all__ = ["Skip"]


class Skip(Layer):
    """The input as it is. It computes and stores nothing."""

    @classmethod
    def from_layer(cls, dense: nn.Module, *_: Any) -> Self:
        """Leave out a layer or a block.

        Args:
            dense: a module whose input and output are one tensor of the same shape.
        """
        return cls().train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same [B, ...]."""
        return x

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """Nothing is computed and nothing is stored."""
        return LayerCost(0.0, 0.0, 0)
