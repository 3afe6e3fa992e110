"""Converts the inputs of a network to named tensors: one tensor, several, or several with names.

A single input is called x. Several are called x/0, x/1, ... if they are positional, and x/<name> if
they are keywords. Segments pass tensors on under such names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp._support.arguments import in_order
from offramp.errors import BadData, InvalidArgument
from offramp.plans.signature import INPUT, is_input, is_label

State = dict[str, Tensor]

# Words in errors of torch that are about types.
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
    """Call a model on named inputs.

    Args:
        model: the user's.
        preprocess: makes the model's only input of them; None where the inputs are ready.
        inputs: x, or x/0, x/1, ... and x/<name>.

    Returns:
        The output of the model, with its own structure.
    """
    args, kwargs = arguments(inputs)
    if preprocess is not None:
        args = (preprocess(*args, **kwargs),)
        kwargs = {}
    call: Any = model
    if getattr(model, "_compiled_call_impl", None) is not None:
        # After `model.compile()` a plain call would compile again for every batch size.
        call = model._call_impl
    return call(*args, **kwargs)


def copies(state: State) -> State:
    """Copies of the inputs among named tensors.

    A model may change its inputs in place, and other models still need them.
    """
    inputs = State()
    for name, value in state.items():
        if is_input(name):
            inputs[name] = value.clone()
    return inputs


def arguments(inputs: State) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Turn named inputs into the arguments of a call.

    Args:
        inputs: x, or x/0, x/1, ... and x/<name>.

    Returns:
        Positional and keyword arguments.
    """
    if INPUT in inputs:
        return (inputs[INPUT],), {}
    named = given(inputs)
    keywords = dict[str, Tensor]()
    positions = list[str]()
    for key, value in named.items():
        if key.isdigit():
            positions.append(key)
        else:
            keywords[key] = value
    positions.sort(key=int)
    return tuple(named[key] for key in positions), keywords


def as_inputs(x: Any, device: torch.device | None = None) -> State:
    """Turn a batch into named tensors.

    Args:
        x: a tensor or array becomes x; a tuple becomes x/0, x/1, ...; a mapping becomes x/<name>.
            `label` or `labels` in a mapping, in any case of letters, is left out.
        device: where the tensors shall be; None leaves them where they are.

    Returns:
        Tensors [B, ...] by name.

    Raises:
        BadData: it is not a batch of tensors or arrays, or their numbers of rows differ.
    """
    if isinstance(x, Mapping):
        # Rows of a data set may still have their label. No network reads it.
        x = {name: value for name, value in x.items() if not is_label(name)}
        if not x:
            raise BadData("the batch holds no input beside labels, expected one or more by name")
        state = {f"{INPUT}/{name}": as_input(value, device) for name, value in x.items()}
    elif isinstance(x, (tuple, list)) and _are_arrays(x):
        state = {f"{INPUT}/{index}": as_input(value, device) for index, value in enumerate(x)}
    else:
        return {INPUT: as_input(x, device)}
    if len(set(map(len, state.values()))) != 1:
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise BadData(
            f"the inputs have shapes {shapes}, expected one and the same number of rows; check "
            f"the batch"
        )
    return state


def _are_arrays(parts: Sequence[object]) -> bool:
    """Whether a tuple or list is of several inputs, and not a nested list of numbers."""
    for part in parts:
        if not isinstance(part, (Tensor, np.ndarray)):
            return False
    return bool(parts)


def remedy(inputs: State, problem: BaseException, otherwise: str) -> str:
    """Advise on inputs that a model refused, from its error and from the types and shapes.

    Args:
        inputs: named tensors, as the model (or its preprocessing) got them.
        problem: what the model raised.
        otherwise: the advice if nothing is recognised.

    Returns:
        The advice, as the last part of a message.
    """
    # torch has no error class for wrong types, so the words of the message must do.
    text = str(problem)
    of_types = any(mark in text for mark in TYPE_ERRORS)
    kinds = set[torch.dtype]()
    channels_last = False
    for name, value in inputs.items():
        if is_input(name):
            kinds.add(value.dtype)
            if value.dim() == 4 and value.shape[3] in (1, 3) and value.shape[1] not in (1, 3):
                channels_last = True
    if channels_last and not of_types:
        return "these images have their channels last; give [B, C, H, W], x.transpose(0, 3, 1, 2)"
    # The most frequent causes, by the types of the inputs.
    if torch.uint8 in kinds and of_types:
        return PREPROCESS
    if torch.float64 in kinds and of_types:
        return "these rows are float64; give the model's type, x.astype('float32')"
    if of_types and "indices" in text:
        return "these rows are numbers of words or categories; give integers, x.astype('int64')"
    return otherwise


