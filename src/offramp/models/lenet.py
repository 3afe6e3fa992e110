"""The LeNet for MNIST to which BranchyNet adds its branch (Teerapittayanon et al., 2016, arXiv
1709.01686).

Follows the authors' code: poolings round sizes up, and weights start by LeCun's rule. With a cut
after `conv1`, before pooling and ReLU, and the exit `b_lenet` there, it is B-LeNet. No operation
works in place, so that a tap keeps its value. The preprocessing is ours: the usual normalisation by
MNIST's own constants. No weights come with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.layers._units import chainer_start
from offramp.layers.preprocess import Preprocess

__all__ = ["lenet"]


def preprocess() -> Preprocess:
    """Images [B, 1, 28, 28] of 0 to 255, normalised by MNIST's own mean and deviation."""
    return Preprocess(mean=(0.1307,), std=(0.3081,), expects=(28, 28))


def lenet(classes: int = 10) -> LeNet:
    """LeNet: 67,824 parameters, 1.14 M MACs."""
    return LeNet(classes)


class LeNet(nn.Module):
    """Images [B, 1, 28, 28] -> logits [B, 10]: three 5x5 convolutions and two linear layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 5, padding=3)
        self.conv2 = nn.Conv2d(5, 10, 5, padding=3)
        self.conv3 = nn.Conv2d(10, 20, 5, padding=3)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.fc1 = nn.Linear(720, 84)
        self.fc2 = nn.Linear(84, classes)
        chainer_start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        h = torch.relu(self.pool(self.conv1(x)))  # [B, 5, 15, 15], of 30 x 30
        h = torch.relu(self.pool(self.conv2(h)))  # [B, 10, 9, 9], of 17 x 17
        h = torch.relu(self.pool(self.conv3(h)))  # [B, 20, 6, 6], of 11 x 11
        # two linear layers in a row, as in the authors' code
        logits: Tensor = self.fc2(self.fc1(h.flatten(1)))
        return logits
