"""Residual units of a trained model that rows may skip: what `cut(model, example, skip=...)` makes.

The model is taken apart before and behind every such unit. Each of them becomes a fork with an
empty arm.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.find import unknown
from offramp.building.routing import Fork, GateLike, route
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import as_inputs, given
from offramp.networks.network import Network
from offramp.networks.taps import plain_attention
from offramp.partition import partition, self_check


class UnitPiece(nn.Module):
    """A piece of a model on one tensor; it shares the model's parameters.

    Args:
        module: the exported piece, in eval mode for good: its batch norms stay as they are while it
            is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = False

    def train(self, mode: bool = True) -> UnitPiece:
        """Nothing: what was exported in eval mode stays so."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The tensor that is carried on."""
        found: Tensor = self.module(x)[0]
        return found


def skippable(
    model: nn.Module,
    example: Any,
    skip: Sequence[str] | str,
    *,
    gate: GateLike = "controller",
    preprocess: nn.Module | None = None,
) -> Network:
    """A network of one trained model in which rows may skip some units.

    Args:
        model: in eval mode; it is not changed.
        example: a batch as the model (or its preprocessing) takes it.
        skip: names of units, or patterns such as "layer3.*" (a * stands for one part of a name). A
            unit gives what it
            takes: the same shape. Those of a pattern that do not are left as they are.
        gate: chooses at each unit, as in `Fork`.
        preprocess: what stands before the model.

    Returns:
        A network with a fork before every such unit, named `skip-` and the unit's name with - for
        dots.

    Raises:
        UnknownName: nothing has such a name.
        BadNetwork: no unit can be skipped, or something beside its input and output is carried past
            one.
        InvalidArgument: skip is neither a name nor a list of names.
    """
    inputs = as_inputs(example)
    if len(inputs) > 1:
        raise InvalidArgument(f"skip= takes models of one input, got {', '.join(inputs)}")
    x = given(inputs)
    with torch.no_grad():
        floats = x if preprocess is None else preprocess(x)
    named = _matching(model, [skip] if isinstance(skip, str) else skip)
    units = _units(model, named, floats)
    if not units:
        raise BadNetwork(
            f"none of {', '.join(named)} gives the shape that it takes and begins where another "
            f"module ends, so none "
            "can be skipped"
        )
    marks = list[str]()
    for unit, before in units.items():
        marks += [mark for mark in (before, unit) if mark not in marks]
    parts = partition(model, (floats,), at=marks)
    self_check(model, parts, (floats,), {})
    steps = list[Any]()
    for number, piece in enumerate(parts.pieces):
        if (
            len(piece.reads) != 1
            or len(piece.writes) < 1
            or (piece.name and len(piece.writes) != 1)
        ):
            told = ", ".join(piece.reads if len(piece.reads) != 1 else piece.writes)
            raise BadNetwork(
                f"past {piece.name or 'the last unit'!r} more than one tensor is carried "
                f"({told}), so it cannot be "
                "skipped"
            )
        module = UnitPiece(piece.module)
        name = piece.name.replace(".", "-")
        if piece.name in units:
            steps.append(Fork(f"skip-{name}", {f"none-{name}": [], name: module}, gate))
            continue
        own = f"to-{name}" if piece.name else "end"
        first = number == 0 and preprocess is not None
        steps.append((own, (module, preprocess)) if first else (own, module))
    return route(steps, example=example)


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The modules that patterns name, in order. Raises UnknownName, InvalidArgument."""
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidArgument(
            f"skip must be a name of a module, a pattern such as 'layer3.*', or a list, got "
            f"{patterns!r}"
        )
    names = [name for name, _ in model.named_modules() if name]
    found = list[str]()
    for pattern in patterns:
        mine = [name for name in names if _matches(name, pattern)]
        if not mine:
            raise unknown(pattern, names, "module of this model")
        found += mine
    return [name for name in names if name in found]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    wanted = pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _units(model: nn.Module, named: Sequence[str], x: Tensor) -> Mapping[str, str]:
    """By unit the module at whose end it begins, of those that give the shape that they take."""
    ends: dict[int, str] = {}  # by the identity of a tensor the outermost module that gave it
    held = list[Any]()  # while they are held, no other tensor takes their identity
    found: dict[str, str] = {}
    handles = list[Any]()

    def observe(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, taken: tuple[Any, ...]) -> None:
            if (
                name in named
                and len(taken) == 1
                and isinstance(taken[0], Tensor)
                and id(taken[0]) in ends
            ):
                found[name] = ends[id(taken[0])]
                held.append(taken[0])

        def after(_: nn.Module, taken: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                found.pop(name, None)
                return
            held.append(output)
            ends[id(output)] = name
            same = (
                len(taken) == 1 and isinstance(taken[0], Tensor) and taken[0].shape == output.shape
            )
            if name in found and not same:
                del found[name]

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    try:
        for name, module in model.named_modules():
            if name:
                observe(name, module)
        with torch.no_grad(), plain_attention():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in named if name in found}
