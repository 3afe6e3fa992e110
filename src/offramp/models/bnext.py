"""BNext: a binary network for ImageNet (Guo et al., 2022, arXiv 2211.12933; block by block as their
code).

    sub-block   a = sign(x + b),  y = PReLU(BN(binary conv(a)))
                mix = s x' + (1 - s) y,  y = SE(mix) y        x' = x, pooled where the stride is 2
    FFN         BN(y) + shortcut(x)
    attention   r = PReLU(x), pooled where the stride is 2;  BN(y r) + r
    block       attention (even blocks) or a 3x3 FFN (odd ones), then a 1x1 FFN; where channels
                double, two 1x1 FFNs whose outputs are put side by side

Stem and last layer are float. The temperatures of weights and signs fall during the training, in
the recipe `consecutive` and in every other one that anneals layers. In eval mode weights are signs.
Stock kernels compute signs in float32, so no time is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from offramp._support.arguments import require_count
from offramp.errors import InvalidArgument
from offramp.layers.binary import Binary
from offramp.layers.preprocess import Preprocess

__all__ = ["bnext"]

# The width of the stem, then that of each block.
WIDTHS = {
    "tiny": (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024),
    "small": (48, 96, 192, 192, 384, 384, *[768] * 6, 1536, 1536),
    "middle": (48, 96, *[192] * 4, *[384] * 4, *[768] * 8, *[1536] * 4),
    "large": (64, 128, *[256] * 4, *[512] * 4, *[1024] * 16, *[2048] * 4),
}


def preprocess() -> Preprocess:
    """ImageNet's preprocessing, for images of 224 pixels."""
    return Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(224, 224))


def bnext(size: str = "tiny", classes: int = 1000, stride: int = 2, divide: int = 1) -> BNext:
    """BNext of a size.

    Args:
        size: tiny, small, middle or large.
        classes: number of classes.
        stride: of the stem; 1 for small images.
        divide: divisor of all widths, for trials.

    Raises:
        InvalidArgument: `size` is another one, or `divide` does not divide all widths.
    """
    if size not in WIDTHS:
        raise InvalidArgument(f"size must be one of {', '.join(WIDTHS)}, got {size!r}")
    require_count("divide", divide)
    widths = list[int]()
    for width in WIDTHS[size]:
        if width % divide:
            raise InvalidArgument(
                f"divide must divide the widths {sorted(set(WIDTHS[size]))}, got {divide}"
            )
        widths.append(width // divide)
    return BNext(widths, classes, stride)


class SubBlock(nn.Module):
    """The binary convolution with information re-coupling: [B, C, H, W] -> [B, C, H', W']."""

    def __init__(self, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Binary.convolution(width, width, kernel, stride)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.PReLU(width)
        self.share = nn.Parameter(torch.full((1, width, 1, 1), 0.5))
        inner = max(1, width // 8)
        self.squeeze = nn.Sequential(
            nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        y: Tensor = self.act(self.norm(self.conv(x)))  # [B, C, H', W']
        share = self.share.clamp(0, 1)
        mix = share * pooled(x, self.stride) + (1 - share) * y
        weights: Tensor = self.squeeze(mix.mean((2, 3), keepdim=True))  # [B, C, 1, 1]
        return weights * y


class FeedForward(nn.Module):
    """A sub-block that is added to its input."""

    def __init__(self, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.body = SubBlock(width, kernel, stride)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        out: Tensor = self.norm(self.body(x)) + pooled(x, self.stride)
        return out


class Attention(nn.Module):
    """A 3x3 sub-block that is multiplied with its input."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.act = nn.PReLU(width)
        self.body = SubBlock(width, 3, stride)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        rectified = pooled(self.act(x), self.stride)
        out: Tensor = self.norm(self.body(x) * rectified) + rectified
        return out


class BasicBlock(nn.Module):
    """One block: [B, C, H, W] -> [B, C or 2 C, H', W']."""

    def __init__(self, width_in: int, width: int, stride: int, index: int) -> None:
        super().__init__()
        if index % 2 == 0:
            self.first: nn.Module = Attention(width_in, stride)
        else:
            self.first = FeedForward(width_in, 3, stride)
        copies = width // width_in  # 2 if the channels double
        self.second = nn.ModuleList(FeedForward(width_in, 1) for _ in range(copies))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C or 2 C, H', W']."""
        h = self.first(x)
        return torch.cat([second(h) for second in self.second], 1)


class BNext(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes]: a stem, blocks and a head.

    Args:
        widths: of the stem and of each block.
        classes: number of classes.
        stride: of the stem.
    """

    def __init__(self, widths: list[int], classes: int, stride: int) -> None:
        super().__init__()
        first, *others = widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride, padding=1, bias=False), nn.BatchNorm2d(first)
        )
        blocks = []
        width_in = first
        for index, width in enumerate(others):
            # height and width are halved where the channels double, except in the first block
            block_stride = 1
            if index > 0 and width != width_in:
                block_stride = 2
            blocks.append(BasicBlock(width_in, width, block_stride, index))
            width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.act = nn.PReLU(width_in)
        self.head = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, classes]."""
        h = self.blocks(self.stem(x))
        logits: Tensor = self.head(self.act(h).mean((2, 3)))
        return logits


def pooled(x: Tensor, stride: int) -> Tensor:
    """The mean of 2x2 neighbours if the stride is 2. At an odd side the last pixel stays alone."""
    if stride == 1:
        return x
    return avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
