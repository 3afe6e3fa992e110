"""The predictor of resolutions of DRNet (Zhu et al., 2021, arXiv 2106.02898), a small ResNet on the
image.

Sizes are those of the authors' code (mindspore-ai/models, research/cv/DRNet): at 128 x 128 pixels
290 M MACs and 4.90 M parameters. For small images `width` makes it narrower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from offramp.errors import BadNetwork
from offramp.networks.nodes import Chooser, Seen

__all__ = ["Predictor", "predictor"]


class Predictor(Chooser):
    """Images [B, channels, H, W] -> a rating for each way.

    Args:
        choices: number of ways.
        width: channels of the first stage; each of the three following stages doubles them. 64 in
            the paper.
        side: height and width to which images are resized first; 0 for no resize. 128 in the paper.
        channels: of the images.
        scale: divisor of the pixels: 255 for bytes, 1 for images that are scaled already.
        stride: of the first convolution. In the paper it is 7 x 7 with stride 2, followed by a
            pooling. A stride of 1 makes it 3 x 3 without pooling, for small images.
    """

    def __init__(
        self,
        choices: int,
        *,
        width: int = 64,
        side: int = 128,
        channels: int = 3,
        scale: float = 255.0,
        stride: int = 2,
    ) -> None:
        super().__init__()
        self.choices = choices
        self.width = width
        self.side = side
        self.channels = channels
        self.scale = float(scale)
        self.stride = stride
        if stride == 1:
            self.stem = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(channels, width, 7, stride, padding=3, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, padding=1),
            )
        self.stages = nn.Sequential(
            _Basic(width, width, 1),
            _Basic(width, 2 * width, 2),
            _Basic(2 * width, 4 * width, 2),
            _Basic(4 * width, 8 * width, 2),
        )
        self.rates = nn.Linear(8 * width, choices)

    def ratings(self, seen: Seen) -> Tensor:
        """Images [B, channels, H, W] -> ratings [B, choices]. Raises BadNetwork for anything else
        than images of these channels.
        """
        images = seen.features
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise BadNetwork(
                f"images must be [B, {self.channels}, H, W] for this predictor of resolutions, got "
                f"{list(images.shape)}"
            )
        images = images.to(self.rates.weight.dtype) / self.scale - 0.5
        if self.side and tuple(images.shape[2:]) != (self.side, self.side):
            images = interpolate(
                images, (self.side, self.side), mode="bilinear", align_corners=False
            )
        features = self.stages(self.stem(images)).mean((2, 3))  # [B, 8 width]
        rated: Tensor = self.rates(features)
        return rated

    def config(self) -> dict[str, Any]:
        """The name and the sizes."""
        return {
            "name": "Predictor",
            "choices": self.choices,
            "width": self.width,
            "side": self.side,
            "channels": self.channels,
            "scale": self.scale,
            "stride": self.stride,
        }


class _Basic(nn.Module):
    """The basic block of ResNet-18. The shortcut has a 1 x 1 convolution if the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H / stride, W / stride]."""
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def predictor(
    shape: tuple[int, ...],
    choices: int,
    *,
    width: int = 64,
    side: int = 128,
    scale: float = 255.0,
    stride: int = 2,
) -> Predictor:
    """Make a predictor for images of a shape.

    Args:
        shape: [C, H, W].
        choices: number of ways.
        width: as for `Predictor`.
        side: as for `Predictor`.
        scale: as for `Predictor`.
        stride: as for `Predictor`.

    Raises:
        BadNetwork: the shape is not that of images.
    """
    if len(shape) != 3:
        raise BadNetwork(
            f"rows must be images [C, H, W] for a predictor of resolutions, got rows of shape "
            f"{list(shape)}"
        )
    return Predictor(choices, width=width, side=side, channels=shape[0], scale=scale, stride=stride)
