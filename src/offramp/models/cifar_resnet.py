"""ResNets for CIFAR-10 (He et al., 2015, arXiv 1512.03385, section 4.2), 20 to 110 layers.

Module names, parameter-free shortcuts and preprocessing follow the public checkpoints of
https://github.com/akamaster/pytorch_resnet_cifar10 (BSD 2-Clause, see licenses/), which load
strictly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.layers.preprocess import Preprocess
from offramp.layers.residual import Block

__all__ = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]


def preprocess() -> Preprocess:
    """The preprocessing of the public weights: ImageNet's constants, not CIFAR-10's own."""
    return Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), expects=(32, 32))


def resnet20(classes: int = 10) -> CifarResNet:
    """0.27 M parameters, 40.6 M MACs; 91.73 % with the public weights."""
    return CifarResNet(3, classes)


def resnet32(classes: int = 10) -> CifarResNet:
    """0.46 M parameters, 68.9 M MACs; 92.63 % with the public weights."""
    return CifarResNet(5, classes)


def resnet44(classes: int = 10) -> CifarResNet:
    """0.66 M parameters, 97.2 M MACs."""
    return CifarResNet(7, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """0.85 M parameters, 125.5 M MACs; 93.39 % with the public weights."""
    return CifarResNet(9, classes)


def resnet110(classes: int = 10) -> CifarResNet:
    """1.73 M parameters, 252.9 M MACs."""
    return CifarResNet(18, classes)


class CifarResNet(nn.Module):
    """Images [B, 3, 32, 32] -> logits [B, classes]: a stem and three stages of `blocks` basic
    blocks each.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        h = torch.relu(self.bn1(self.conv1(x)))  # [B, 16, 32, 32]
        h = self.layer3(self.layer2(self.layer1(h)))  # [B, 64, 8, 8], after [B, 32, 16, 16]
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


def _stage(width_in: int, width: int, blocks: int) -> nn.Sequential:
    """Blocks of one width; the first one changes the width."""
    units = [Block(width_in, width)]
    for _ in range(blocks - 1):
        units.append(Block(width, width))
    return nn.Sequential(*units)
