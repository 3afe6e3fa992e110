"""The convolutions of a bottleneck block (He et al., 2015, arXiv 1512.03385), without its shortcut.

The ResNets that share them differ in the name and the form of the shortcut, which files of weights
depend on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXPANSION = 4  # channels of the output by channels of the 3x3 convolution


class BottleneckConvolutions(nn.Module):
    """A 1x1, a 3x3 (with the stride) and a 1x1 convolution, each with batch norm.

    Args:
        width_in: channels of the input.
        width: channels of the first two convolutions. The third has four times as many.
        stride: of the 3x3 convolution.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, EXPANSION * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(EXPANSION * width)

    def residual(self, x: Tensor) -> Tensor:
        """The block's value before the shortcut and the last ReLU.

        [B, width_in, H, W] -> [B, 4 width, H / stride, W / stride].
        """
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h)))
        value: Tensor = self.bn3(self.conv3(h))
        return value
