"""Weights and inputs of two values, with a temperature (BNext, Guo et al., 2022, arXiv 2211.12933).

    a = sign(x + b), b a learned shift per input channel; its gradient passes where |x + b| <= 1.5
    w_T = clamp(w / T, -1, 1); T falls from 1 to 1e-7 along the training, and then it is sign(w)
    y = scale x (w_T * a) + bias

In BNext itself the layer has no scale and no bias: batch norm takes their part (see
models/bnext.py). In the place of a trained convolution it has both: the scale starts as the mean
absolute weight of each channel, which is the best for sign(w), and a batch norm behind it keeps its
statistics. The shift starts at the negative mean of the first batch that it is trained on, for
behind a ReLU no input is negative and all signs would be equal.

Stock kernels multiply these signs in float32, so nothing is saved in time: the file shrinks when
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

WINDOW = 1.5  # outside of it no gradient passes, and weights are kept inside
HARD = 1e-7  # the temperature below which weights are signs
FALL = 0.9  # of the temperature in each of the authors' epochs
EPOCHS = 153  # after so many it is below HARD


class Binary(Layer):
    """A convolution or linear layer of signs.

    Args:
        weight: latent weights [O, C, k, k] or [O, C].
        scale: of each output channel [O]; None for none.
        bias: of each output channel [O]; None for none.
        moves: how the convolution moves; empty for a linear layer.
        ready: whether the shift is kept as it is, and does not follow the first batch.
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
        """The signs of a layer's weights, with the scale that is nearest to them.

        Args:
            dense: a Conv2d that pads with zeros, or a Linear layer.

        Raises:
            BadNetwork: another kind of layer.
        """
        layer = require_zeros(dense, "binary")
        weight = layer.weight.detach()
        size = weight.abs().flatten(1).mean(1).clamp_min(1e-12)  # [O]
        if layer.bias is None:
            bias = torch.zeros_like(size)
        else:
            bias = layer.bias.detach().clone()
        latent = (weight / spread(size, weight)).clamp(-WINDOW, WINDOW)
        return placed_like(cls(latent, size.clone(), bias, moves_of(layer)), dense)

    @classmethod
    def convolution(cls, width_in: int, width: int, kernel: int, stride: int = 1) -> Binary:
        """The layer of BNext: no scale, no bias, weights of 0.001 N(0, 1).

        Args:
            width_in: channels that come in.
            width: channels that go out.
            kernel: its height and width, odd.
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
        """T: 0.9 for each of 153 epochs, spread over the training; 0 in eval mode."""
        done = float(self.done) if self.training else 1.0
        temperature = FALL ** (EPOCHS * done)
        return temperature if temperature >= HARD and done < 1 else 0.0

    def used(self) -> Tensor:
        """The weights that it computes with, before the scale."""
        hard = softened(self.weight, self.temperature())
        if not self.training:
            return hard
        return hard.detach() + self.weight - self.weight.detach()

    def signs(self, x: Tensor) -> Tensor:
        """The inputs that it computes with: [B, C, ...] -> the same."""
        shifted = x + self._shift_like(x)
        hard = softened(shifted, self.temperature())
        if not self.training:
            return hard
        inside = shifted.clamp(-WINDOW, WINDOW)
        return hard.detach() + inside - inside.detach()

    def _shift_like(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            return self.shift.view(1, -1, 1, 1)
        return self.shift

    def _start(self, x: Tensor) -> None:
        """Let the shift start from the first batch."""
        axes = (0, 2, 3) if x.dim() == 4 else tuple(range(x.dim() - 1))
        with torch.no_grad():
            self.shift.copy_(-x.mean(axes))
            self.ready.fill_(True)

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """That of the dense layer as which it runs, and of the float weights that it stores."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """The shapes of the layer that it replaces."""
        if self.training and not bool(self.ready):
            self._start(x.detach())
        weight = self.used()
        if self.scale is not None:
            weight = weight * spread(self.scale, weight)
        return moved(self.signs(x), weight, self.bias, self.moves)


def softened(values: Tensor, temperature: float) -> Tensor:
    """clamp(v / T, -1, 1), and at T = 0 signs of -1 and 1."""
    if temperature:
        return (values / temperature).clamp(-1, 1)
    return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)
