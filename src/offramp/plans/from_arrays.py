"""The columns and the header of a trace, from the recorded logits of models that ran elsewhere.

`Trace.from_arrays` uses it. Imports torch only for the scores of a gate.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from offramp._support.arguments import require_flag
from offramp._support.find import find
from offramp.errors import BadData, InvalidArgument
from offramp.plans.columns import Array
from offramp.plans.digests import digests_of
from offramp.plans.header import Header
from offramp.plans.provenance import Origin, largest_of
from offramp.plans.signature import is_label
from offramp.plans.topology import Node, Topology


def columns_of_arrays(
    logits: Mapping[str, Any],
    costs: Mapping[str, float | tuple[float, float]],
    *,
    labels: Any,
    probabilities: bool,
    unit: str,
    gate: str,
    scores: Mapping[str, Any] | None,
    inputs: Any,
    digests: Any,
    rows: Any,
    network: str,
    shared: bool,
    data: str,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Array], Header]:
    """Make the columns and the header of a trace.

    Arguments and errors are those of `Trace.from_arrays`.
    """
    probabilities = require_flag("probabilities", probabilities)
    shared = require_flag("shared", shared)
    names = tuple(logits)
    values = {}
    for name, array in logits.items():
        values[name] = _logits_of(name, array, probabilities)
    count, classes = _one_shape(values)
    if len(names) < 2:
        raise BadData(f"logits must hold at least two exits, got {list(names)}")
    not_finite = np.flatnonzero(~np.isfinite(values[names[-1]]).all(1)).size
    if not_finite:
        raise BadData(
            f"the logits of the last exit must be finite, got {not_finite} rows of "
            f"{names[-1]!r} that are not"
        )
    if set(costs) != set(names):
        raise InvalidArgument(f"costs must hold one for each of {list(names)}, got {list(costs)}")
    inputs, labels = _apart_from_label(inputs, labels)
    if rows is None:
        rows = np.arange(count)
    columns: dict[str, Array] = {
        "row": _column("rows", rows, count, np.int64),
        "digest": _digests(values, inputs, digests, count),
    }
    if labels is not None:
        columns["label"] = _column("labels", labels, count, np.int64)
        low = int(columns["label"].min())
        high = int(columns["label"].max())
        if low < 0 or high >= classes:
            raise BadData(f"labels must be between 0 and {classes - 1}, got {low} to {high}")
    for name in names:
        columns[f"logits/{name}"] = values[name]
        columns[f"answer/{name}"] = values[name].argmax(1)
        columns[f"cost/segment/{name}"] = _cost_of(name, costs[name], unit)
    score_source = "scores"
    if scores is None:
        score_source = gate
        scores = _scored(values, gate)
    if set(scores) != set(names[:-1]):
        raise InvalidArgument(
            f"scores must hold one for each of {list(names[:-1])}, got {list(scores)}"
        )
    for name in names[:-1]:
        score = _column("scores", scores[name], count, np.float32)
        # a row with logits that are not finite never leaves: NaN is not above any threshold
        is_finite = np.isfinite(values[name]).all(1)
        columns[f"score/{name}"] = np.where(is_finite, score, np.float32(np.nan))

    # Models of their own start from the input; exits of one network continue the one before.
    earlier: dict[str, tuple[str, ...]] = {}
    if shared:
        earlier = {name: (before,) for before, name in pairwise(names)}
    topology = Topology.chain([Node(name, after=earlier.get(name, ())) for name in names])
    identity = json.dumps([network, names, shared, score_source])
    origin = Origin(
        hashlib.sha256(identity.encode()).hexdigest()[:16],
        "elsewhere",
        "float32",
        largest_logit=max(largest_of(values[name]) for name in names[:-1]),
    )
    digest_bytes = columns["digest"].astype("<u8").tobytes()
    header = Header(
        topology=topology,
        reference=names[-1],
        classes=classes,
        data=data,
        data_fingerprint=hashlib.sha256(digest_bytes).hexdigest()[:16],
        origin=origin,
        class_names=None if class_names is None else tuple(map(str, class_names)),
    )
    return columns, header


def _logits_of(name: str, array: Any, probabilities: bool) -> Array:
    """Logits [N, C] float32 of one exit."""
    values = _array(f"the logits of {name!r}", array)
    if values.ndim != 2 or not len(values) or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise BadData(
            f"the logits of {name!r} must be numbers [N, C] of at least one row and two classes, "
            f"got {values.dtype.name} {list(values.shape)}"
        )
    values = values.astype(np.float32)
    if not probabilities:
        return values
    # softmax in half precision is exact to about 0.01
    sums = values.sum(1, keepdims=True)  # [N, C] -> [N, 1]
    is_wrong = (values < -0.01) | (values > 1.01) | (np.abs(sums - 1) > 0.01)  # [N, C]
    if is_wrong.any():
        row = int(is_wrong.any(1).argmax())
        raise BadData(
            f"the probabilities of {name!r} must be between 0 and 1 and sum to 1, got "
            f"{values[row]} (row {row})"
        )
    logarithm: Array = np.log(np.clip(values, 1e-7, 1))
    return logarithm


def _one_shape(values: Mapping[str, Array]) -> tuple[int, int]:
    """N and C of all exits' logits."""
    shapes = {name: array.shape for name, array in values.items()}
    if len(set(shapes.values())) != 1:
        raise BadData(f"logits must have one and the same shape [N, C] in every exit, got {shapes}")
    rows, classes = next(iter(shapes.values()))
    return int(rows), int(classes)


