"""The AlexNet for CIFAR-10 to which BranchyNet adds its branches (Teerapittayanon et al., 2016,
arXiv 1709.01686).

Follows the authors' code: poolings round sizes up, the local response norm is Chainer's, and
weights start by LeCun's rule. With a cut after `conv2` and `conv3`, before their ReLU, and the exit
`b_alexnet` there, it is B-AlexNet. The paper's text has the branches after the first and second
convolution instead. No operation works in place, so that a tap keeps its value. The preprocessing
is ours: normalisation by CIFAR-10's own constants. The authors whiten the images beforehand. No
weights come with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.layers._units import chainer_start
from offramp.layers.lateral import lateral_norm
from offramp.layers.preprocess import Preprocess

__all__ = ["alexnet"]


def preprocess() -> Preprocess:
    """Images [B, 3, 32, 32] of 0 to 255, normalised by CIFAR-10's own mean and deviation."""
    return Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), expects=(32, 32))


def alexnet(classes: int = 10) -> AlexNet:
    """AlexNet: 0.54 M parameters, 28.2 M MACs, 55 % of them up to `conv2`, 68 % up to `conv3`."""
    return AlexNet(classes)


class AlexNet(nn.Module):
    """Images [B, 3, 32, 32] -> logits [B, classes]: five convolutions and three linear layers with
    dropout between them.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.conv3 = nn.Conv2d(64, 96, 3, padding=1)
        self.conv4 = nn.Conv2d(96, 96, 3, padding=1)
        self.conv5 = nn.Conv2d(96, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.norm = lateral_norm()
        self.fc1 = nn.Linear(1024, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, classes)
        self.drop = nn.Dropout(0.5)
        chainer_start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] -> logits [B, classes]."""
        h = self.norm(self.pool(torch.relu(self.conv1(x))))  # [B, 32, 16, 16], of 32 x 32
        h = self.norm(self.pool(torch.relu(self.conv2(h))))  # [B, 64, 8, 8]
        h = torch.relu(self.conv4(torch.relu(self.conv3(h))))  # [B, 96, 8, 8]
        h = self.pool(torch.relu(self.conv5(h)))  # [B, 64, 4, 4]
        h = self.drop(torch.relu(self.fc1(h.flatten(1))))
        logits: Tensor = self.fc3(self.drop(torch.relu(self.fc2(h))))
        return logits
