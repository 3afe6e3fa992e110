"""Residual networks for signals such as spectra, with exits at several depths. Inspired by SCAI,
not a reproduction of it.

Sun, Zhu, Du, Wang and Tian, 2022, arXiv 2206.12420; we know only the abstract. It has exits at
several depths, distilled from the deepest one (the recipe `distill` with hints=0.0), and
"position-adaptive" stages, in which peaks get more layers than the rest of the curve. Sizes, and
the form of those stages (layers/adaptive_depth.py), are our choice.

    model = signal_resnet_adaptive().eval()
    net = cut(model, example, at=["stage1", "stage2"], exits="linear_peaks")
    fit(net, train, recipe="pondered")  # `distill` with a price on depth

For `signal_resnet` the recipe is `distill` itself.

If a paper's loss is the cross-entropy plus a T^2 KL(deepest || exit) at a temperature T, use
`distill` with alpha = a T^2 / (1 + a T^2). The gradients of an exit are then the same, up to its
weight among all exits. Narrow peaks distinguish classes of spectra, and a mean over positions hides
them. Therefore the exits are `linear_peaks`, which also reads maxima. The model itself scales each
signal to mean 0 and deviation 1. No weights come with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offramp.layers.adaptive_depth import AdaptiveDepth

__all__ = ["signal_resnet", "signal_resnet_adaptive"]


def preprocess() -> None:
    """None: signals [B, 1, L] of any length come as they are."""
    return


def signal_resnet(classes: int = 30) -> SignalResNet:
    """Three stages of three units, with 16, 32 and 64 channels; 0.17 M parameters."""
    return SignalResNet(classes=classes)


def signal_resnet_adaptive(classes: int = 30) -> SignalResNet:
    """The same network with stages of adaptive depth: each position runs one to three units."""
    return SignalResNet(classes=classes, adaptive=True)


class SignalResNet(nn.Module):
    """Signals [B, channels, L] -> logits [B, classes]: a strided stem, stages, means and maxima, a
    linear layer.

    Args:
        units: of each stage. Stages are called stage1, stage2, ...; all but the first halve the
            length.
        widths: channels of each stage.
        classes: number of classes.
        channels: of the signals.
        adaptive: whether stages have adaptive depth.
    """

    def __init__(
        self,
        units: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        *,
        classes: int = 30,
        channels: int = 1,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        first = nn.Conv1d(channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm1d(widths[0]), nn.ReLU())
        self.names = tuple(f"stage{index}" for index in range(1, len(units) + 1))
        width_in = widths[0]
        for name, count, width in zip(self.names, units, widths, strict=True):
            stage_units = list[nn.Module]()
            for _ in range(count):
                stage_units.append(Unit(width_in, width))
                width_in = width
            stage: nn.Module = nn.Sequential(*stage_units)
            if adaptive:
                stage = AdaptiveDepth(stage_units, width)
            self.add_module(name, stage)
        self.linear = nn.Linear(2 * widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Signals [B, channels, L] -> logits [B, classes]."""
        # scale each channel to mean 0 and deviation 1
        x = x.to(self.linear.weight.dtype)
        x = x - x.mean(2, keepdim=True)
        h: Tensor = self.stem(x / (x.square().mean(2, keepdim=True).sqrt() + 1e-6))
        for name in self.names:
            h = self.get_submodule(name)(h)
        logits: Tensor = self.linear(torch.cat([h.mean(2), h.amax(2)], 1))
        return logits


class Unit(nn.Module):
    """Two convolutions over 5 positions and a shortcut. If the channels change, the shortcut takes
    every second position and adds channels of zeros.
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 2
        if width_in == width:
            self.stride = 1
        self.pad = width - width_in
        self.conv1 = nn.Conv1d(width_in, width, 5, stride=self.stride, padding=2, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 5, padding=2, bias=False)
        self.bn2 = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width_in, L] -> [B, width, L], or half the length."""
        h = torch.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        if self.pad:
            x = nn.functional.pad(x[:, :, ::2], (0, 0, 0, self.pad))  # [B, width, L / 2]
        return torch.relu(h + x)
