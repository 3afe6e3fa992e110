"""The four layouts of D2NN (Liu and Deng, 2018, arXiv 1701.00299), each in a line.

D2NN-style: the paper names the layouts, and its tables are not public. Train any of them with the
recipes `d2nn` or `gumbel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from offramp.building.routing import Fork, GateLike, Leave, route
from offramp.errors import InvalidArgument
from offramp.networks.network import Network

__all__ = ["cascade", "chain", "hierarchy", "high_low"]


def high_low(
    trunk: nn.Module,
    low: nn.Module,
    high: nn.Module,
    head: nn.Module,
    *,
    example: Any,
    gate: GateLike = "controller",
) -> Network:
    """A trunk, a part of low or high capacity, and a head for both.

    Args:
        trunk: reads the input.
        low: the cheap part.
        high: the dear part, which gives the same shape.
        head: answers.
        example: a batch.
        gate: chooses, as in `Fork`.

    Returns:
        The network, with the fork `capacity`.
    """
    return route(
        [("trunk", trunk), Fork("capacity", {"low": low, "high": high}, gate), ("head", head)],
        example=example,
    )


def cascade(
    stages: Sequence[nn.Module],
    *,
    example: Any,
    exit: Any = "linear_grid",
    gate: GateLike = "controller",
) -> Network:
    """Stages behind each other, with an exit after each but the last: reject or answer now, or go
    on.

    Args:
        stages: at least two; the last one answers.
        example: a batch.
        exit: what answers after the others.
        gate: decides, as in `Leave`.

    Returns:
        The network, with segments `stage1`, `stage2` and exits `exit1`, `exit2`.
    """
    if len(stages) < 2:
        raise InvalidArgument(f"a cascade needs at least two stages, got {len(stages)}")
    steps: list[Any] = []
    for number, stage in enumerate(stages, 1):
        steps.append((f"stage{number}", stage))
        if number < len(stages):
            steps.append(Leave(f"exit{number}", exit, gate))
    return route(steps, example=example)


def chain(
    stem: nn.Module,
    links: Sequence[Mapping[str, nn.Module | None]],
    head: nn.Module,
    *,
    example: Any,
    gate: GateLike = "controller",
) -> Network:
    """Links behind each other, each of them heavy, light, or nothing.

    Args:
        stem: reads the input.
        links: of each its ways by name, the cheap ones first; None skips.
        head: answers.
        example: a batch.
        gate: chooses, as in `Fork`.

    Returns:
        The network, with forks `link1`, `link2`, whose arms are called `link1-light` and so on.
    """
    if not links:
        raise InvalidArgument("a chain needs at least one link, got none")
    steps: list[Any] = [("stem", stem)]
    for number, link in enumerate(links, 1):
        arms: dict[str, Any] = {}
        for name, module in link.items():
            arms[f"link{number}-{name}"] = [] if module is None else module
        steps.append(Fork(f"link{number}", arms, gate))
    return route([*steps, ("head", head)], example=example)


def hierarchy(
    trunk: nn.Module,
    groups: Mapping[str, Mapping[str, nn.Module]],
    *,
    example: Any,
    gate: GateLike = "controller",
) -> Network:
    """A coarse choice among groups of classes, and within each group among its experts. Every
    expert answers.

    Args:
        trunk: reads the input.
        groups: by name the experts by name, the cheap ones first, each of which gives logits of all
            classes.
        example: a batch.
        gate: chooses among groups, and among experts.

    Returns:
        The network, with the fork `group`, and one named after each group that has several experts.
    """
    arms: dict[str, Any] = {}
    for name, experts in groups.items():
        named = {f"{name}-{expert}": module for expert, module in experts.items()}
        if len(named) == 1:
            arms[name] = [*named.items()]
        else:
            arms[name] = [Fork(name, named, gate)]
    return route([("trunk", trunk), Fork("group", arms, gate)], example=example)
