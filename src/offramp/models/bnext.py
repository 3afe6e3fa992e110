"""BNext: a binary network for ImageNet (Guo et al., 2022, arXiv 2211.12933; block by block as their
code).

    sub-block   a = sign(x + b),  y = PReLU(BN(binary conv(a)))
                mix = s x' + (1 - s) y,  y = SE(mix) y        x' = x, pooled where the stride is 2
    FFN         BN(y) + shortcut(x)
    attention   r = PReLU(x), pooled where the stride is 2;  BN(y r) + r
    block       attention (even blocks) or a 3x3 FFN (odd ones), then a 1x1 FFN; where channels
                double, two 1x1 FFNs whose outputs are put side by side

Stem and last layer are float. Temperatures of weights and signs fall while it is trained: the
recipe `consecutive`, and every other one that anneals layers, sees to it. In eval mode weights are
signs. Stock kernels compute signs in float32: no time is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

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
        classes: of the answer.
        stride: of the stem; 1 for small images.
        divide: all widths are divided by this, for trials.

    Raises:
        InvalidArgument: another size, or widths that do not divide.
    """
    if size not in WIDTHS:
        raise InvalidArgument(f"size must be one of {', '.join(WIDTHS)}, got {size!r}")
    widths = WIDTHS[size]
    if any(width % divide for width in widths) or divide < 1:
        raise InvalidArgument(f"divide must divide the widths {sorted(set(widths))}, got {divide}")
    return BNext([width // divide for width in widths], classes, stride)


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
        y: Tensor = self.act(self.norm(self.conv(x)))
        share = self.share.clamp(0, 1)
        mix = share * pooled(x, self.stride) + (1 - share) * y
        weights: Tensor = self.squeeze(mix.mean((2, 3), keepdim=True))
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
        copies = width // width_in
        self.second = nn.ModuleList(FeedForward(width_in, 1) for _ in range(copies))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C or 2 C, H', W']."""
        h = self.first(x)
        return torch.cat([part(h) for part in self.second], 1)


class BNext(nn.Module):
    """A stem, blocks, and a head."""

    def __init__(self, widths: list[int], classes: int, stride: int) -> None:
        super().__init__()
        first, *others = widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride, padding=1, bias=False), nn.BatchNorm2d(first)
        )
        blocks = []
        now = first
        for index, width in enumerate(others):
            halves = index > 0 and width != now
            blocks.append(BasicBlock(now, width, 2 if halves else 1, index))
            now = width
        self.blocks = nn.Sequential(*blocks)
        self.act = nn.PReLU(now)
        self.head = nn.Linear(now, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, classes]."""
        h = self.blocks(self.stem(x))
        logits: Tensor = self.head(self.act(h).mean((2, 3)))
        return logits


def pooled(x: Tensor, stride: int) -> Tensor:
    """The mean of neighbours where the stride is 2; the last one alone at an odd side."""
    if stride == 1:
        return x
    return avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
