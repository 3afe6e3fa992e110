"""C-Ghost: a few feature maps from a convolution, the others from cheap operations on those.

Han et al., 2020, arXiv 1911.11907; module, bottleneck and network names as in the authors' code
and in timm, whose weights load. With s = `ratio` a convolution to O channels makes m = ceil(O / s)
intrinsic maps, and a depth-wise one makes s - 1 ghosts of each; what is over O is cut off.
Depth-wise convolutions are cheap on CPUs. On GPUs the module is often slower than what it replaces.
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
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(intrinsic, ghosts, cheap, 1, cheap // 2, groups=intrinsic, bias=False),
            nn.BatchNorm2d(ghosts),
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        intrinsic = self.primary_conv(x)
        ghosts = self.cheap_operation(intrinsic)
        return torch.cat([intrinsic, ghosts], 1)[:, : self.out_chs]


class Squeeze(nn.Module):
    """A weight per channel from the mean over positions: reduce, ReLU, expand, hard sigmoid."""

    def __init__(self, width: int, ratio: float = 0.25) -> None:
        super().__init__()
        inner = divisible(width * ratio, 4)
        self.conv_reduce = nn.Conv2d(width, inner, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        means = x.mean((2, 3), keepdim=True)
        weights = self.conv_expand(self.act1(self.conv_reduce(means)))
        return x * nn.functional.hardsigmoid(weights)


class GhostBottleneck(nn.Module):
    """Expand by a ghost module, shrink by another, with a shortcut around both.

    Args:
        width_in: channels that come in.
        inner: channels in between.
        width: channels that go out.
        kernel: of the depth-wise convolution where the stride is above 1.
        stride: 1 or 2.
        squeeze: the ratio of the squeeze-and-excitation in between; 0 for none.
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
        if stride > 1:
            padding = (kernel - 1) // 2
            self.conv_dw = nn.Conv2d(
                inner, inner, kernel, stride, padding, groups=inner, bias=False
            )
            self.bn_dw = nn.BatchNorm2d(inner)
        self.se = Squeeze(inner, squeeze) if squeeze else None
        self.ghost2 = GhostModule(inner, width, relu=False)
        self.shortcut = nn.Sequential()
        if width_in != width or stride > 1:
            padding = (kernel - 1) // 2
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
    """A ghost module in the place of a convolution.

    Its batch norms and ReLUs are left out: those of the model follow it, and know the scale of what
    the convolution gave.
    The intrinsic maps start with the filters of the first m channels. Each ghost starts as the
    multiple of its map that is nearest to the filter that stood there, by least squares.
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
        """The ghost module that takes and gives what a convolution does.

        Args:
            dense: a Conv2d without groups.
            ratio: s; a quarter of the work is left at 4.
            kernel: of the cheap operation, odd.

        Raises:
            BadNetwork: another kind of layer, or a grouped convolution.
            InvalidArgument: a ratio below 2 or above the number of channels; an even kernel.
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
                f"ratio must be at most {outputs}, the number of channels, got {ratio}: less than "
                "one channel would be left"
            )
        if require_whole("kernel", kernel, 1) % 2 == 0:
            raise InvalidArgument(f"kernel must be odd, got {kernel}: an even one shifts the image")
        intrinsic = math.ceil(outputs / ratio)
        ghosts = intrinsic * (ratio - 1)
        biased = layer.bias is not None
        primary = nn.Conv2d(layer.in_channels, intrinsic, bias=biased, **geometry(layer))
        cheap = nn.Conv2d(
            intrinsic, ghosts, kernel, padding=kernel // 2, groups=intrinsic, bias=biased
        )
        filters = layer.weight.detach()
        multiples = _multiples(filters.flatten(1), intrinsic, ratio)
        made = cls(primary, cheap, outputs, ratio)
        with torch.no_grad():
            primary.weight.copy_(filters[:intrinsic])
            cheap.weight.zero_()
            cheap.weight[:, 0, kernel // 2, kernel // 2] = multiples.to(cheap.weight)
            if layer.bias is not None:
                assert primary.bias is not None
                assert cheap.bias is not None
                both = torch.zeros(intrinsic + ghosts)
                both[:outputs] = layer.bias.float()
                primary.bias.copy_(both[:intrinsic])
                # The bias of an intrinsic map goes through the cheap operation too.
                through = multiples.float() * both[:intrinsic].repeat_interleave(ratio - 1)
                cheap.bias.copy_(both[intrinsic:] - through)
        return placed_like(made, dense)

    def options(self) -> dict[str, Any]:
        """The ratio and the kernel of the cheap operation."""
        return {"ratio": self.ratio, "kernel": self.cheap.kernel_size[0]}

    def cost(self, shape: Sequence[int]) -> LayerCost:
        """What both convolutions cost."""
        return dense_cost(self, shape)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, O, H', W']."""
        intrinsic = self.primary(x)
        ghosts = self.cheap(intrinsic)
        return torch.cat([intrinsic, ghosts], 1)[:, : self.width]


def _multiples(filters: Tensor, intrinsic: int, ratio: int) -> Tensor:
    """For each ghost the multiple of its intrinsic filter nearest to the filter at its place."""
    ghosts = intrinsic * (ratio - 1)
    sources = filters[:intrinsic].repeat_interleave(ratio - 1, dim=0)  # [ghosts, C k k]
    wanted = torch.zeros_like(sources)
    there = len(filters) - intrinsic
    wanted[:there] = filters[intrinsic:]
    squares = (sources**2).sum(1).clamp_min(1e-12)
    assert len(sources) == ghosts
    return (sources * wanted).sum(1) / squares


def divisible(width: float, by: int) -> int:
    """The nearest multiple, not less than `by` and not below nine tenths of the width.

    >>> divisible(16 * 1.3, 4), divisible(10, 4)
    (20, 12)
    """
    require("width", width, above=0)
    rounded = max(by, int(width + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * width else rounded
