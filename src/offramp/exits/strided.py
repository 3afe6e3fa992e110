"""The classifiers of MSDNet: two strided convolutions on the coarsest scale, a pooling, one linear layer.

Huang, Chen, Li, Wu, van der Maaten and Weinberger, 2017, arXiv 1703.09844, as in the authors' PyTorch port.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.nodes import Exit, Seen

__all__ = ["Strided", "strided", "strided_wide"]

STRIDE = 2


class Strided(Exit):
    """Two 3x3 convolutions of stride 2 with batch norm and ReLU, the means over 2x2, a linear layer.

    shape: of one row's features, [channels, H, W] with H and W of 5 or more. width: of both convolutions; None keeps
    the channels that come in, as the port does on ImageNet (on CIFAR it is 128).
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int | None = 128) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 5:
            raise BadNetwork(
                f"two strided convolutions stand on features of shape {tuple(shape)}, expected [C, H, W] of at least "
                "5 x 5; cut earlier, or use exits such as linear_grid"
            )
        self.shape, self.classes, self.width = tuple(shape), int(classes), width
        self.layers = _layers(shape, self.classes, width)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.layers(seen.features)
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes and width."""
        return {"name": "Strided", "shape": list(self.shape), "classes": self.classes, "width": self.width}


def strided(shape: Sequence[int], classes: int, width: int | None = 128) -> Strided:
    """128 channels: MSDNet's on CIFAR. `strided?width=64` where that costs a tenth of a small network."""
    return Strided(shape, classes, width)


def strided_wide(shape: Sequence[int], classes: int) -> Strided:
    """As many channels as come in: MSDNet's on ImageNet."""
    return Strided(shape, classes, None)


def _layers(shape: Sequence[int], classes: int, width: int | None) -> nn.Sequential:
    """Features [B, channels, H, W] -> logits [B, classes]; weights by He's rule over what goes out, no linear bias."""
    channels, *size = shape
    width = width or channels
    layers: list[nn.Module] = []
    for width_in in (channels, width):
        convolution = nn.Conv2d(width_in, width, 3, STRIDE, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    left = math.prod(-(-extent // STRIDE**2) // 2 for extent in size)
    linear = nn.Linear(width * left, classes)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), linear)