def needed_by(members: Iterable[Any], engine_stages: Iterable[Any]) -> frozenset[str]:
    """Find the named inputs that a network needs.

    Args:
        members: `ModelSpec`s; all inputs that they were cut with count.
        engine_stages: `EngineStage`s; all inputs that they read count.

    Returns:
        Names without x itself.
    """
    needed = set[str]()
    for member in members:
        for spec in member.inputs:
            needed.add(spec.name)
    for engine_stage in engine_stages:
        needed.update(filter(is_input, engine_stage.reads))
    return frozenset(needed - {INPUT})


def require_inputs(state: State, needed: Collection[str]) -> None:
    """Raise BadData for a batch that lacks a named input."""
    missing = set(needed).difference(state)
    if missing:
        # x alone is an input without a name; all others are x/<name>.
        if INPUT in state:
            got = "one input without a name"
        else:
            got = ", ".join(_plain_names(state))
        first = min(_plain_names(missing))
        expected = ", ".join(sorted(_plain_names(needed)))
        raise BadData(f"the rows lack the input {first!r}: got {got}, expected {expected}")


def _plain_names(names: Iterable[str]) -> list[str]:
    return [name.removeprefix(INPUT + "/") for name in names]


def count_of(state: State) -> int:
    """The number of rows."""
    return len(next(iter(state.values())))


def texts_of(state: State, length: Sequence[str] | str) -> tuple[str, ...]:
    """Find the inputs [B, T, ...] whose length is free.

    Args:
        state: named inputs.
        length: their names, with or without x/ before them.

    Returns:
        Their names with x/.

    Raises:
        InvalidArgument: one of them is not an input, or has no T.
    """
    texts = list[str]()
    for name in [length] if isinstance(length, str) else in_order(length):
        full_name = name if is_input(name) else f"{INPUT}/{name}"
        if full_name not in state or state[full_name].dim() < 2:
            raise InvalidArgument(
                f"length must name inputs [B, T, ...] of {list(state)}, got {length!r}; "
                f"{full_name!r} is not one"
            )
        texts.append(full_name)
    return tuple(texts)


def given(state: State) -> Any:
    """The inputs among named tensors, in the form in which a user passes them.

    Args:
        state: named tensors, perhaps with others among them.

    Returns:
        The tensor x, or a mapping of the others by their names without x/.
    """
    if INPUT in state:
        return state[INPUT]
    inputs = dict[str, Tensor]()
    for name, value in state.items():
        if name.startswith(INPUT + "/"):
            inputs[name.removeprefix(INPUT + "/")] = value
    return inputs


def as_input(x: Any, device: torch.device | None = None) -> Tensor:
    """Turn a batch [B, ...] into a tensor on `device`. Raises BadData for anything else."""
    try:
        tensor: Tensor = x if isinstance(x, Tensor) else torch.as_tensor(readable(x))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise BadData(
            f"the input is a {type(x).__name__}, expected a tensor or an array [B, ...]"
        ) from problem
    odd = _odd(tensor)
    if odd is not None:
        raise BadData(
            f"the input is a tensor {odd}, expected a dense one with values, such as x.to_dense() "
            f"gives"
        )
    if tensor.dim() < 1:
        raise BadData(
            "the input is a single number, expected a batch [B, ...]; add a first dimension"
        )
    tensor = _plain_strides(tensor)
    if device is None:
        return tensor
    # If the memory is pinned, the copy to a GPU runs while Python goes on.
    return tensor.to(device, non_blocking=True)


def readable(x: Any) -> Any:
    """An array that torch can read: a copy of one that is reversed, or of another byte order.

    Args:
        x: anything; what is no array stays as it is.
    """
    if not isinstance(x, np.ndarray):
        return x
    if not x.dtype.isnative:
        return x.astype(x.dtype.newbyteorder("="))
    if any(stride < 0 for stride in x.strides):
        return x.copy()
    return x


def _plain_strides(tensor: Tensor) -> Tensor:
    """A contiguous tensor with the strides of its shape.

    Where a size is 1, any stride is valid. `pixels[:, None]` of NumPy leaves one that torch takes
    for channels last. All later layers would then compute in that format, which is up to six times
    slower on small networks.
    """
    if not tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.reshape(-1).view(tensor.shape)  # the same shape, with the usual strides


def _odd(tensor: Tensor) -> str | None:
    """Why networks cannot read a tensor; None where they can."""
    if tensor.is_meta:
        return "on the meta device, which has no values"
    if tensor.is_nested:
        return "of the layout nested"
    if tensor.layout is not torch.strided:
        return f"of the layout {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return f"of the quantized type {tensor.dtype}"
    return None
