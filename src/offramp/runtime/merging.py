"""Rows of a batch on their way: groups that meet are joined in the order of x.

Shapes: B rows in x, n rows of a group, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.errors import BadNetwork
from offramp.networks.inputs import State
from offramp.runtime.outputs import RowNumbers

Index = np.ndarray[Any, np.dtype[np.int64]]
Gather = Callable[[State, Index], State]


class Latest(NamedTuple):
    """The latest answer of each row.

    Attributes:
        exits: [n], the index of the exit that answered; -1 for a row without an answer.
        logits: [n, C].
    """

    exits: Index
    logits: Tensor


class Group(NamedTuple):
    """Rows that wait for a stage.

    Attributes:
        rows: their numbers in x [n]; None for all of them.
        state: the named tensors that later stages read, [n, ...] each.
        size: n.
        latest: their latest answers; None where these are not kept.
    """

    rows: RowNumbers
    state: State
    size: int
    latest: Latest | None


def merged(groups: Sequence[Group], gather: Gather) -> Group:
    """Join groups into one, in the order of x.

    Args:
        groups: that wait for the same stage. A single group is returned as it is.
        gather: picks rows of named tensors by position.

    Returns:
        The joined group. Its state has the tensors that all groups have.

    Raises:
        BadNetwork: the rows of two groups have different shapes.
    """
    if len(groups) == 1:
        return groups[0]
    numbers = list[Index]()
    for group in groups:
        assert group.rows is not None, "all rows of x are in one group, and there is another"
        numbers.append(group.rows)
    rows = np.concatenate(numbers)
    order = np.argsort(rows)

    state: State = {}
    for name in _shared_names(groups):
        values = [group.state[name] for group in groups]
        _require_one_shape(name, values)
        state[name] = torch.cat(values)  # G times [n_g, ...] -> [n, ...]
    return Group(rows[order], gather(state, order), len(order), _latest(groups, order, gather))


def _shared_names(groups: Sequence[Group]) -> list[str]:
    """The tensors that every group has, in the order of the first."""
    first, *others = groups
    names = list(first.state)
    for group in others:
        names = [name for name in names if name in group.state]
    return names


def _require_one_shape(name: str, values: Sequence[Tensor]) -> None:
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        listed = " and ".join([str(list(shape)) for shape in sorted(shapes)])
        raise BadNetwork(
            f"arms that meet must give rows of one shape, got shapes {listed} for {name!r}"
        )


def _latest(groups: Sequence[Group], order: Index, gather: Gather) -> Latest | None:
    """The latest answers of several groups. Rows of a group that keeps none have none."""
    known = [group.latest for group in groups if group.latest is not None]
    if not known:
        return None
    blank = known[0].logits
    exits = list[Index]()
    logits = list[Tensor]()
    for group in groups:
        if group.latest is None:
            exits.append(np.full(group.size, -1))
            logits.append(blank.new_zeros(group.size, blank.shape[1]))  # [n, C]
        else:
            exits.append(group.latest.exits)
            logits.append(group.latest.logits)
    ordered = gather({"": torch.cat(logits)}, order)[""]
    return Latest(np.concatenate(exits)[order], ordered)


def picked(tensors: Mapping[str, Any], index: Any) -> dict[str, Any]:
    """Rows of every tensor or array: `value[index]`, by name."""
    return {name: value[index] for name, value in tensors.items()}


def carried(state: State, names: Sequence[str], inputs: Sequence[str]) -> State:
    """The tensors of a state that later stages read.

    Args:
        state: named tensors [n, ...].
        names: those that are read later. The name x stands for all inputs.
        inputs: names of the inputs.
    """
    tensors: State = {}
    for name in names:
        if name in state:
            tensors[name] = state[name]
            continue
        for key in inputs:
            tensors[key] = state[key]
    return tensors
