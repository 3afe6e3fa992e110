"""ResNet-50 for ImageNet (He et al., 2015, arXiv 1512.03385), with the stride in the 3x3
convolution.

Module names are those of torchvision's model, so that its weights load strictly. No weights come
with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.layers.preprocess import Preprocess
from offramp.models._bottleneck import EXPANSION, BottleneckConvolutions

__all__ = ["resnet50"]


def preprocess() -> Preprocess:
    """Images of 224 x 224, normalised by ImageNet's constants."""
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    return Preprocess(mean=mean, std=std, size=(224, 224), short=256)


def resnet50(classes: int = 1000) -> ResNet50:
    """25.6 M parameters, 4.09 G MACs at 224 x 224."""
    return ResNet50(classes)


class ResNet50(nn.Module):
    """Images [B, 3, H, W] -> logits [B, classes]: a stem and 3, 4, 6 and 3 bottleneck blocks."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, 3, stride=1)
        self.layer2 = _stage(256, 128, 4, stride=2)
        self.layer3 = _stage(512, 256, 6, stride=2)
        self.layer4 = _stage(1024, 512, 3, stride=2)
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        h = self.maxpool(torch.relu(self.bn1(self.conv1(x))))  # [B, 64, H/4, W/4]
        h = self.layer2(self.layer1(h))  # [B, 512, H/8, W/8]
        h = self.layer4(self.layer3(h))  # [B, 2048, H/32, W/32]
        logits: Tensor = self.fc(h.mean((2, 3)))
        return logits


class WideBottleneck(BottleneckConvolutions):
    """A bottleneck block whose shortcut has torchvision's name, `downsample`."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__(width_in, width, stride)
        wide = EXPANSION * width
        self.downsample: nn.Sequential | None = None
        if stride > 1 or width_in != wide:
            shortcut = nn.Conv2d(width_in, wide, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, H, W] -> [B, 4 width, H / stride, W / stride]."""
        h = self.residual(x)
        if self.downsample is None:
            return torch.relu(h + x)
        return torch.relu(h + self.downsample(x))


def _stage(width_in: int, width: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Blocks of one width; the first has the stride."""
    units: list[nn.Module] = [WideBottleneck(width_in, width, stride)]
    for _ in range(blocks - 1):
        units.append(WideBottleneck(EXPANSION * width, width, 1))
    return nn.Sequential(*units)
