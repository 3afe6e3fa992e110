"""Rows of a batch on their way: groups that meet are put together in the order of x.

Shapes: B rows handed in, n rows of a group, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """The answers that rows have got so far: places of exits [n], -1 where there is none yet, and
    logits [n, C].
    """

    places: Index
    logits: Tensor


class Group(NamedTuple):
    """Rows that wait for a stage.

    Attributes:
        rows: their numbers in x [n]; None for all of them.
        state: the named tensors that later stages read, [n, ...] each.
        size: n.
        latest: their answers so far, where those are kept.
    """

    rows: RowNumbers
    state: State
    size: int
    latest: Latest | None


def merged(groups: Sequence[Group], gather: Gather) -> Group:
    """Groups as one, in the order of x: one gather a tensor. One group comes back as it is."""
    if len(groups) == 1:
        return groups[0]
    rows = [group.rows for group in groups if group.rows is not None]
    assert len(rows) == len(groups), "all rows of x are in one group, and there is another"
    numbers = np.concatenate(rows)
    order = np.argsort(numbers)
    names = [name for name in groups[0].state if all(name in group.state for group in groups)]
    for name in names:
        shapes = {tuple(group.state[name].shape[1:]) for group in groups}
        if len(shapes) > 1:
            told = " and ".join(str(list(shape)) for shape in sorted(shapes))
            raise BadNetwork(
                f"arms that meet give rows of shapes {told} under the name {name!r}; they must "
                f"give one shape"
            )
    state = {name: torch.cat([group.state[name] for group in groups]) for name in names}
    return Group(numbers[order], gather(state, order), len(order), _latest(groups, order, gather))


def _latest(groups: Sequence[Group], order: Index, gather: Gather) -> Latest | None:
    """The answers so far of several groups; rows of a group that keeps none have none."""
    known = next((group.latest for group in groups if group.latest is not None), None)
    if known is None:
        return None
    places = list[Index]()
    logits = list[Tensor]()
    for group in groups:
        if group.latest is None:
            places.append(np.full(group.size, -1))
            logits.append(known.logits.new_zeros(group.size, known.logits.shape[1]))
        else:
            places.append(group.latest.places)
            logits.append(group.latest.logits)
    together = gather({"": torch.cat(logits)}, order)[""]
    return Latest(np.concatenate(places)[order], together)


def carried(state: State, names: Sequence[str], inputs: Sequence[str]) -> State:
    """Of a state what later stages read.

    Args:
        state: named tensors [n, ...].
        names: those that are read later; x stands for all inputs.
        inputs: names of the inputs.
    """
    found: State = {}
    for name in names:
        if name in state:
            found[name] = state[name]
        else:
            found.update({key: state[key] for key in inputs})
    return found
