"""What MSDNet and RANet are built of."""

from __future__ import annotations

from torch import nn


def unit(width_in: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU, in that order; weights by He's rule over what goes out."""
    convolution = nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def narrowed(width_in: int, width: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 unit behind a 1x1 one of `factor` times as many channels as go out, or as many as come in if fewer."""
    inner = min(width_in, factor * width)
    return nn.Sequential(*unit(width_in, inner, 1), *unit(inner, width, 3, stride))


def large_stem(width: int) -> nn.Sequential:
    """Images of 224 -> [B, width, 56, 56]: a strided 7x7 convolution and a pooling."""
    convolution = nn.Conv2d(3, width, 7, 2, padding=3)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
