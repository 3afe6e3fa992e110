"""Weights and rows that can be written down in a line, to put the same into our networks and into
the authors'.

Golden values in the tests are what the authors' code gave on these, at the commit that stands
beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.building.cutting import cut
from offramp.networks.network import Network


@torch.no_grad()
def wave(value: Tensor, number: int, scale: float = 1.0) -> None:
    """Fill a tensor with scale * sin(0.37 k + number), k counting its elements from 0."""
    k = torch.arange(value.numel(), dtype=torch.float64)
    value.copy_((scale * (0.37 * k + number).sin()).reshape(value.shape))


@torch.no_grad()
def waves(module: nn.Module) -> nn.Module:
    """Fill all of a module's floating-point state, the n-th tensor by the wave of number n.

    A weight of several dimensions is scaled by the root of what each output reads; a vector by 0.2,
    with 1 added to weights and variances of norms.
    """
    floats = [
        (name, value) for name, value in module.state_dict().items() if value.is_floating_point()
    ]
    for number, (name, value) in enumerate(floats):
        if value.dim() > 1:
            wave(value, number, value[0].numel() ** -0.5)
        else:
            wave(value, number, 0.2)
            value.add_(1.0 if name.endswith(("weight", "var")) else 0.0)
    return module


def wave_of(*shape: int, step: float = 0.11, scale: float = 1.0) -> Tensor:
    """scale * sin(step k) in float32, k counting the elements from 0."""
    count = torch.Size(shape).numel()
    return scale * (step * torch.arange(count)).sin().reshape(shape)


def toy(gate: str = "margin") -> Network:
    """Rows [B, 4] to six classes, with an exit at half depth; every weight is a wave, and nothing
    is drawn.
    """
    backbone = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 6)
    )
    net = cut(backbone.eval(), torch.zeros(2, 4), at=["1"], exits="linear", gate=gate)
    layers = [backbone[0], backbone[2], backbone[4], net.exit_of("1").head[0]]
    for number, layer in enumerate(layers):
        wave(layer.weight, 2 * number, 0.6)
        wave(layer.bias, 2 * number + 1, 0.6)
    return net


def toy_rows() -> tuple[Tensor, Tensor]:
    """Four batches of ten rows for `toy`: x [4, 10, 4] and y [4, 10]."""
    return wave_of(4, 10, 4, step=1.3), (torch.arange(40) * 7 % 6).reshape(4, 10)
