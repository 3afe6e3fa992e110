"""C-Ghost: a few feature maps from a convolution, the others from cheap operations on those.

Han et al., 2020, arXiv 1911.11907. The names of modules, bottleneck and network are those of the
authors' code and of timm, whose weights load. With s = `ratio`, one convolution makes m = ceil(O /
s) intrinsic maps, and a depth-wise one makes s - 1 ghosts of each. Maps beyond O are dropped.
Depth-wise convolutions are cheap on CPUs. On GPUs the module is often slower than the convolution
that it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers._replacing import geometry, placed_like, require_convolution, require_whole
from offramp.networks.layer import Layer, LayerCost, dense_cost

__all__ = ["Ghost", "GhostBottleneck", "GhostModule"]


class GhostModule(nn.Module):
    """The module of the paper: [B, C, H, W] -> [B, O, H', W'].

    Args:
        width_in: C.
        width: O.
        kernel: of the primary convolution, padded to keep the size.
        ratio: s; one map in s is computed by the primary convolution.
        cheap: kernel of the depth-wise convolution.
        stride: of the primary convolution.
        relu: whether both parts end with a ReLU.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        kernel: int = 1,
        ratio: int = 2,
        cheap: int = 3,
        stride: int = 1,
        *,
        relu: bool = True,
    ) -> None:
        super().__init__()
        intrinsic = math.ceil(width / ratio)
        ghosts = intrinsic * (ratio - 1)
        self.out_chs = width
        self.primary_conv = nn.Sequential(
            nn.Conv2d(width_in, intrinsic, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(intrinsic),
            _activation(relu=relu),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(intrinsic, ghosts, cheap, 1, cheap // 2, groups=intrinsic, bias=False),
            nn.BatchNorm2d(ghosts),
            _activation(relu=relu),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        intrinsic = self.primary_conv(x)  # [B, m, H', W']
        ghosts = self.cheap_operation(intrinsic)  # [B, m (s - 1), H', W']
        return torch.cat([intrinsic, ghosts], 1)[:, : self.out_chs]


def _activation(*, relu: bool) -> nn.Module:
    if relu:
        return nn.ReLU(inplace=True)
    return nn.Identity()


class Squeeze(nn.Module):
    """A weight per channel from the mean over positions: reduce, ReLU, expand, hard sigmoid."""

    def __init__(self, width: int, ratio: float = 0.25) -> None:
        super().__init__()
        inner = divisible(width * ratio, 4)
        self.conv_reduce = nn.Conv2d(width, inner, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        means = x.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        weights = self.conv_expand(self.act1(self.conv_reduce(means)))
        return x * nn.functional.hardsigmoid(weights)


class GhostBottleneck(nn.Module):
    """A ghost module that expands, another that shrinks, and a shortcut around both.

    Args:
        width_in: input channels.
        inner: channels between the two modules.
        width: output channels.
        kernel: of the depth-wise convolution, which is there if the stride is above 1.
        stride: 1 or 2.
        squeeze: the ratio of the squeeze-and-excitation between the modules; 0 for none.
    """

    def __init__(
        self,
        width_in: int,
        inner: int,
        width: int,
        kernel: int = 3,
        stride: int = 1,
        squeeze: float = 0.0,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.ghost1 = GhostModule(width_in, inner)
        padding = (kernel - 1) // 2
        if stride > 1:
            self.conv_dw = nn.Conv2d(
                inner, inner, kernel, stride, padding, groups=inner, bias=False
            )
            self.bn_dw = nn.BatchNorm2d(inner)
        self.se: Squeeze | None = None
        if squeeze:
            self.se = Squeeze(inner, squeeze)
        self.ghost2 = GhostModule(inner, width, relu=False)
        self.shortcut = nn.Sequential()
        if width_in != width or stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_in, kernel, stride, padding, groups=width_in, bias=False),
                nn.BatchNorm2d(width_in),
                nn.Conv2d(width_in, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        h = self.ghost1(x)
        if self.stride > 1:
            h = self.bn_dw(self.conv_dw(h))
        if self.se is not None:
            h = self.se(h)
        out: Tensor = self.ghost2(h) + self.shortcut(x)
        return out


class Ghost(Layer):
    """A ghost module that replaces a convolution.

    It has no batch norms and no ReLUs of its own. Those of the model follow it, and they fit the
    scale of the convolution's output. The intrinsic maps start with the filters of the first m
    channels. Each ghost starts as the multiple of its intrinsic map that is nearest to the filter
    of its own channel, by least squares.
    """

    kinds = (nn.Conv2d,)

    def __init__(self, primary: nn.Conv2d, cheap: nn.Conv2d, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.width = width
        self.primary = primary
        self.cheap = cheap

    @classmethod
    def from_layer(cls, dense: nn.Module, *, ratio: int = 2, kernel: int = 3) -> Ghost:
        """Replace a convolution by a ghost module with the same inputs and outputs.

        Args:
            dense: a Conv2d without groups.
            ratio: s; about 1 / s of the work is left.
            kernel: of the cheap operation, odd.

        Raises:
            BadNetwork: `dense` is another kind of layer, or a grouped convolution.
            InvalidArgument: the ratio is below 2 or above the number of channels, or the kernel is
                even.
        """
        layer = require_convolution(dense, "ghost")
        if layer.groups > 1:
            raise BadNetwork(
                f"ghost cannot replace a grouped convolution, got groups={layer.groups}"
            )
        outputs = layer.out_channels
        require_whole("ratio", ratio, 2)
        if ratio > outputs:
            raise InvalidArgument(
                f"ratio must be at most {outputs}, the number of channels, got {ratio}"
            )
        if require_whole("kernel", kernel, 1) % 2 == 0:
            raise InvalidArgument(f"kernel must be odd, got {kernel}")
        intrinsic = math.ceil(outputs / ratio)
        ghosts = intrinsic * (ratio - 1)
        biased = layer.bias is not None
        primary = nn.Conv2d(layer.in_channels, intrinsic, bias=biased, **geometry(layer))
        cheap = nn.Conv2d(
            intrinsic, ghosts, kernel, padding=kernel // 2, groups=intrinsic, bias=biased
        )
        filters = layer.weight.detach()  # [O, C, k, k]
        multiples = _multiples(filters.flatten(1), intrinsic, ratio)  # [ghosts]
        module = cls(primary, cheap, outputs, ratio)
        with torch.no_grad():
            # the middle of each cheap kernel is the multiple, everything else is zero
            primary.weight.copy_(filters[:intrinsic])
            cheap.weight.zero_()
            cheap.weight[:, 0, kernel // 2, kernel // 2] = multiples.to(cheap.weight)
            if layer.bias is not None:
                assert primary.bias is not None
                assert cheap.bias is not None
                biases = torch.zeros(intrinsic + ghosts)
                biases[:outputs] = layer.bias.float()
                primary.bias.copy_(biases[:intrinsic])
                # The bias of an intrinsic map goes through the cheap operation too.
                through = multiples.float() * biases[:intrinsic].repeat_interleave(ratio - 1)
                cheap.bias.copy_(biases[intrinsic:] - through)
        return placed_like(module, dense)

    def options(self) -> dict[str, Any]:
        """The ratio and the kernel of the cheap operation."""
        return {"ratio": self.ratio, "kernel": self.cheap.kernel_size[0]}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """The cost of both convolutions."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        intrinsic = self.primary(x)
        ghosts = self.cheap(intrinsic)
        return torch.cat([intrinsic, ghosts], 1)[:, : self.width]


def _multiples(filters: Tensor, intrinsic: int, ratio: int) -> Tensor:
    """For each ghost the factor of its intrinsic filter that is nearest to the ghost's own filter,
    by least squares: <source, target> / <source, source>.
    """
    sources = filters[:intrinsic].repeat_interleave(ratio - 1, dim=0)  # [ghosts, C k k]
    # The last ghosts may be beyond the channels of the convolution. Their targets are zero.
    targets = torch.zeros_like(sources)
    count = len(filters) - intrinsic
    targets[:count] = filters[intrinsic:]
    squares = (sources**2).sum(1).clamp_min(1e-12)
    return (sources * targets).sum(1) / squares


def divisible(width: float, by: int) -> int:
    """Round a width to the nearest multiple of `by`, but to at least `by`. A result below nine
    tenths of the width is rounded up instead.

    >>> divisible(16 * 1.3, 4), divisible(10, 4)
    (20, 12)
    """
    require("width", width, above=0)
    rounded = max(by, int(width + by / 2) // by * by)
    if rounded < 0.9 * width:
        return rounded + by
    return rounded
