"""The ResNet-110 for CIFAR-10 to which BranchyNet adds its branches (Teerapittayanon et al., 2016,
arXiv 1709.01686).

As in the authors' code, it differs from `resnet110`. The stem has no padding, so that stages work
on 30, 15 and 8 pixels, and a 6x6 pooling of stride 1 leaves 3x3 means for the linear layer.
Convolutions have biases, batch norms have an epsilon of 2e-5, and the new channels of a shortcut
come before the others. With a cut after `stem` and `layer1`, and the exit `b_resnet` there, it is
B-ResNet-110. In the paper's text the first branch comes after another block, as it did in the code
until commit 2c61194 of September 2016 moved it. The preprocessing is that of `alexnet`, which is
ours. No weights come with it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.layers._units import chainer_start
from offramp.layers.preprocess import Preprocess
from offramp.layers.residual import EPSILON, WSCALE, as_first_edition, branchy_block
from offramp.models import alexnet

__all__ = ["resnet110_branchy"]


def preprocess() -> Preprocess:
    """Images [B, 3, 32, 32] of 0 to 255, normalised by CIFAR-10's own mean and deviation."""
    return alexnet.preprocess()


def resnet110_branchy(classes: int = 10) -> BranchyResNet:
    """ResNet-110 of BranchyNet: 1.73 M parameters, 232.4 M MACs, 0.2 % of them up to `stem`, 32 %
    up to `layer1`.
    """
    return BranchyResNet(18, classes)


class BranchyResNet(nn.Module):
    """Images [B, 3, 32, 32] -> logits [B, classes]: a stem and three stages of `blocks` basic
    blocks each.

    Weights start as in the authors' code. The first edition had no biases. If its state dict is
    loaded, the network takes the form of that edition: without biases, with epsilons of 1e-5, and
    with new channels on both sides.
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, EPSILON), nn.ReLU())
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.pool = nn.AvgPool2d(6, 1)
        self.linear = nn.Linear(576, classes)
        chainer_start(self, WSCALE)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        h = self.layer1(self.stem(x))  # [B, 16, 30, 30]
        h = self.layer3(self.layer2(h))  # [B, 64, 8, 8], after [B, 32, 15, 15]
        logits: Tensor = self.linear(self.pool(h).flatten(1))  # of [B, 64, 3, 3]
        return logits

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """`load_state_dict` calls this before it loads the children."""
        if f"{prefix}stem.0.weight" in state_dict and f"{prefix}stem.0.bias" not in state_dict:
            as_first_edition(self)
        super()._load_from_state_dict(state_dict, prefix, *others)


def _stage(width_in: int, width: int, blocks: int) -> nn.Sequential:
    """Blocks of one width; the first one changes the width."""
    units = [branchy_block(width_in, width)]
    for _ in range(blocks - 1):
        units.append(branchy_block(width, width))
    return nn.Sequential(*units)
