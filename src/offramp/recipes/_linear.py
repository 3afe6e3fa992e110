"""What the recipes of linear exits share: one convex phase per exit, solved on its cached pooled
features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from offramp._support.arguments import require
from offramp.errors import BadNetwork, GapNotReached, InvalidArgument
from offramp.networks.network import Network
from offramp.networks.nodes import Exit
from offramp.networks.recipe import FeatureTable, Phase, trainable_exits
from offramp.plans.signature import is_input
from offramp.recipes._convex import REGULARIZERS, ROUGH, Tried, choose, solve

__all__ = ["REGULARIZERS", "phases_of", "require_linear", "require_numbers", "solve_exit"]

HELD = 10  # without development rows every tenth row chooses, where there are so many


def linear_of(exit_: Exit) -> nn.Linear | None:
    """The one layer in which all parameters of an exit lie, if it is linear on pooled features."""
    layers = [part for part in exit_.modules() if any(True for _ in part.parameters(recurse=False))]
    only = layers[0] if len(layers) == 1 else None
    return only if isinstance(only, nn.Linear) and only.bias is not None else None


def require_linear(network: Network) -> None:
    """Raise BadNetwork unless every exit that has something to learn is linear on pooled
    features.
    """
    for name in trainable_exits(network):
        # a mask went into the pooled features
        reads_exits = not all(map(is_input, network.exit_of(name).reads))
        if linear_of(network.exit_of(name)) is None or reads_exits:
            raise BadNetwork(
                f"exit {name!r} must be a linear layer on pooled features (linear or "
                f"linear_grid). Cut with "
                "exits='linear_grid', or train it by joint with backbone=False"
            )


def require_numbers(regularizer: object, gap: object) -> None:
    """Raise InvalidArgument unless these are a regularizer, or several, and a gap, before anything
    is pooled.
    """
    if isinstance(regularizer, (list, tuple)):
        several = list(regularizer)
    else:
        several = [regularizer]
    if not several:
        raise InvalidArgument("regularizer must have at least one number, got none")
    for one in several:
        require("regularizer", one, above=0)
    require("gap", gap, above=0)


def list_of(regularizer: float | Sequence[float]) -> list[float]:
    """One regularizer or several as a list."""
    return [
        float(each)
        for each in ([regularizer] if isinstance(regularizer, (int, float)) else regularizer)
    ]


def best_of(tried: Sequence[Tried]) -> float:
    """The regularizer that did best; of equals the strongest, which came first."""
    return max(tried, key=lambda one: one.accuracy).regularizer


def phases_of(network: Network) -> list[Phase]:
    """A phase per exit that learns, shallow to deep."""
    names = trainable_exits(network)
    return [
        Phase(name, tuple(network.exit_of(name).parameters()), reads="pooled", by="solve")
        for name in names
    ]


def solve_exit(
    name: str,
    table: FeatureTable,
    development: FeatureTable | None,
    loss: str,
    regularizer: float | Sequence[float],
    gap: float,
) -> Mapping[str, float]:
    """Solve for an exit's layer on all rows, with the regularizer that development rows like best,
    and set it.

    Without such rows every tenth row chooses among what the other nine trained; then all rows
    train.
    """
    layer = linear_of(table.exits[name])
    features = table.features[name]
    y = table.y
    assert layer is not None
    options = list_of(regularizer)
    classes = layer.out_features
    if development is None:
        held = (features, y)
    else:
        held = (development.features[name], development.y)
    chooses = (torch.arange(len(y) // table.copies) % HELD == HELD - 1).repeat(table.copies)
    if len(options) == 1:
        found = solve(features, y, classes, loss=loss, regularizer=options[0], gap=gap)
    elif development is None and chooses.any():
        rest = (features[~chooses], y[~chooses])
        held = (features[chooses], y[chooses])
        rough, tried = choose(*rest, classes, loss=loss, dev=held, regularizers=options, gap=ROUGH)
        options = [best_of(tried)]
        found = solve(features, y, classes, loss=loss, regularizer=options[0], gap=gap, start=rough)
    else:
        found, tried = choose(
            features, y, classes, loss=loss, dev=held, regularizers=options, gap=gap
        )
        options = [best_of(tried)]
    if found.gap > gap:
        warnings.warn(
            f"exit {name!r} was solved to a duality gap of {found.gap:.2g} in {found.iterations:,} "
            f"steps, asked for {gap:.2g}. Raise gap=, or the regularizer, if that is not enough.",
            GapNotReached,
            stacklevel=2,
        )
    with torch.no_grad():
        layer.weight.copy_(found.weight)
        layer.bias.copy_(found.bias)
    figures = {
        "regularizer": options[0],
        "loss": found.primal,
        "gap": found.gap,
        "steps": float(found.iterations),
    }
    return {f"{figure}/{name}": value for figure, value in figures.items()}
