"""The cost of every exit as the counter of MSDNet's authors has it, which ours is not: and images
for such networks.
"""

from __future__ import annotations

import torch
from torch import nn

from offramp.exits.strided import Strided


def costs_of_exits(model: nn.Module, size: int) -> tuple[list[float], list[int]]:
    """Million operations up to each exit, earlier classifiers included, and the channels that each
    classifier reads.

    Convolutions without, linear layers with their biases, one for each value into a ReLU, k * k for
    each pooled value.
    """
    spent = [0.0]
    costs = []
    widths = []
    cuts = [model.get_submodule(cut) for cut in model.cuts]
    classes = model.head[-1].out_features
    wide = size > 32

    def heard(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, nn.Conv2d):
            spent[0] += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            spent[0] += module.weight.numel() + module.bias.numel()
        elif isinstance(module, nn.ReLU):
            spent[0] += inputs[0][0].numel()
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            spent[0] += module.kernel_size**2 * output[0].numel()
        elif module in cuts:
            Strided(output[0].shape[1:], classes, None if wide else 128).eval().layers(output[0])
            costs.append(spent[0] / 1e6)
            widths.append(output[0].shape[1])

    handle = nn.modules.module.register_module_forward_hook(heard)
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    finally:
        handle.remove()
    return [*costs, spent[0] / 1e6], [*widths, model.head[0].in_channels]


def colours(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 32, 32], and which of their three colours is the strongest."""
    y = torch.arange(count) % 3
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(count), y] += 1.0
    return x, y
