"""ResNet-101 for CIFAR-10, the backbone of the decision gates (Shafiee et al., 2018, arXiv
1811.01476).

Bottlenecks as in He et al., 2015, arXiv 1512.03385, with the stride in the 3x3 convolution and
projections (type B) where the shape changes; for images of 32 x 32 the stem is one 3x3 convolution
without stride and pooling. The gates' paper does not print its network: this one has the cost that
follows from its figures. No weights come with it. Its gates stand after `layer1` and `layer2`, on
features of 256 and 512 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.layers.preprocess import Preprocess
from offramp.models._bottleneck import EXPANSION, BottleneckConvolutions

__all__ = ["resnet101"]


def preprocess() -> Preprocess:
    """Normalisation by CIFAR-10's own mean and deviation."""
    return Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), expects=(32, 32))


def resnet101(classes: int = 10) -> BottleneckResNet:
    """42.5 M parameters, 2,510 M MACs: 8.8 % of them up to `layer1`, 22.1 % up to `layer2`."""
    return BottleneckResNet((3, 4, 23, 3), classes)


class BottleneckResNet(nn.Module):
    """Images [B, 3, 32, 32] -> logits [B, 10]: a stem and four stages of bottleneck blocks."""

    def __init__(self, blocks: Sequence[int], classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(256, 128, blocks[1], stride=2)
        self.layer3 = _stage(512, 256, blocks[2], stride=2)
        self.layer4 = _stage(1024, 512, blocks[3], stride=2)
        self.linear = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        h = torch.relu(self.bn1(self.conv1(x)))  # [B, 64, 32, 32]
        h = self.layer2(self.layer1(h))  # [B, 512, 16, 16], after [B, 256, 32, 32]
        h = self.layer4(self.layer3(h))  # [B, 2048, 4, 4], after [B, 1024, 8, 8]
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


class Bottleneck(BottleneckConvolutions):
    """A bottleneck block whose shortcut is called `shortcut`, and is an identity if it can be."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        wide = EXPANSION * width
        # Drawn also where it is not used, so that a seed gives the weights of the first edition.
        projection = nn.Conv2d(width_in, wide, 1, stride=stride, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if width_in != wide or stride > 1:
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, 4 width, H / stride, W / stride]."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def _stage(width_in: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Blocks of one width; the first has the stride."""
    units = [Bottleneck(width_in, width, stride)]
    for _ in range(blocks - 1):
        units.append(Bottleneck(EXPANSION * width, width, 1))
    return nn.Sequential(*units)
