"""The basic block of ResNets for CIFAR-10 (He et al., 2015, arXiv 1512.03385), and BranchyNet's
form of it.

BranchyNet (Teerapittayanon et al., 2016, arXiv 1709.01686) has biases, an epsilon of 2e-5, and new
channels of a shortcut before the others.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument

__all__ = ["Block", "branchy_block", "narrow"]

EPSILON = 2e-5  # Chainer's, of batch norms
FIRST_EPSILON = 1e-5  # torch's, which the first edition had
WSCALE = math.sqrt(2)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the shape changes, every second pixel and zero
    channels (type A).

    Args:
        width_in: channels that come in.
        width: channels that go out; where they differ, height and width are halved.
        bias: whether the convolutions have biases.
        eps: of the batch norms.
        zeros_first: whether all new channels of the shortcut stand before the others, and not half
            of them behind.
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
            before = added if self.zeros_first else added // 2
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, added - before))
        return torch.relu(h + x)


def branchy_block(width_in: int, width: int) -> Block:
    """A basic block as the authors' code has it."""
    return Block(width_in, width, bias=True, eps=EPSILON, zeros_first=True)


def narrow(block: nn.Module, by: int = 2) -> nn.Module:
    """A copy of a residual block with 1 / `by` of the channels within.

    Those stay whose filters have the largest absolute sums.

    Args:
        block: a `Block`.
        by: how much narrower it becomes.

    Raises:
        BadNetwork: another kind of block.
        InvalidArgument: a number that leaves no channel.
    """
    if not isinstance(block, Block):
        raise BadNetwork(
            f"narrow takes a residual block of two convolutions, got a {type(block).__name__}"
        )
    width = block.conv1.out_channels
    if by < 1 or width // by < 1:
        raise InvalidArgument(f"narrow?by={by} leaves none of the block's {width} channels")
    found = copy.deepcopy(block)
    sums = block.conv1.weight.detach().abs().sum((1, 2, 3))
    kept = sums.argsort(descending=True)[: width // by].sort().values
    with torch.no_grad():
        found.conv1.weight = nn.Parameter(block.conv1.weight[kept].clone())
        found.conv2.weight = nn.Parameter(block.conv2.weight[:, kept].clone())
        for values in (found.bn1._parameters, found.bn1._buffers):
            for key, value in values.items():
                if value is not None and value.dim() == 1:
                    part = value.detach()[kept].clone()
                    values[key] = nn.Parameter(part) if isinstance(value, nn.Parameter) else part  # type: ignore[assignment]
        if block.conv1.bias is not None:
            found.conv1.bias = nn.Parameter(block.conv1.bias[kept].clone())
    found.conv1.out_channels = found.bn1.num_features = found.conv2.in_channels = len(kept)
    return found


def as_first_edition(module: nn.Module) -> None:
    """Turn all blocks and units in a module, in place, into what they were in the first edition."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.bias = None
        elif isinstance(part, nn.BatchNorm2d):
            part.eps = FIRST_EPSILON
        elif isinstance(part, Block):
            part.zeros_first = False
