"""Weights and inputs of two values, with a temperature (BNext, Guo et al., 2022, arXiv 2211.12933).

    a = sign(x + b), b a learned shift per input channel; its gradient passes where |x + b| <= 1.5
    w_T = clamp(w / T, -1, 1); T falls from 1 to 1e-7 along the training, and then it is sign(w)
    y = scale x (w_T * a) + bias

In BNext itself the layer has no scale and no bias, because batch norms have both (see
models/bnext.py). A layer that replaces a trained convolution has both. The scale starts as the mean
absolute weight of each channel, the best one for sign(w), so that a batch norm after it keeps its
statistics. The shift starts at the negative mean of the first training batch: after a ReLU no input
is negative, and without a shift all signs would be equal.

Stock kernels multiply these signs in float32, so no time is saved. The file becomes smaller when
the layer is packed (see `packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.layers._replacing import placed_like
from offramp.layers.ternary import moved, moves_of, require_zeros, spread
from offramp.networks.layer import Layer, LayerCost, dense_cost

__all__ = ["Binary"]

WINDOW = 1.5  # the largest absolute weight, and the largest input that a gradient passes through
HARD = 1e-7  # below this temperature weights are signs
FALL = 0.9  # factor of the temperature in each of the authors' epochs
EPOCHS = 153  # after this number of epochs the temperature is below HARD


class Binary(Layer):
    """A convolution or linear layer of signs.

    Args:
        weight: latent weights [O, C, k, k] or [O, C].
        scale: of each output channel [O]; None for none.
        bias: of each output channel [O]; None for none.
        moves: how the convolution moves; empty for a linear layer.
        ready: whether the shift stays at zero at the start. Otherwise it is set from the first
            training batch.
    """

    kinds = (nn.Conv2d, nn.Linear)
    done: Tensor
    ready: Tensor

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        moves: dict[str, Any],
        *,
        ready: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.scale = None if scale is None else nn.Parameter(scale)
        self.bias = None if bias is None else nn.Parameter(bias)
        channels = weight.shape[1] * int(moves.get("groups", 1))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.moves = moves
        self.register_buffer("done", torch.ones(()))
        self.register_buffer("ready", torch.tensor(ready))

    @classmethod
    def from_layer(cls, dense: nn.Module) -> Binary:
        """Replace a layer by the signs of its weights, with the best scale for each channel.

        Args:
            dense: a Conv2d that pads with zeros, or a Linear layer.

        Raises:
            BadNetwork: another kind of layer.
        """
        layer = require_zeros(dense, "binary")
        weight = layer.weight.detach()
        scale = weight.abs().flatten(1).mean(1).clamp_min(1e-12)  # [O]
        if layer.bias is None:
            bias = torch.zeros_like(scale)
        else:
            bias = layer.bias.detach().clone()
        # the latent weights have a mean absolute value of 1 in each channel
        latent = (weight / spread(scale, weight)).clamp(-WINDOW, WINDOW)
        return placed_like(cls(latent, scale.clone(), bias, moves_of(layer)), dense)

    @classmethod
    def convolution(cls, width_in: int, width: int, kernel: int, stride: int = 1) -> Binary:
        """Make a layer of BNext: no scale, no bias, weights of 0.001 N(0, 1).

        Args:
            width_in: input channels.
            width: output channels.
            kernel: height and width of the kernel, odd.
            stride: of the convolution.
        """
        weight = 0.001 * torch.randn(width, width_in, kernel, kernel)
        moves = {"stride": stride, "padding": kernel // 2}
        return cls(weight, None, None, moves, ready=True)

    def anneal(self, done: float) -> None:
        """Set the share of the training that is done."""
        self.done.fill_(done)
        with torch.no_grad():
            self.weight.clamp_(-WINDOW, WINDOW)

    def temperature(self) -> float:
        """The temperature T. It falls by 0.9 in each of 153 epochs, spread over the training, and
        is 0 in eval mode and at the end.
        """
        done = 1.0
        if self.training:
            done = float(self.done)
        temperature: float = FALL ** (EPOCHS * done)
        if temperature < HARD or done >= 1:
            return 0.0
        return temperature

    def used(self) -> Tensor:
        """The weights that the layer computes with, before the scale."""
        hard = softened(self.weight, self.temperature())
        if not self.training:
            return hard
        # straight through: the value of `hard`, the gradient of the latent weights
        return hard.detach() + self.weight - self.weight.detach()

    def signs(self, x: Tensor) -> Tensor:
        """The inputs that the layer computes with: [B, C, ...] -> the same shape."""
        shifted = x + self._shift()
        hard = softened(shifted, self.temperature())
        if not self.training:
            return hard
        # straight through as well; the clamp stops the gradient outside of the window
        inside = shifted.clamp(-WINDOW, WINDOW)
        return hard.detach() + inside - inside.detach()

    def _shift(self) -> Tensor:
        """The shift [C], shaped to be added to inputs [B, C, H, W], or [B, ..., C] of a linear
        layer.
        """
        # The inputs of a linear layer may have four dimensions too, with the channels last.
        if self.weight.dim() == 4:
            return self.shift.view(1, -1, 1, 1)
        return self.shift

    def _start(self, x: Tensor) -> None:
        """Set the shift from the first batch: the negative mean over everything but channels."""
        if self.weight.dim() == 4:  # of a convolution
            axes: tuple[int, ...] = (0, 2, 3)
        else:
            axes = tuple(range(x.dim() - 1))
        with torch.no_grad():
            self.shift.copy_(-x.mean(axes))
            self.ready.fill_(True)

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of the dense layer that really runs, and of the stored float weights."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the replaced layer."""
        if self.training and not bool(self.ready):
            self._start(x.detach())
        weight = self.used()
        if self.scale is not None:
            weight = weight * spread(self.scale, weight)
        return moved(self.signs(x), weight, self.bias, self.moves)


def softened(values: Tensor, temperature: float) -> Tensor:
    """clamp(v / T, -1, 1). At T = 0 these are the signs -1 and 1, with 1 for zero.

    NaN stays NaN, so that a row of NaN does not leave with an answer.
    """
    if temperature:
        return (values / temperature).clamp(-1, 1)
    negative = torch.where(values < 0, -1.0, values)
    return torch.where(values >= 0, 1.0, negative).to(values.dtype)
