"""Weights of three values per output channel: -a, 0 and a.

**Our reading, no reproduction.** The paper (Liu and Liu, 2022, arXiv 2212.12649, "Hyperspherical
Loss-Aware Ternary Quantization") was available as an abstract alone, without formulas or code. From
it come the two ideas: first a regularizer pulls float weights towards ternary ones, then the
weights are ternary and the gradient that passes straight through is re-scaled like the derivative
of a sigmoid with a temperature. The formulas are ours; threshold and scale are those of Ternary
Weight Networks (Li et al., 2016, arXiv 1605.04711). The paper's unit-norm (hyperspherical) layers
are left out.

    D = 0.7 mean|w|,  t = sign(w) where |w| > D, else 0,  a = <t, w> / <t, t>       per channel
    warm   L + ramp x (1 - cos(w, a t))
    then   w_q = a t,  dL/dw = dL/dw_q x s,  s = sigmoid'((|w| - D) / (tau mean|w|)), mean 1

No engine here has a kernel for ternary weights. This runs as a dense layer in float32: it saves
nothing in time or bit operations, and its file shrinks when it is packed (see `packed`).
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

THRESHOLD = 0.7  # of the mean absolute weight
LAST_TAU = 0.1


class Ternary(Layer):
    """A convolution or linear layer whose weights are ternary in eval mode, and float below.

    Args:
        dense: what it replaces; its weights are copied.
        warm: the share of the training in which weights are still float, and pulled.
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
        """The same weights, rounded to three values.

        Args:
            dense: a Conv2d that pads with zeros, or a Linear layer.
            warm: as in the constructor.

        Raises:
            BadNetwork: another kind of layer.
            InvalidArgument: a share out of its range.
        """
        require("warm", warm, low=0, below=1)
        return placed_like(cls(require_zeros(dense, "ternary"), warm), dense)

    def options(self) -> dict[str, Any]:
        """The share of the training in which weights are float."""
        return {"warm": self.warm}

    def anneal(self, done: float) -> None:
        """Set the share of the training that is done."""
        self.done.fill_(done)

    def penalty(self) -> Tensor | None:
        """While it is warm 1 - cos(w, ternary w), with a weight that grows from 0 to 1."""
        done = float(self.done)
        if not self.training or done >= self.warm:
            return None
        signs, scale = ternary(self.weight)
        goal = (signs * spread(scale, signs)).flatten()
        away = 1 - cosine_similarity(self.weight.flatten(), goal.detach(), 0)
        return away * (done / self.warm)

    def used(self) -> Tensor:
        """The weights that it computes with."""
        done = float(self.done) if self.training else 1.0
        if done < self.warm:
            return self.weight
        signs, scale = ternary(self.weight)
        hard = signs * spread(scale, signs)
        if not self.training:
            return hard
        through = self._slope(done) * (self.weight - self.weight.detach())  # zero, with a gradient
        return hard + through

    def _slope(self, done: float) -> Tensor:
        """The factor of each weight's gradient, of mean 1 per channel."""
        weight = self.weight.detach()
        size = spread(weight.abs().flatten(1).mean(1), weight)
        gone = (done - self.warm) / max(1e-9, 1 - self.warm)
        tau = 1 + (LAST_TAU - 1) * min(1.0, gone)
        sigmoid = torch.sigmoid((weight.abs() - THRESHOLD * size) / (tau * size).clamp_min(1e-12))
        slope = sigmoid * (1 - sigmoid)
        return slope / spread(slope.flatten(1).mean(1), slope).clamp_min(1e-12)

    def sparsity(self) -> float:
        """The share of weights that are zero."""
        signs, _ = ternary(self.weight)
        return float((signs == 0).double().mean())

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """That of the dense layer as which it runs, and of the float weights that it stores."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the layer that it replaces."""
        return moved(x, self.used(), self.bias, self.moves)


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signs -1, 0 or 1 of weights [O, ...], and the scale of each channel [O]."""
    weight = weight.detach()
    size = weight.abs().flatten(1)  # [O, n]
    threshold = THRESHOLD * size.mean(1, keepdim=True)
    chosen = (size > threshold).to(weight.dtype)
    scale = (chosen * size).sum(1) / chosen.sum(1).clamp_min(1)
    signs = weight.sign() * chosen.view_as(weight)
    return signs, scale


def spread(values: Tensor, like: Tensor) -> Tensor:
    """A number per channel [O], to be multiplied with weights [O, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def require_zeros(dense: nn.Module, what: str) -> nn.Conv2d | nn.Linear:
    """A plain linear layer, or convolution that pads with zeros by numbers.

    Args:
        dense: the layer to replace.
        what: the method, for the sentence.

    Raises:
        BadNetwork: it is another kind of layer.
    """
    if type(dense) not in (nn.Conv2d, nn.Linear):
        raise BadNetwork(f"{what} replaces a Conv2d or a Linear layer, got {type(dense).__name__}")
    assert isinstance(dense, (nn.Conv2d, nn.Linear))
    plain = isinstance(dense, nn.Linear) or (
        dense.padding_mode == "zeros" and not isinstance(dense.padding, str)
    )
    if not plain:
        raise BadNetwork(f"{what} replaces convolutions that pad with zeros, by numbers")
    return dense


def moves_of(dense: nn.Conv2d | nn.Linear) -> dict[str, Any]:
    """The arguments with which a convolution moves; empty for a linear layer."""
    if isinstance(dense, nn.Linear):
        return {}
    names = ("stride", "padding", "dilation", "groups")
    return {name: getattr(dense, name) for name in names}


def moved(x: Tensor, weight: Tensor, bias: Tensor | None, moves: dict[str, Any]) -> Tensor:
    """The convolution or the product of inputs with weights."""
    if weight.dim() == 2:
        return linear(x, weight, bias)
    return conv2d(x, weight, bias, **moves)
