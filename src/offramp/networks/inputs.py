"""What goes into a network: one tensor, several, or several with names.

Among the named tensors that segments pass on, x is the only input, x/0, x/1 are positional ones,
x/<name> keywords.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import BadData, InvalidArgument
from offramp.plans.signature import INPUT, is_input, is_label

State = dict[str, Tensor]

TYPE_ERRORS = (
    "should be the same",
    "same dtype",
    "scalar type",
    "Byte",
    "unsigned char",
    "expected dtype",
    "Char",
)
PREPROCESS = (
    "these rows are uint8 and the model takes floats: give its preprocessing, "
    "preprocess=off.make_preprocess('imagenet') to cut or (model, preprocess) to ladder, "
    "--preprocess imagenet at "
    "the command line; 'unit' divides by 255"
)


def call_model(model: nn.Module, preprocess: nn.Module | None, inputs: State) -> Any:
    """A model on named inputs; x alone goes through the preprocessing."""
    args, kwargs = arguments(inputs)
    if preprocess is not None:
        args = (preprocess(*args, **kwargs),)
        kwargs = {}
    # After `model.compile()` a plain call compiles, for each batch size anew
    call: Any = model if getattr(model, "_compiled_call_impl", None) is None else model._call_impl
    return call(*args, **kwargs)


def copies(state: State) -> State:
    """The inputs among named tensors, copied: a model may work in place on them, and others still
    need them.
    """
    return {name: value.clone() for name, value in state.items() if is_input(name)}


def arguments(inputs: State) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments from named inputs: x, or x/0, x/1, ..., and x/<name>."""
    if INPUT in inputs:
        return (inputs[INPUT],), {}
    named = given(inputs)
    places = sorted((key for key in named if key.isdigit()), key=int)
    return tuple(named[key] for key in places), {
        key: named[key] for key in named if not key.isdigit()
    }


def as_inputs(x: Any, device: torch.device | None = None) -> State:
    """Named tensors from a batch: a tensor or array -> x; a tuple -> x/0, x/1, ...; a mapping ->
    x/<name>.

    `label` or `labels` in a mapping, in any case of letters, is the label and no input: it is left
    out. Raises BadData for what is none, and for inputs of different lengths.
    """
    if isinstance(x, Mapping):
        x = {name: value for name, value in x.items() if not is_label(name)}
        if not x:
            raise BadData("the batch holds no input beside labels, expected one or more by name")
        state = {f"{INPUT}/{name}": as_input(value, device) for name, value in x.items()}
    elif (
        isinstance(x, (tuple, list))
        and x
        and all(isinstance(part, (Tensor, np.ndarray)) for part in x)
    ):
        state = {f"{INPUT}/{index}": as_input(value, device) for index, value in enumerate(x)}
    else:
        return {INPUT: as_input(x, device)}
    if len({len(value) for value in state.values()}) != 1:
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise BadData(
            f"the inputs have shapes {shapes}, expected one and the same number of rows; check "
            f"the batch"
        )
    return state


def remedy(inputs: State, problem: BaseException, otherwise: str) -> str:
    """What to do about inputs that a model refused: what its error and the inputs' types and shapes
    tell.

    Args:
        inputs: named tensors, as the model (or its preprocessing) got them.
        problem: what the model raised.
        otherwise: the advice where nothing is recognised.
    """
    text = str(problem)
    of_types = any(mark in text for mark in TYPE_ERRORS)
    kinds = {value.dtype for name, value in inputs.items() if is_input(name)}
    images = [value for name, value in inputs.items() if is_input(name) and value.dim() == 4]
    if (
        any(value.shape[3] in (1, 3) and value.shape[1] not in (1, 3) for value in images)
        and not of_types
    ):
        return "these images have their channels last; give [B, C, H, W], x.transpose(0, 3, 1, 2)"
    if torch.uint8 in kinds and of_types:
        return PREPROCESS
    if torch.float64 in kinds and of_types:
        return "these rows are float64; give the model's type, x.astype('float32')"
    if of_types and "indices" in text:
        return "these rows are numbers of words or categories; give integers, x.astype('int64')"
    return otherwise


def needed_by(members: Iterable[Any], engine_stages: Iterable[Any]) -> frozenset[str]:
    """The named inputs that a network cannot do without: those that a model was cut with, and that
    its parts read.
    """
    cut = {one.name for member in members for one in member.inputs}
    read = {name for engine_stage in engine_stages for name in engine_stage.reads if is_input(name)}
    return frozenset((cut | read) - {INPUT})


def require_inputs(state: State, needed: Collection[str]) -> None:
    """Raise BadData for a batch that lacks a named input."""
    missing = [name for name in needed if name not in state]
    if missing:
        names = ", ".join(sorted(name.removeprefix(INPUT + "/") for name in needed))
        if INPUT in state:
            got = "one input without a name"
        else:
            got = ", ".join(_plain_names(state))
        raise BadData(
            f"the rows lack the input {min(missing).removeprefix(INPUT + '/')!r}: got {got}, "
            f"expected {names}"
        )


def _plain_names(state: State) -> list[str]:
    return [name.removeprefix(INPUT + "/") for name in state]


def count_of(state: State) -> int:
    """The number of rows."""
    return len(next(iter(state.values())))


def texts_of(state: State, length: Sequence[str] | str) -> tuple[str, ...]:
    """The inputs [B, T, ...] named in `length`, with or without x/ before them. Raises
    InvalidArgument for what is none.
    """
    texts = tuple(
        name if is_input(name) else f"{INPUT}/{name}"
        for name in ([length] if isinstance(length, str) else length)
    )
    if missing := [name for name in texts if name not in state or state[name].dim() < 2]:
        raise InvalidArgument(
            f"got length={length!r}, expected inputs [B, T, ...] of {list(state)}; {missing[0]!r} "
            f"is none"
        )
    return texts


def given(state: State) -> Any:
    """The inputs among named tensors as a user hands them over: the tensor x, or a mapping."""
    if INPUT in state:
        return state[INPUT]
    return {
        name.removeprefix(INPUT + "/"): value
        for name, value in state.items()
        if name.startswith(INPUT + "/")
    }


def as_input(x: Any, device: torch.device | None = None) -> Tensor:
    """A batch [B, ...] as a tensor on `device`. Raises BadData for what is none."""
    try:
        tensor: Tensor = x if isinstance(x, Tensor) else torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as problem:
        raise BadData(
            f"the input is a {type(x).__name__}, expected a tensor or an array [B, ...]"
        ) from problem
    if odd := _odd(tensor):
        raise BadData(
            f"the input is a tensor {odd}, expected a dense one with values, such as x.to_dense() "
            f"gives"
        )
    if tensor.dim() < 1:
        raise BadData(
            "the input is a single number, expected a batch [B, ...]; add a first dimension"
        )
    tensor = _plain_strides(tensor)
    return tensor if device is None else tensor.to(device, non_blocking=True)


def _plain_strides(tensor: Tensor) -> Tensor:
    """A contiguous tensor with the strides of its shape.

    Where a size is 1 its stride is free. `pixels[:, None]` of NumPy leaves one there that torch
    takes for channels last, and every layer behind would then compute in that format: on small nets
    up to six times slower.
    """
    if not tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.reshape(-1).view(tensor.shape)


def _odd(tensor: Tensor) -> str | None:
    """Why no network can read a tensor, or None."""
    if tensor.is_meta:
        return "on the meta device, which has no values"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "of the layout " + (
            "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        )
    if tensor.is_quantized:
        return f"of the quantized type {tensor.dtype}"
    return None
