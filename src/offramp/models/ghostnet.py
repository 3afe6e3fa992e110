"""GhostNet (Han et al., 2020, arXiv 1911.11907), with the module names of timm, whose weights load.

Images [B, 3, H, W] of 224 pixels; 1.0 x has 5.18 M parameters and 142 M multiply-adds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.layers.ghost import GhostBottleneck, divisible
from offramp.layers.preprocess import Preprocess

__all__ = ["ghostnet"]

# kernel, inner channels, channels, squeeze-and-excitation, stride; stages as in timm
STAGES = (
    ((3, 16, 16, 0.0, 1),),
    ((3, 48, 24, 0.0, 2),),
    ((3, 72, 24, 0.0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0.0, 2),),
    (
        (3, 200, 80, 0.0, 1),
        (3, 184, 80, 0.0, 1),
        (3, 184, 80, 0.0, 1),
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0.0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0.0, 1), (5, 960, 160, 0.25, 1)),
)
FEATURES = 1280  # of the last hidden layer


def preprocess() -> Preprocess:
    """ImageNet's preprocessing, for images of 224 pixels."""
    return Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(224, 224))


def ghostnet(classes: int = 1000, width: float = 1.0, dropout: float = 0.2) -> GhostNet:
    """GhostNet of a width. The paper has 0.5, 1.0 and 1.3.

    Args:
        classes: number of classes.
        width: factor of all channels.
        dropout: before the last layer, during training.
    """
    return GhostNet(classes, width, dropout)


class ConvBnAct(nn.Module):
    """A 1x1 convolution, batch norm and ReLU, under timm's names."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, width, H, W]."""
        return torch.relu(self.bn1(self.conv(x)))


class GhostNet(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes]: a stem, nine stages of ghost bottlenecks, and a
    head.
    """

    def __init__(self, classes: int, width: float, dropout: float) -> None:
        super().__init__()
        width_in = divisible(16 * width, 4)
        self.conv_stem = nn.Conv2d(3, width_in, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        stages: list[nn.Module] = []
        inner = 0
        for rows in STAGES:
            blocks: list[nn.Module] = []
            for kernel, expanded, channels, squeeze, stride in rows:
                out = divisible(channels * width, 4)
                inner = divisible(expanded * width, 4)
                blocks.append(GhostBottleneck(width_in, inner, out, kernel, stride, squeeze))
                width_in = out
            stages.append(nn.Sequential(*blocks))
        # after the last bottleneck, a convolution to as many channels as it has inside
        stages.append(nn.Sequential(ConvBnAct(width_in, inner)))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = nn.Conv2d(inner, FEATURES, 1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, classes]."""
        h = torch.relu(self.bn1(self.conv_stem(x)))  # [B, 16 width, H/2, W/2]
        h = self.blocks(h)  # [B, 960 width, H/32, W/32]
        h = h.mean((2, 3), keepdim=True)
        h = torch.relu(self.conv_head(h)).flatten(1)  # [B, 1280]
        logits: Any = self.classifier(self.dropout(h))
        assert isinstance(logits, Tensor)
        return logits
