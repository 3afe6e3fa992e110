"""Parts that the recipes of linear exits share: one convex phase per exit, solved on its cached
pooled features.
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

HELD = 10  # without development rows, every tenth row chooses the regularizer


def linear_of(exit_: Exit) -> nn.Linear | None:
    """The linear layer with a bias that has all parameters of an exit, or None."""
    layers = list[nn.Module]()
    for module in exit_.modules():
        if next(module.parameters(recurse=False), None) is not None:
            layers.append(module)
    if len(layers) != 1:
        return None
    layer = layers[0]
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return None
    return layer


def require_linear(network: Network) -> None:
    """Raise BadNetwork unless every trainable exit is linear on pooled features."""
    for name in trainable_exits(network):
        # A mask is an input that is already part of the pooled features.
        reads_exits = not all(map(is_input, network.exit_of(name).reads))
        if linear_of(network.exit_of(name)) is None or reads_exits:
            raise BadNetwork(
                f"exit {name!r} must be a linear layer on pooled features (linear or "
                "linear_grid). Cut with exits='linear_grid', or train it by joint with "
                "backbone=False"
            )


def require_numbers(regularizer: object, gap: object) -> None:
    """Check the numbers before anything is pooled.

    Args:
        regularizer: one number above 0, or a list of them.
        gap: a number above 0.

    Raises:
        InvalidArgument: one of them is not.
    """
    if isinstance(regularizer, (list, tuple)):
        several = list(regularizer)
    else:
        several = [regularizer]
    if not several:
        raise InvalidArgument("regularizer must have at least one number, got none")
    for number in several:
        require("regularizer", number, above=0)
    require("gap", gap, above=0)


def list_of(regularizer: float | Sequence[float]) -> list[float]:
    """One regularizer or several as a list."""
    if isinstance(regularizer, (int, float)):
        return [float(regularizer)]
    return list(map(float, regularizer))


def best_of(tried: Sequence[Tried]) -> float:
    """The regularizer with the highest accuracy; of equals the strongest, which came first."""
    return max(tried, key=lambda trial: trial.accuracy).regularizer


def phases_of(network: Network) -> list[Phase]:
    """A phase per exit that learns, shallow to deep."""
    phases = list[Phase]()
    for name in trainable_exits(network):
        parameters = tuple(network.exit_of(name).parameters())
        phases.append(Phase(name, parameters, reads="pooled", by="solve"))
    return phases


def solve_exit(
    name: str,
    table: FeatureTable,
    development: FeatureTable | None,
    loss: str,
    regularizer: float | Sequence[float],
    gap: float,
) -> Mapping[str, float]:
    """Solve for an exit's layer on all rows, and set its weights.

    The regularizer is the one with the highest accuracy on the development rows. Without such rows,
    every tenth row takes their place while the other nine train; then all rows train.

    Args:
        name: of the exit.
        table: cached pooled features and labels, all copies (augmentations) of the training rows.
        development: the same of rows that choose the regularizer.
        loss: the name of the loss.
        regularizer: one, or several to choose from.
        gap: the duality gap at which the solver stops.

    Returns:
        Figures of the solution: `regularizer/NAME`, `loss/NAME`, `gap/NAME` and `steps/NAME`.
    """
    layer = linear_of(table.exits[name])
    features = table.features[name]  # [N, F]
    y = table.y  # [N]
    assert layer is not None
    options = list_of(regularizer)
    classes = layer.out_features
    # Every tenth row, with all of its copies, so that no copy of a row that chooses is trained on.
    is_tenth = torch.arange(len(y) // table.copies) % HELD == HELD - 1
    chooses = is_tenth.repeat(table.copies)  # [N]

    if len(options) == 1:
        best = options[0]
        solution = solve(features, y, classes, loss=loss, regularizer=best, gap=gap)
    elif development is None and chooses.any():
        # Choose roughly on nine tenths of the rows, then solve on all from there.
        rest = (features[~chooses], y[~chooses])
        held = (features[chooses], y[chooses])
        rough, tried = choose(*rest, classes, loss=loss, dev=held, regularizers=options, gap=ROUGH)
        best = best_of(tried)
        solution = solve(features, y, classes, loss=loss, regularizer=best, gap=gap, start=rough)
    else:
        # With fewer than ten rows and no development rows, the training rows choose.
        held = (features, y)
        if development is not None:
            held = (development.features[name], development.y)
        solution, tried = choose(
            features, y, classes, loss=loss, dev=held, regularizers=options, gap=gap
        )
        best = best_of(tried)

    if solution.gap > gap:
        warnings.warn(
            f"exit {name!r} was solved to a duality gap of {solution.gap:.2g} in "
            f"{solution.iterations:,} steps, asked for {gap:.2g}. Raise gap=, or the regularizer, "
            "if that is not enough.",
            GapNotReached,
            stacklevel=2,
        )
    with torch.no_grad():
        layer.weight.copy_(solution.weight)
        layer.bias.copy_(solution.bias)
    return {
        f"regularizer/{name}": best,
        f"loss/{name}": solution.primal,
        f"gap/{name}": solution.gap,
        f"steps/{name}": float(solution.iterations),
    }
