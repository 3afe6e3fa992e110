"""Names the tensors of inputs, outputs and tapped modules, in training, export and running.

"Tapped" means that the output of a module is caught by a hook.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadData, BadNetwork

# Torch says so of code that makes a number of a size which the export keeps free.
FIXED = "specialized it to be a constant"
FIXING = "(as len(x) does; x.shape[0] does not)"


def tensors_of(value: object, name: str) -> dict[str, Tensor]:
    """Find all tensors in a nested value.

    Args:
        value: a tensor, or a tuple, list, dict or dataclass, with others inside.
        name: of the value.

    Returns:
        A tensor has the name itself. Those inside have `name/0`, `name/<key>`, and so on.

    >>> list(tensors_of({"logits": torch.zeros(2, 3)}, "y"))
    ['y/logits']
    """
    if isinstance(value, Tensor):
        return {name: value}
    # (name, value) of everything inside; () for a value that holds no tensors, such as a number.
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        # A named tuple has names, any other one has positions.
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif dataclasses.is_dataclass(value):
        # Not `asdict`, which would copy the tensors.
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    tensors = dict[str, Tensor]()
    for inner, part in items:
        tensors.update(tensors_of(part, f"{name}/{inner}"))
    return tensors


def logits_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Find the logits among the outputs of a model.

    They are the tensor called `logits`, or the only one. In a tuple, whose parts have no names, the
    first tensor counts if no other one has a shape [B, C]: (logits, feature map) is clear, (feature
    map, auxiliary logits) is not.

    Args:
        tensors: the outputs, as `tensors_of(output, "y")` names them.

    Returns:
        The name; None where it is not clear.
    """
    if "y/logits" in tensors:
        return "y/logits"
    first = next(iter(tensors), None)  # None without tensors
    if len(tensors) == 1:
        return first
    like_logits = list[str]()
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.is_floating_point():
            like_logits.append(name)
    if like_logits == ["y/0"] and first == "y/0":
        return first
    return None


def logits_in(output: Any, name: str | None = None) -> Any:
    """Take the logits [B, C] out of a model's output.

    Args:
        output: a tensor, or one in a tuple, dict or dataclass.
        name: of the logits, as `tensors_of(output, "y")` names them; None where that is clear.

    Returns:
        The logits, or the whole output if it is not clear which tensor they are.

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
    if name is None:
        return output
    return tensors[name]


def tapped(value: object, name: str) -> dict[str, Tensor]:
    """Find the tensors of a module's output.

    Args:
        value: the output, which may be nested.
        name: of the module.

    Returns:
        The first tensor has the name itself, the others `name/1`, `name/2`, ...
    """
    tensors = dict[str, Tensor]()
    for index, leaf in enumerate(tensors_of(value, name).values()):
        tensors[f"{name}/{index}" if index else name] = leaf
    return tensors


_HOLE = object()  # stands for a tensor in a `mould`


def mould(value: object) -> object:
    """Replace every tensor in a nested value by a hole, which `filled` fills again.

    Args:
        value: a tensor, or a tuple, list or dict, with others inside.
    """
    if isinstance(value, Tensor):
        return _HOLE
    return _mapped(value, mould)


def filled(value: object, tensors: Iterator[Tensor]) -> object:
    """Fill the holes of a mould with the next tensors, in the same order."""
    if value is _HOLE:
        return next(tensors)
    return _mapped(value, lambda part: filled(part, tensors))


def _mapped(value: object, change: Callable[[object], object]) -> object:
    """A tuple, list or dict of the same kind, with its items changed."""
    kind: Any = type(value)
    if isinstance(value, dict):
        return kind({key: change(part) for key, part in value.items()})
    if isinstance(value, (tuple, list)):
        parts = [change(part) for part in value]
        if hasattr(value, "_fields"):  # a named tuple takes its items one by one
            return kind(*parts)
        return kind(parts)
    return value


def inputs_of(
    args: Sequence[object], kwargs: Mapping[str, object] | None = None
) -> dict[str, Tensor]:
    """Name the tensors among the arguments of a call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        A single tensor is "x"; several are "x/0", "x/1", ... and "x/<keyword>".

    Raises:
        BadData: there is no tensor, or their numbers of rows differ.
    """
    tensors = dict[str, Tensor]()
    rows = set[int]()
    for key, value in [*enumerate(args), *(kwargs or {}).items()]:
        if isinstance(value, Tensor):
            tensors[f"x/{key}"] = value
            rows.add(value.shape[0] if value.dim() else 0)
    if len(rows) != 1 or 0 in rows:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors.values()) or "no tensor"
        raise BadData(
            f"the example holds {shapes}, expected tensors [B, ...] with one B >= 1; give a small "
            f"batch"
        )
    if len(tensors) == 1:
        return {"x": next(iter(tensors.values()))}
    return tensors


def swapped(
    args: Sequence[object], kwargs: Mapping[str, object], tensors: Iterable[Tensor]
) -> tuple[list[object], dict[str, object]]:
    """Replace the tensors among the arguments of a call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        tensors: the new ones, in the order of `inputs_of`.

    Returns:
        Positional and keyword arguments with the new tensors.
    """
    remaining = iter(tensors)
    new_args = list(args)
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            new_args[index] = next(remaining)
    new_kwargs = dict(kwargs)
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            new_kwargs[key] = next(remaining)
    return new_args, new_kwargs


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """While it is open, torch's transformer layers run as in training.

    Their fast path for inference would pass nested tensors to hooks.
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
    """While it is open, `heard(name, output)` is called whenever one of the modules has run in this
    thread. Another thread may be serving with the same modules.

    Args:
        modules: by name.
        heard: the hook; it is removed at the end.
    """
    here = threading.get_ident()

    def hook(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
        if threading.get_ident() == here:
            heard(name, output)

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(hook, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
