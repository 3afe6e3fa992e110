"""DenseNet-201 for CIFAR-10, the other backbone of the decision gates (Shafiee et al., 2018, arXiv
1811.01476).

DenseNet-BC as in Huang et al., 2017, arXiv 1608.06993, with growth 32; for images of 32 x 32 the
stem is one 3x3 convolution without stride and pooling. The gates' paper does not print its network:
this one has the cost that follows from its figures. No weights come with it. Its gates stand after
`block1` and `block2`, before the transitions that follow them, on features of 256 and 512 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.layers.preprocess import Preprocess

__all__ = ["densenet201"]

GROWTH = 32  # new channels per layer
BOTTLENECK = 4  # channels of a 1x1 convolution, by the growth


def preprocess() -> Preprocess:
    """Normalisation by CIFAR-10's own mean and deviation."""
    return Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), expects=(32, 32))


def densenet201(classes: int = 10) -> DenseNet:
    """DenseNet-201: 18.1 M parameters, 1,363.9 M MACs, 25.0 % of them up to `block1`, 44.6 % up to
    `block2`.
    """
    return DenseNet((6, 12, 48, 32), classes)


class DenseNet(nn.Module):
    """Images [B, 3, 32, 32] -> logits [B, classes]: a stem and four dense blocks, with transitions
    between them that halve channels, height and width.
    """

    def __init__(self, layers: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        width = 64
        self.block1, width = _block(width, layers[0])
        self.transition1 = Transition(width)
        width = width // 2
        self.block2, width = _block(width, layers[1])
        self.transition2 = Transition(width)
        width = width // 2
        self.block3, width = _block(width, layers[2])
        self.transition3 = Transition(width)
        width = width // 2
        self.block4, width = _block(width, layers[3])
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        h = self.block1(self.stem(x))  # [B, 256, 32, 32]
        h = self.block2(self.transition1(h))  # [B, 512, 16, 16]
        h = self.block3(self.transition2(h))  # [B, 1792, 8, 8]
        h = self.block4(self.transition3(h))  # [B, 1920, 4, 4]
        logits: Tensor = self.linear(torch.relu(self.norm(h)).mean((2, 3)))
        return logits


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution to four times the growth, BN, ReLU, 3x3 convolution. The new
    channels are concatenated to the input.
    """

    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, BOTTLENECK * GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * GROWTH)
        self.conv2 = nn.Conv2d(BOTTLENECK * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width_in + 32, H, W]."""
        h = self.conv1(torch.relu(self.norm1(x)))
        h = self.conv2(torch.relu(self.norm2(h)))
        return torch.cat([x, h], 1)


class Transition(nn.Module):
    """BN, ReLU, 1x1 convolution to half the channels, and the mean over 2 x 2."""

    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width_in)
        self.conv = nn.Conv2d(width_in, width_in // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width_in / 2, H / 2, W / 2]."""
        h: Tensor = self.pool(self.conv(torch.relu(self.norm(x))))
        return h


def _block(width_in: int, layers: int) -> tuple[nn.Sequential, int]:
    """A dense block, and the number of its output channels."""
    block = nn.Sequential()
    width = width_in
    for _ in range(layers):
        block.append(DenseLayer(width))
        width += GROWTH
    return block, width
