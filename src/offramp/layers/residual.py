"""The basic block of ResNets for CIFAR-10 (He et al., 2015, arXiv 1512.03385), and BranchyNet's form of it.

BranchyNet (Teerapittayanon et al., 2016, arXiv 1709.01686) has biases, an epsilon of 2e-5, and new channels of a
shortcut before the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Block", "branchy_block"]

EPSILON = 2e-5  # Chainer's, of batch norms
FIRST_EPSILON = 1e-5  # torch's, which the first edition had
WSCALE = math.sqrt(2)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, every second pixel and zero channels (type A).

    Args:
        width_in: channels that come in.
        width: channels that go out; where they differ, height and width are halved.
        bias: whether the convolutions have biases.
        eps: of the batch norms.
        zeros_first: whether all new channels of the shortcut stand before the others, and not half of them behind.
    """

    def __init__(
        self, width_in: int, width: int, *, bias: bool = False, eps: float = 1e-5, zeros_first: bool = False
    ) -> None:
        super().__init__()
        stride = 1 if width_in == width else 2
        self.zeros_first = zeros_first
        self.conv1 = nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H, W], or half the height and width."""
        h = torch.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        added = self.conv2.out_channels - self.conv1.in_channels
        if added:
            before = added if self.zeros_first else added // 2
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, added - before))
        return torch.relu(h + x)


def branchy_block(width_in: int, width: int) -> Block:
    """A basic block as the authors' code has it."""
    return Block(width_in, width, bias=True, eps=EPSILON, zeros_first=True)


def as_first_edition(module: nn.Module) -> None:
    """Turn all blocks and units in a module, in place, into what they were in the first edition."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = None
        elif isinstance(part, nn.BatchNorm2d):
            part.eps = FIRST_EPSILON
        elif isinstance(part, Block):
            part.zeros_first = False
