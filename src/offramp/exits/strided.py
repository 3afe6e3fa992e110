"""The classifiers of MSDNet and RANet: two strided convolutions on the coarsest scale, a pooling,
and one linear layer.

Huang, Chen, Li, Wu, van der Maaten and Weinberger, 2017, arXiv 1703.09844, as in the authors'
PyTorch port.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.nodes import Exit, Seen

__all__ = ["Strided", "strided", "strided_wide"]

STRIDE = 2


class Strided(Exit):
    """Two 3x3 convolutions of stride 2 with batch norm and ReLU, the means over 2x2, a linear
    layer.

    Args:
        shape: of one row's features, [channels, H, W] with H and W of 5 or more.
        classes: C.
        width: channels of both convolutions. None keeps those of the features, as the port does on
            ImageNet (on CIFAR it is 128).
        he: whether weights start by He's rule with fan-out, and the linear bias at 0, as in RANet's
            code. The port of MSDNet intends the same, but looks for layers one level too high, so
            its weights are torch's own.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, width: int | None = 128, *, he: bool = False
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 5:
            raise BadNetwork(
                "two strided convolutions need features of shape [C, H, W] of at least 5 x "
                f"5, got {tuple(shape)}. Cut earlier, or use linear_grid"
            )
        self.shape = tuple(shape)
        self.classes = int(classes)
        self.width = width
        self.layers = _layers(shape, self.classes, width, he=he)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.layers(seen.features)
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes and width."""
        return {
            "name": "Strided",
            "shape": list(self.shape),
            "classes": self.classes,
            "width": self.width,
        }


def strided(
    shape: Sequence[int], classes: int, width: int | None = 128, he: bool = False
) -> Strided:
    """128 channels: MSDNet's on CIFAR; `strided?he=true` starts as RANet's.

    Use `strided?width=64` if 128 channels cost too much of a small network.
    """
    return Strided(shape, classes, width, he=he)


def strided_wide(shape: Sequence[int], classes: int, he: bool = False) -> Strided:
    """As many channels as come in: MSDNet's on ImageNet; `strided_wide?he=true` starts as
    RANet's.
    """
    return Strided(shape, classes, None, he=he)


def _layers(shape: Sequence[int], classes: int, width: int | None, *, he: bool) -> nn.Sequential:
    """Features [B, channels, H, W] -> logits [B, classes]."""
    channels, *size = shape
    width = width or channels
    layers: list[nn.Module] = []
    for width_in in (channels, width):
        convolution = nn.Conv2d(width_in, width, 3, STRIDE, padding=1, bias=False)
        if he:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    # Both convolutions divide a side by 4 and round up; the pooling halves it and rounds down.
    sides = [math.ceil(side / STRIDE**2) // 2 for side in size]
    linear = nn.Linear(width * math.prod(sides), classes)
    if he:
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), linear)
