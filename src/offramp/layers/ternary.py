"""Weights of three values per output channel: -a, 0 and a.

**Our reading, not a reproduction.** Of the paper (Liu and Liu, 2022, arXiv 2212.12649,
"Hyperspherical Loss-Aware Ternary Quantization") only the abstract was available, without formulas
or code. Two ideas come from it. First, a regularizer pulls float weights towards ternary ones.
Then the weights are ternary, and the straight-through gradient is scaled like the derivative of a
sigmoid with a temperature. The formulas are ours. Threshold and scale are those of Ternary Weight
Networks (Li et al., 2016, arXiv 1605.04711). The paper's unit-norm (hyperspherical) layers are left
out.

    D = 0.7 mean|w|,  t = sign(w) where |w| > D, else 0,  a = <t, w> / <t, t>       per channel
    warm   L + ramp x (1 - cos(w, a t))
    then   w_q = a t,  dL/dw = dL/dw_q x s,  s = sigmoid'((|w| - D) / (tau mean|w|)), mean 1

No engine here has a kernel for ternary weights, so the layer runs as a dense layer in float32. It
saves no time and no bit operations. Its file becomes smaller when it is packed (see `packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cosine_similarity, linear

from offramp._support.arguments import require
from offramp.errors import BadNetwork
from offramp.layers._replacing import copied, placed_like
from offramp.networks.layer import Layer, LayerCost, dense_cost

__all__ = ["Ternary"]

THRESHOLD = 0.7  # of the mean absolute weight; smaller weights become zero
LAST_TAU = 0.1  # the temperature at the end of the training; it starts at 1


class Ternary(Layer):
    """A convolution or linear layer that stores float weights and computes with ternary ones.

    Args:
        dense: the replaced layer; its weights are copied.
        warm: the first share of the training, in which the layer computes with float weights and a
            penalty pulls them towards ternary ones.
    """

    kinds = (nn.Conv2d, nn.Linear)
    done: Tensor

    def __init__(self, dense: nn.Conv2d | nn.Linear, warm: float) -> None:
        super().__init__()
        self.warm = warm
        self.weight = nn.Parameter(dense.weight.detach().clone())
        self.bias = copied(dense.bias)
        self.moves = moves_of(dense)
        self.register_buffer("done", torch.ones(()))

    @classmethod
    def from_layer(cls, dense: nn.Module, *, warm: float = 0.25) -> Ternary:
        """Replace a layer by one with the same weights, rounded to three values.

        Args:
            dense: a Conv2d that pads with zeros, or a Linear layer.
            warm: as in the constructor.

        Raises:
            BadNetwork: `dense` is another kind of layer.
            InvalidArgument: `warm` is out of its range.
        """
        require("warm", warm, low=0, below=1)
        return placed_like(cls(require_zeros(dense, "ternary"), warm), dense)

    def options(self) -> dict[str, Any]:
        """The share of the training that computes with float weights."""
        return {"warm": self.warm}

    def anneal(self, done: float) -> None:
        """Set the share of the training that is done."""
        self.done.fill_(done)

    def penalty(self) -> Tensor | None:
        """The penalty of the warm phase, 1 - cos(w, ternary w), times a ramp from 0 to 1.

        Returns:
            None outside of the warm phase.
        """
        done = float(self.done)
        if not self.training or done >= self.warm:
            return None
        signs, scale = ternary(self.weight)
        target = (signs * spread(scale, signs)).flatten()
        distance = 1 - cosine_similarity(self.weight.flatten(), target.detach(), 0)
        ramp = done / self.warm
        return distance * ramp

    def used(self) -> Tensor:
        """The weights that the layer computes with."""
        done = 1.0
        if self.training:
            done = float(self.done)
        if done < self.warm:
            return self.weight
        signs, scale = ternary(self.weight)
        hard = signs * spread(scale, signs)
        if not self.training:
            return hard
        # straight through: the added value is zero, but it has the scaled gradient
        through = self._slope(done) * (self.weight - self.weight.detach())
        return hard + through

    def _slope(self, done: float) -> Tensor:
        """The factor of each weight's gradient, with a mean of 1 in every channel."""
        weight = self.weight.detach()
        mean_size = spread(weight.abs().flatten(1).mean(1), weight)
        # the temperature falls linearly from 1 to LAST_TAU after the warm phase
        gone = (done - self.warm) / max(1e-9, 1 - self.warm)
        tau = 1 + (LAST_TAU - 1) * min(1.0, gone)
        distance = weight.abs() - THRESHOLD * mean_size
        sigmoid = torch.sigmoid(distance / (tau * mean_size).clamp_min(1e-12))
        slope = sigmoid * (1 - sigmoid)
        return slope / spread(slope.flatten(1).mean(1), slope).clamp_min(1e-12)

    def sparsity(self) -> float:
        """The share of weights that are zero."""
        signs, _ = ternary(self.weight)
        return float((signs == 0).double().mean())

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of the dense layer that really runs, and of the stored float weights."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the replaced layer."""
        return moved(x, self.used(), self.bias, self.moves)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights to three values per channel.

    Args:
        weight: [O, ...].

    Returns:
        Signs -1, 0 or 1 [O, ...], and the scale of each channel [O].
    """
    weight = weight.detach()
    size = weight.abs().flatten(1)  # [O, n]
    threshold = THRESHOLD * size.mean(1, keepdim=True)
    nonzero = (size > threshold).to(weight.dtype)
    # the best scale is the mean absolute value of the weights that are not rounded to zero
    scale = (nonzero * size).sum(1) / nonzero.sum(1).clamp_min(1)
    signs = weight.sign() * nonzero.view_as(weight)
    return signs, scale


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Reshape a number per channel, [O] -> [O, 1, ...], to be multiplied with weights [O, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def require_zeros(dense: nn.Module, what: str) -> nn.Conv2d | nn.Linear:
    """Check that a layer is linear, or a convolution that pads with zeros, by numbers.

    Args:
        dense: the layer to replace.
        what: the method, for the message.

    Raises:
        BadNetwork: it is another kind of layer.
    """
    if type(dense) not in (nn.Conv2d, nn.Linear):
        raise BadNetwork(f"{what} replaces a Conv2d or a Linear layer, got {type(dense).__name__}")
    assert isinstance(dense, (nn.Conv2d, nn.Linear))
    if isinstance(dense, nn.Linear):
        return dense
    if dense.padding_mode != "zeros" or isinstance(dense.padding, str):
        raise BadNetwork(
            f"{what} replaces convolutions that pad with zeros, by numbers, got "
            f"padding={dense.padding!r} and padding_mode={dense.padding_mode!r}"
        )
    return dense


def moves_of(dense: nn.Conv2d | nn.Linear) -> dict[str, Any]:
    """The stride, padding, dilation and groups of a convolution; empty for a linear layer."""
    if isinstance(dense, nn.Linear):
        return {}
    names = ("stride", "padding", "dilation", "groups")
    return {name: getattr(dense, name) for name in names}


def moved(x: Tensor, weight: Tensor, bias: Tensor | None, moves: dict[str, Any]) -> Tensor:
    """Convolve inputs with weights, or multiply them for a linear layer.

    Args:
        x: [B, C, H, W], or [B, ..., C].
        weight: [O, C, k, k], or [O, C].
        bias: [O], or None.
        moves: from `moves_of`.
    """
    if weight.dim() == 2:
        return linear(x, weight, bias)
    return conv2d(x, weight, bias, **moves)
