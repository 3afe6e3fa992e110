"""What the recipes of linear exits share: one convex phase per exit, solved on its cached pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from offramp.errors import BadNetwork
from offramp.network import Exit, Network
from offramp.recipe import Phase, Whole, taught_exits
from offramp.recipes._convex import REGULARISERS, choose, solve
from offramp.signature import is_input

__all__ = ["REGULARISERS", "phases_of", "require_linear", "solve_exit"]

HELD = 10  # without development rows every tenth row chooses


def linear_of(exit_: Exit) -> nn.Linear | None:
    """The one layer in which all parameters of an exit lie, if it is linear on pooled features."""
    layers = [part for part in exit_.modules() if any(True for _ in part.parameters(recurse=False))]
    only = layers[0] if len(layers) == 1 else None
    return only if isinstance(only, nn.Linear) and only.bias is not None else None


def require_linear(network: Network) -> None:
    """Raise BadNetwork unless every exit that has something to learn is linear on pooled features."""
    for name in taught_exits(network):
        reads_exits = not all(map(is_input, network.exit_of(name).reads))  # a mask went into the pooled features
        if linear_of(network.exit_of(name)) is None or reads_exits:
            raise BadNetwork(
                f"exit {name!r} is no linear layer on pooled features, expected linear or linear_grid; cut with "
                "exits='linear_grid', or teach it by joint with backbone=False"
            )


def phases_of(network: Network) -> list[Phase]:
    """A phase per exit that learns, shallow to deep."""
    names = taught_exits(network)
    return [Phase(name, tuple(network.exit_of(name).parameters()), reads="pooled", by="solve") for name in names]


def solve_exit(
    name: str,
    whole: Whole,
    development: Whole | None,
    loss: str,
    regulariser: float | Sequence[float],
    gap: float,
) -> Mapping[str, float]:
    """Solve for an exit's layer on all rows, with the regulariser that development rows like best, and set it."""
    layer, features, y = linear_of(whole.exits[name]), whole.features[name], whole.y
    assert layer is not None
    options = [float(each) for each in ([regulariser] if isinstance(regulariser, (int, float)) else regulariser)]
    if len(options) == 1:
        found = solve(features, y, layer.out_features, loss=loss, regulariser=options[0], gap=gap)
    else:
        held = (features[::HELD], y[::HELD]) if development is None else (development.features[name], development.y)
        found, tried = choose(features, y, layer.out_features, loss=loss, dev=held, regularisers=options, gap=gap)
        options = [max(tried, key=lambda one: one.accuracy).regulariser]
    with torch.no_grad():
        layer.weight.copy_(found.weight)
        layer.bias.copy_(found.bias)
    figures = {"regulariser": options[0], "loss": found.primal, "gap": found.gap, "steps": float(found.iterations)}
    return {f"{figure}/{name}": value for figure, value in figures.items()}
