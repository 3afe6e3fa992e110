"""The basic block of ResNets for CIFAR-10 (He et al., 2015, arXiv 1512.03385), and BranchyNet's
form of it.

BranchyNet (Teerapittayanon et al., 2016, arXiv 1709.01686) has biases, an epsilon of 2e-5, and puts
the new channels of a shortcut before the others.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument

__all__ = ["Block", "branchy_block", "narrow"]

EPSILON = 2e-5  # of batch norms, Chainer's default
FIRST_EPSILON = 1e-5  # of batch norms, torch's default, in the first edition
WSCALE = math.sqrt(2)  # of the authors' code, see `chainer_start`


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. If the shape changes, the shortcut takes every second
    pixel and adds channels of zeros (type A).

    Args:
        width_in: input channels.
        width: output channels. If they differ from the input's, height and width are halved.
        bias: whether the convolutions have biases.
        eps: of the batch norms.
        zeros_first: whether all new channels of the shortcut come first. Otherwise half of them
            come first and half last.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        *,
        bias: bool = False,
        eps: float = 1e-5,
        zeros_first: bool = False,
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
        added = h.shape[1] - x.shape[1]
        if added:
            before = added // 2
            if self.zeros_first:
                before = added
            # [B, width_in, H, W] -> [B, width, H / 2, W / 2]
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, added - before))
        return torch.relu(h + x)


def branchy_block(width_in: int, width: int) -> Block:
    """Make a basic block as in BranchyNet's own code: [B, width_in, H, W] -> [B, width, H', W']."""
    return Block(width_in, width, bias=True, eps=EPSILON, zeros_first=True)


def narrow(block: nn.Module, by: int = 2) -> nn.Module:
    """Copy a residual block with 1 / `by` of the inner channels. The channels with the largest
    filters (by absolute sum) stay.

    Args:
        block: a `Block`.
        by: the divisor of the inner channels.

    Raises:
        BadNetwork: it is another kind of block.
        InvalidArgument: `by` leaves no channel.
    """
    if not isinstance(block, Block):
        raise BadNetwork(
            f"narrow takes a residual block of two convolutions, got a {type(block).__name__}"
        )
    width = block.conv1.out_channels
    if by < 1 or width // by < 1:
        raise InvalidArgument(f"narrow?by={by} leaves none of the block's {width} channels")
    copied = copy.deepcopy(block)
    sums = block.conv1.weight.detach().abs().sum((1, 2, 3))  # [inner channels]
    stays = sums.argsort(descending=True)[: width // by].sort().values  # in their old order
    # The inner channels are outputs of conv1, all of bn1, and inputs of conv2.
    with torch.no_grad():
        copied.conv1.weight = nn.Parameter(block.conv1.weight[stays].clone())
        copied.conv2.weight = nn.Parameter(block.conv2.weight[:, stays].clone())
        if block.conv1.bias is not None:
            copied.conv1.bias = nn.Parameter(block.conv1.bias[stays].clone())
        norm = copied.bn1
        for name, parameter in norm.named_parameters():
            setattr(norm, name, nn.Parameter(parameter[stays].clone()))
        for name, buffer in norm.named_buffers():
            if buffer.dim() == 1:  # all but the count of batches
                setattr(norm, name, buffer[stays].clone())
    copied.conv1.out_channels = len(stays)
    copied.bn1.num_features = len(stays)
    copied.conv2.in_channels = len(stays)
    return copied


def as_first_edition(module: nn.Module) -> None:
    """Change all blocks and units in a module to those of the first edition, in place."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = None
        elif isinstance(part, nn.BatchNorm2d):
            part.eps = FIRST_EPSILON
        elif isinstance(part, Block):
            part.zeros_first = False
