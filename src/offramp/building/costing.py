"""Costs of a model before and after it was converted: weights, bytes, operations, milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.sentences import first_line
from offramp.errors import InvalidArgument
from offramp.networks.inputs import as_inputs, call_model, copies, count_of
from offramp.networks.layer import Layer, dense_cost, outer_layers, stored_bytes
from offramp.runtime.measuring import interleaved, macs

__all__ = ["Change", "Cost", "changes", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """The cost of a module for one row, and its size.

    Args:
        parameters: number of trained values.
        stored_bytes: of its tensors in a file of weights.
        macs: multiply-adds of the convolutions and matrix products that are computed.
        bit_operations: macs times the bits of a weight and of an activation.
        ms: milliseconds of one call on the example; None if it was not timed.
    """

    parameters: int
    stored_bytes: int
    macs: float
    bit_operations: float
    ms: float | None = None


@dataclass(frozen=True)
class Change:
    """The cost of a converted module before and after.

    Args:
        name: of the module; "" for the complete model.
        kind: the class of the module after; "model" for the complete model.
        before: its cost before.
        after: its cost after.
    """

    name: str
    kind: str
    before: Cost
    after: Cost


def cost_of(model: nn.Module, example: Any, *, timed: bool = False) -> Cost:
    """Measure the cost of a model.

    Args:
        model: in eval mode.
        example: a small batch as the model takes it.
        timed: whether a call on the example is timed too.

    Returns:
        The cost.
    """
    state = as_inputs(example)
    rows = count_of(state)
    call = partial(_call, model, state)
    total = macs(call) / rows
    layers = outer_layers(model)
    shapes = _shapes(model, layers, call)
    # Begin with all weights and activations in floats, then correct for layers with fewer bits.
    bits = 8 * _float_size(model)
    operations = total * bits * bits
    stored = stored_bytes(model)
    for name, layer in layers.items():
        if name not in shapes:  # it does not run on this example
            continue
        cost = layer.cost(shapes[name])
        stored += cost.stored_bytes - stored_bytes(layer)
        operations += cost.bit_operations - dense_cost(layer, shapes[name]).bit_operations
    # the median, because single times are noisy
    ms = None
    if timed:
        ms = float(np.median(interleaved({"call": call}, repeats=5)["call"]))
    return Cost(_parameters(model), stored, total, operations, ms)


def changes(
    before: nn.Module, after: nn.Module, example: Any, *, timed: bool = True
) -> list[Change]:
    """Measure the cost of each converted module and of the complete model, before and after.

    Args:
        before: the original, in eval mode.
        after: the converted copy, in eval mode.
        example: a batch as both take it.
        timed: whether calls on the example are timed, those before and after in turn.

    Returns:
        One entry per converted module in the order of the model, then one for the complete model
        under "".

    Raises:
        InvalidArgument: the original fails on the example.
    """
    state = as_inputs(example)
    originals = dict(before.named_modules())
    changes: list[Change] = []
    names = _changed(before, after)
    try:
        inputs = _inputs(before, names, partial(_call, before, state))
    except (RuntimeError, IndexError, TypeError, ValueError) as problem:
        why = first_line(problem)
        raise InvalidArgument(
            f"original must be the model before it was converted, and it fails on the example: "
            f"{why}"
        ) from problem
    for name in names:
        if name not in inputs:  # it does not run on this example
            continue
        module = after.get_submodule(name)
        if isinstance(module, Layer):
            costs = _costs(originals[name], module, inputs[name], timed=timed)
            changes.append(Change(name, type(module).__name__, *costs))
    costs = _costs(before, after, example, timed=timed)
    changes.append(Change("", "model", *costs))
    return changes


def _costs(before: nn.Module, after: nn.Module, x: Any, *, timed: bool) -> tuple[Cost, Cost]:
    """The costs of two modules on the same input, timed in turn."""
    cost_before = cost_of(before, x)
    cost_after = cost_of(after, x)
    if not timed:
        return cost_before, cost_after
    calls: dict[str, Callable[[], object]] = {
        "before": partial(_call, before, as_inputs(x)),
        "after": partial(_call, after, as_inputs(x)),
    }
    times = interleaved(calls, repeats=5, warmup=2)
    ms_before = float(np.median(times["before"]))
    ms_after = float(np.median(times["after"]))
    return replace(cost_before, ms=ms_before), replace(cost_after, ms=ms_after)


def _call(model: nn.Module, state: dict[str, Tensor]) -> Any:
    with torch.inference_mode():
        return call_model(model, None, copies(state))


def _parameters(model: nn.Module) -> int:
    """The number of trained values. Packed layers have no parameters: their buffers count."""
    count = sum(value.numel() for value in model.parameters())
    for module in model.modules():
        if isinstance(module, Layer) and not list(module.parameters()):
            for value in module.buffers():
                if value.is_floating_point():
                    count += value.numel()
    return count


def _float_size(model: nn.Module) -> int:
    """Bytes of a floating-point parameter; 4 if there is none."""
    for value in model.parameters():
        if value.is_floating_point():
            return value.element_size()
    return 4


def _changed(before: nn.Module, after: nn.Module) -> list[str]:
    """The names of the modules that were replaced."""
    known = dict(before.named_modules())
    return [name for name in outer_layers(after) if name in known and name]


def _inputs(model: nn.Module, names: list[str], call: Callable[[], Any]) -> dict[str, Tensor]:
    """The first inputs of some modules in a call of the model."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            inputs[name] = args[0].clone()  # a later layer may change it in place

    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(note, name)))
        call()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _shapes(
    model: nn.Module, layers: dict[str, Layer], call: Callable[[], Any]
) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each layer's input."""
    inputs = _inputs(model, list(layers), call)
    return {name: tuple(value.shape[1:]) for name, value in inputs.items()}