def _array(what: str, value: Any) -> Array:
    """Numbers as an array. Takes tensors of any device and type, also with a gradient."""
    if callable(getattr(value, "detach", None)):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy does not have this type
            value = value.float()
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as problem:
        kind = type(value).__name__
        raise BadData(
            f"{what} must be one array or tensor of numbers, got a {kind} that is not ({problem})"
        ) from None


def _apart_from_label(inputs: Any, labels: Any) -> tuple[Any, Any]:
    """Separate the label from the inputs. Raises BadData where two labels differ."""
    if not isinstance(inputs, Mapping) or not any(map(is_label, inputs)):
        return inputs, labels
    others = {}
    for name, value in inputs.items():
        if not is_label(name):
            others[name] = value
            continue
        if labels is not None and not np.array_equal(
            _array("labels", labels), _array(f"inputs[{name!r}]", value)
        ):
            raise BadData(
                f"inputs[{name!r}] is taken as the label of a row, and differs from labels; leave "
                f"one of them out"
            )
        labels = value
    return others, labels


def _column(what: str, value: Any, count: int, kind: Any) -> Array:
    """Values [N] of a column. Raises BadData for other shapes and types."""
    values = _array(what, value)
    if np.dtype(kind).kind in "iu":  # fractions are refused, not rounded
        kinds = "whole numbers"
        allowed = "iu"
    else:
        kinds = "numbers"
        allowed = "iuf"
    if values.shape != (count,) or values.dtype.kind not in allowed:
        raise BadData(
            f"{what} must be {kinds} [{count}], got {values.dtype.name} {list(values.shape)}"
        )
    return values.astype(kind)


def _digests(values: Mapping[str, Array], inputs: Any, digests: Any, count: int) -> Array:
    """The digests of the rows, uint64 [N]: as given, of the inputs, or of all logits of a row."""
    if digests is not None:
        return _column("digests", digests, count, np.uint64)
    if inputs is None:
        logits = np.concatenate(list(values.values()), axis=1)  # E arrays [N, C] -> [N, E C]
        return digests_of(logits + np.float32(0))  # + 0 makes 0.0 of -0.0
    is_named = isinstance(inputs, Mapping)
    arrays = dict[str, Array]()
    for name, value in (inputs if is_named else {"": inputs}).items():
        what = f"inputs[{name!r}]" if is_named else "inputs"
        array = _array(what, value)
        if array.dtype.kind not in "biufc":
            raise BadData(
                f"{what} must be numbers [N, ...], got {array.dtype.name}. For texts give the "
                f"token ids, or pass a hash of each text as uint64 in digests=."
            )
        arrays[str(name)] = array
    if not arrays:
        raise BadData("inputs must hold at least one array [N, ...] besides the label, got none")
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if lengths != {count}:
        raise BadData(f"inputs must have {count} rows, as the logits, got {sorted(lengths)}")
    return digests_of(arrays if is_named else arrays[""])


def _cost_of(name: str, cost: float | tuple[float, float], unit: str) -> Array:
    """A price [3] of a part: MACs, milliseconds per call and per row; NaN where it is not known."""
    pair = np.asarray(cost, float).ravel()
    if unit not in ("ms", "macs"):
        raise InvalidArgument(f"unit must be 'ms' or 'macs', got {unit!r}")
    if len(pair) not in (1, 2) or (unit == "macs" and len(pair) == 2):
        raise InvalidArgument(
            f"the cost of {name!r} must be a number, or in milliseconds a pair, got {cost!r}"
        )
    if not (np.isfinite(pair).all() and (pair >= 0).all() and pair.sum() > 0):
        raise InvalidArgument(f"the cost of {name!r} must be above 0 and finite, got {cost!r}")
    if unit == "macs":
        return np.array([pair[0], np.nan, np.nan])
    # one number is per row, and the call itself is free
    call = pair[0] if len(pair) == 2 else 0.0
    return np.array([np.nan, call, pair[-1]])


def _scored(values: Mapping[str, Array], gate: str) -> dict[str, Array]:
    """A gate's scores [N] of every exit but the last. Raises InvalidArgument for a gate that reads
    more than logits.
    """
    import torch

    function = find("gates", gate)
    if not inspect.isfunction(function) or "reads" in inspect.signature(function).parameters:
        raise InvalidArgument(
            f"gate must be a function of one exit's logits, got {gate!r}; give scores= for others"
        )
    scores = {}
    for name in list(values)[:-1]:
        logits = torch.from_numpy(values[name])
        scores[name] = function(logits).float().numpy()  # [N, C] -> [N]
    return scores
