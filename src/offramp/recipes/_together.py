"""What the recipes that teach models and exits together share: their parameters, a trial run, and two schedules."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from offramp.errors import BadNetwork
from offramp.inputs import State, as_inputs, given
from offramp.network import Network
from offramp.nodes import Seen
from offramp.signature import example


def parameters_of(network: Network) -> tuple[nn.Parameter, ...]:
    """Those of the models and of the exits."""
    return (*network.backbone.parameters(), *network.exits.parameters())


def seen_of(network: Network, rows: int = 2) -> dict[str, Seen]:
    """What stands at the nodes of a model that was cut, for seeded rows of the shapes that it was tried on."""
    state = as_inputs(example(network.rungs[0].inputs, rows), network.device())
    kinds = {value.dtype for value in network.parameters() if value.is_floating_point()}
    kind = kinds.pop() if len(kinds) == 1 else None
    cast: State = {name: value.to(kind) if value.is_floating_point() else value for name, value in state.items()}
    with torch.no_grad():
        return dict(network.look(given(cast)))


def require_one_width(network: Network) -> None:
    """Raise BadNetwork unless all exits of a model that was cut answer with one number of classes."""
    widths = {name: one.own.shape[1] for name, one in seen_of(network).items() if one.own is not None}
    if len(set(widths.values())) > 1:
        raise BadNetwork(
            f"the exits answer with different numbers of classes ({widths}), expected one; give exits of one width"
        )


def tenths(optimiser: Optimizer, steps: int) -> LambdaLR:
    """A tenth of the rate after half of the steps, and a hundredth after three quarters: MSDNet's on CIFAR."""
    return LambdaLR(optimiser, lambda step: 0.1 ** ((step >= steps // 2) + (step >= steps * 3 // 4)))


def cosine(optimiser: Optimizer, steps: int) -> LambdaLR:
    """From the full rate to nothing along half a cosine."""
    return LambdaLR(optimiser, lambda step: (1 + math.cos(math.pi * min(1.0, step / max(1, steps)))) / 2)
