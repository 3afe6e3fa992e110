"""What a model costs, before and after it was converted: weights, bytes, work and milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.networks.inputs import as_inputs, call_model, copies, count_of
from offramp.networks.layer import Layer, dense_cost, outer_layers, stored_bytes
from offramp.runtime.measuring import interleaved, macs

__all__ = ["Change", "Cost", "changes", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What a module costs for one row, and what it takes to store.

    Args:
        parameters: numbers that are trained, or were.
        stored_bytes: of its tensors in a file of weights.
        macs: multiply-adds of convolutions and matrix products that are computed.
        bit_operations: those times the bits of a weight and of an activation, as they are computed.
        ms: milliseconds of one call on the example; None where it was not timed.
    """

    parameters: int
    stored_bytes: int
    macs: float
    bit_operations: float
    ms: float | None = None


@dataclass(frozen=True)
class Change:
    """A module that was converted, or the whole model under the name "": its cost before and
    after.
    """

    name: str
    kind: str
    before: Cost
    after: Cost


def cost_of(model: nn.Module, example: Any, *, timed: bool = False) -> Cost:
    """The cost of a model as it stands.

    Args:
        model: in eval mode.
        example: a small batch as the model takes it.
        timed: whether a call on the example is timed too.
    """
    state = as_inputs(example)
    rows = count_of(state)
    call = partial(_call, model, state)
    total = macs(call) / rows
    layers = outer_layers(model)
    shapes = _shapes(model, layers, call)
    bits = 8 * _float_size(model)
    operations = total * bits * bits
    stored = stored_bytes(model)
    for name, layer in layers.items():
        stored += (
            layer.cost(shapes[name]).stored_bytes - stored_bytes(layer) if name in shapes else 0
        )
        if name in shapes:
            own = layer.cost(shapes[name])
            operations += own.bit_operations - dense_cost(layer, shapes[name]).bit_operations
    ms = None
    if timed:
        ms = float(np.median(interleaved({"call": call}, repeats=5)["call"]))
    return Cost(_parameters(model), stored, total, operations, ms)


def changes(
    before: nn.Module, after: nn.Module, example: Any, *, timed: bool = True
) -> list[Change]:
    """Each converted module and the whole model, before and after.

    Args:
        before: the original, in eval mode.
        after: the converted copy, in eval mode.
        example: a batch as both take it; milliseconds are those of a call on it, interleaved.
        timed: whether calls are timed.

    Returns:
        One entry per converted module in the order of the model, then one for the whole under "".
    """
    state = as_inputs(example)
    old = dict(before.named_modules())
    changes: list[Change] = []
    names = _changed(before, after)
    inputs = _inputs(before, names, partial(_call, before, state))
    for name in names:
        if name not in inputs:
            continue  # it does not run on this example
        new = after.get_submodule(name)
        x = inputs[name]
        if isinstance(new, Layer):
            kind = type(new).__name__
            pair = _pair(old[name], new, x, x, timed=timed)
            changes.append(Change(name, kind, *pair))
    pair = _pair(before, after, example, example, timed=timed)
    changes.append(Change("", "model", *pair))
    return changes


def _pair(before: nn.Module, after: nn.Module, x: Any, y: Any, *, timed: bool) -> tuple[Cost, Cost]:
    """Both costs, timed in turns."""
    first = cost_of(before, x)
    second = cost_of(after, y)
    if not timed:
        return first, second
    calls: dict[str, Callable[[], object]] = {
        "before": partial(_call, before, as_inputs(x)),
        "after": partial(_call, after, as_inputs(y)),
    }
    times = interleaved(calls, repeats=5, warmup=2)
    both = [float(np.median(times[name])) for name in ("before", "after")]
    return _timed(first, both[0]), _timed(second, both[1])


def _timed(cost: Cost, ms: float) -> Cost:
    return Cost(cost.parameters, cost.stored_bytes, cost.macs, cost.bit_operations, ms)


def _call(model: nn.Module, state: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        return call_model(model, None, copies(state))


def _parameters(model: nn.Module) -> int:
    """Trained numbers; of packed layers, which have none, the weights that they stand for."""
    count = sum(value.numel() for value in model.parameters())
    for module in model.modules():
        if isinstance(module, Layer) and not list(module.parameters()):
            count += sum(value.numel() for value in module.buffers() if value.is_floating_point())
    return count


def _float_size(model: nn.Module) -> int:
    floats = [value for value in model.parameters() if value.is_floating_point()]
    return floats[0].element_size() if floats else 4


def _changed(before: nn.Module, after: nn.Module) -> list[str]:
    """The modules that were replaced, by name."""
    old = dict(before.named_modules())
    return [name for name in outer_layers(after) if name in old and name]


def _inputs(model: nn.Module, names: list[str], call: Callable[[], Any]) -> dict[str, Tensor]:
    """What modules take in a call."""
    found: dict[str, Tensor] = {}

    def heard(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found[name] = args[0].clone()

    handles = []
    try:
        for name in names:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(partial(heard, name))
            )
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _shapes(
    model: nn.Module, layers: dict[str, Layer], call: Callable[[], Any]
) -> dict[str, tuple[int, ...]]:
    """The shape of one row that each layer takes."""
    found = _inputs(model, list(layers), call)
    return {name: tuple(value.shape[1:]) for name, value in found.items()}
