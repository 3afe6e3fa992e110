"""The convolution units of MSDNet and RANet, and the initial weights of BranchyNet's networks."""

from __future__ import annotations

from torch import nn


def unit(
    width_in: int, width: int, kernel: int, stride: int = 1, *, he: bool = True
) -> nn.Sequential:
    """A convolution, a batch norm and a ReLU, in that order. The size is kept, divided by the
    stride.

    he: whether weights start by He's rule over the outputs; otherwise by torch's own rule.
    """
    convolution = nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2, bias=False)
    if he:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def narrowed(
    width_in: int, width: int, factor: int, stride: int = 1, *, he: bool = True
) -> nn.Sequential:
    """A 1x1 unit to `factor * width` channels (at most `width_in`), and a 3x3 unit to `width`."""
    inner = min(width_in, factor * width)
    return nn.Sequential(*unit(width_in, inner, 1, he=he), *unit(inner, width, 3, stride, he=he))


def large_stem(width: int, *, he: bool = True) -> nn.Sequential:
    """Images of 224 -> [B, width, 56, 56]: a strided 7x7 convolution and a pooling."""
    convolution = nn.Conv2d(3, width, 7, 2, padding=3)
    if he:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(
        convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
    )


def chainer_start(module: nn.Module, wscale: float = 1.0) -> None:
    """Draw a module's weights as Chainer 1.17 does, the library of BranchyNet's code.

    Those of convolutions and linear layers are normal with a deviation of sqrt(wscale / fan_in),
    where fan_in is what one output reads (LeCun's rule); biases are 0.

    Args:
        module: with the layers whose weights are drawn, in place.
        wscale: Chainer's factor for convolutions; linear layers have 1.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            scale = wscale if isinstance(layer, nn.Conv2d) else 1.0
            nn.init.normal_(layer.weight, std=(scale / layer.weight[0].numel()) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
