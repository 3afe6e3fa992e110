"""The tensors of inputs, outputs and tapped modules by name, the same for training, export and
running.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadData, BadNetwork


def tensors_of(value: object, name: str) -> dict[str, Tensor]:
    """A tensor under `name`; those of a tuple, dict or dataclass under `name/0`, `name/<key>`, and
    so on inwards.
    """
    if isinstance(value, Tensor):
        return {name: value}
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {
        key: leaf
        for inner, part in items
        for key, leaf in tensors_of(part, f"{name}/{inner}").items()
    }


def logits_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of a model's outputs, named by `tensors_of(output, "y")`, are its logits; None when
    that is not clear.

    The one called `logits`, or the only one. In a tuple, whose parts have no names, the first of
    them if no other has a shape [B, C]: (logits, feature map) is clear, (map of the picture,
    auxiliary logits) is not.
    """
    if "y/logits" in tensors:
        return "y/logits"
    first = next(iter(tensors), None)
    if len(tensors) == 1:
        return first
    flat = [
        name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.is_floating_point()
    ]
    return first if flat == [first] and first == "y/0" else None


def logits_in(output: Any, name: str | None = None) -> Any:
    """The logits [B, C] in what a model gives: a tensor, or one in a tuple, dict or dataclass; else
    all of it.

    Args:
        output: what the model gave.
        name: of the tensor that is its logits, as `tensors_of(output, "y")` has it; None where that
            is clear.

    Raises:
        BadNetwork: the output has no tensor of that name.
    """
    tensors = tensors_of(output, "y")
    if name is not None:
        if name not in tensors:
            known = ", ".join(tensors).replace("y/", "")
            raise BadNetwork(
                f"the model has no output {name.removeprefix('y/')!r}; it gives "
                f"{known or 'no tensor'}"
            )
        return tensors[name]
    if isinstance(output, Tensor):
        return output
    name = logits_name(tensors)
    return output if name is None else tensors[name]


def tapped(value: object, name: str) -> dict[str, Tensor]:
    """The tensors of a module's output, however nested: the first is called `name`, then `name/1`,
    `name/2`, ...
    """
    leaves = tensors_of(value, name).values()
    return {f"{name}/{index}" if index else name: leaf for index, leaf in enumerate(leaves)}


_HOLE = object()


def mould(value: object) -> object:
    """A tensor, tuple, list or dict with a hole for every tensor; `filled` puts tensors in, in the
    same order.
    """
    return _HOLE if isinstance(value, Tensor) else _mapped(value, mould)


def filled(value: object, tensors: Iterator[Tensor]) -> object:
    """A mould with the next tensors in its holes."""
    if value is _HOLE:
        return next(tensors)
    return _mapped(value, lambda part: filled(part, tensors))


def _mapped(value: object, change: Callable[[object], object]) -> object:
    kind: Any = type(value)
    if isinstance(value, dict):
        return kind({key: change(part) for key, part in value.items()})
    if isinstance(value, (tuple, list)):
        parts = [change(part) for part in value]
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    return value


def inputs_of(
    args: Sequence[object], kwargs: Mapping[str, object] | None = None
) -> dict[str, Tensor]:
    """The tensors among the arguments: a single one is "x", several are "x/0", "x/1",
    "x/<keyword>".

    Raises BadData when there is none or when they differ in their number of rows.
    """
    given = [*enumerate(args), *(kwargs or {}).items()]
    found = {f"x/{key}": value for key, value in given if isinstance(value, Tensor)}
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in found.values()}
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in found.values()) or "no tensor"
        raise BadData(
            f"the example holds {shapes}, expected tensors [B, ...] with one B >= 1; give a small "
            f"batch"
        )
    return {"x": next(iter(found.values()))} if len(found) == 1 else found


def swapped(
    args: Sequence[object], kwargs: Mapping[str, object], tensors: Iterable[Tensor]
) -> tuple[list[object], dict[str, object]]:
    """The arguments of a call with other tensors in the places of theirs, in the order of
    `inputs_of`.
    """
    rest = iter(tensors)
    own = [next(rest) if isinstance(value, Tensor) else value for value in args]
    return own, {
        key: next(rest) if isinstance(value, Tensor) else value for key, value in kwargs.items()
    }


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """While it lasts, torch's transformer layers run as in training: their shortcut gives nested
    tensors to hooks.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def listening(
    modules: Mapping[str, nn.Module], heard: Callable[[str, object], None]
) -> Iterator[None]:
    """While it lasts, `heard(name, output)` is called whenever one of the modules has run; no hook
    stays behind.
    """
    handles = []
    try:
        for name, module in modules.items():
            handles.append(
                module.register_forward_hook(lambda _m, _x, output, name=name: heard(name, output))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
