"""The columns of a trace: their names, types and shapes.

A trace holds one NumPy array per column:

    logits/<exit>   [N, C] float32      left out with keep="answers"
    answer/<exit>   [N]    int64        the arg max of the logits; the first one wins a tie
    ..../backbone           logits and answer of the plain last model, where the last exit gives
                            something different (a mean)
    score/<gate>    [N]    float32      with K > 2 successors: score/<gate>@<route>, K-1 columns
    label, row      [N]    int64        label may be missing; row is the number in the data's source
    digest          [N]    uint64       of a row's content, so that overlap is noticed
    learned         [N]    bool         whether `fit` trained the network with this row; absent
                                        where nothing was fitted
    cost/<part>     [3] or [N, 3]       MACs per row, milliseconds per call a, milliseconds per row
                                        b (a call on n rows takes a + b n)

In a network with forks the answer for a row depends on its path, so every path is recorded, up to
sixteen per node. If several paths lead to an exit or a gate, its columns are called <name>#0,
<name>#1, in the order of `Topology.paths`. A network with more paths is recorded at settings of one
dial, a threshold that all gates share. Setting 0 closes every gate:

    setting/exit#<s>, setting/answer#<s>, setting/why#<s>  [N] int64, setting/near#<s> [N] bool,
    setting/<node>#<s> [N] bool (whether the node ran)

A part is segment/<node>, exit/<node> or gate/<node>. Where milliseconds were measured there are
also runner, runner/<gate> and plain (see `pricing`). Milliseconds are NaN where they were not
measured. The MACs of a segment are NaN where they are not known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
BACKBONE = "backbone"
# The kinds of NumPy types that a column may have, by the first word of its name.
KINDS = {
    "logits": "f",
    "score": "f",
    "cost": "f",
    "answer": "iu",
    "label": "iu",
    "row": "iu",
    "digest": "u",
    "learned": "b",
}


def require_column(name: str, column: Array, n: int, classes: int) -> None:
    """Raise ValueError for a column from a file that differs from the list at the top of this
    module.

    Columns with names that are not in the list may have any form.

    Args:
        name: of the column.
        column: the array.
        n: the number of rows.
        classes: C, of the network.
    """
    group = name.partition("/")[0]
    if group not in KINDS:
        return
    kinds = KINDS[group]
    shapes: dict[str, list[tuple[int, ...]]] = {"logits": [(n, classes)], "cost": [(3,), (n, 3)]}
    expected = shapes.get(group, [(n,)])
    if column.dtype.kind not in kinds or column.shape not in expected:
        raise ValueError(
            f"column {name!r} is {column.dtype} {list(column.shape)}, expected {list(expected[-1])}"
        )
    if not column.size:
        return
    if group == "answer" and not 0 <= column.min() <= column.max() < classes:
        raise ValueError(f"column {name!r} has answers outside of 0 to {classes - 1}")
    if group == "label" and column.min() < 0:
        raise ValueError(f"column {name!r} has negative labels")
    # a cost may be NaN: it was not measured
    if group == "cost" and (np.isinf(column).any() or (column < 0).any()):
        raise ValueError(f"column {name!r} has costs that are negative or infinite")


def digest_of_columns(columns: Mapping[str, Array]) -> str:
    """SHA-256 over names, types, shapes and bytes of all columns."""
    mark = hashlib.sha256()
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        mark.update(json.dumps([name, column.dtype.str, column.shape]).encode())
        # the bytes themselves: a copy would double a big trace
        mark.update(column.reshape(-1).view(np.uint8).data)
    return mark.hexdigest()
