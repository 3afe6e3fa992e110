"""`cut(model, example, skip=...)`: make residual units of a trained model that rows may skip.

The model is split before and behind every such unit, and the unit becomes a fork with an empty arm.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import in_order
from offramp._support.find import unknown
from offramp.building.pieces import pieces_after
from offramp.building.routing import Fork, GateLike, route
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.inputs import as_inputs, given
from offramp.networks.members import SKIP, WholeModel
from offramp.networks.network import Network
from offramp.networks.taps import plain_attention


def skippable(
    model: nn.Module,
    example: Any,
    skip: Sequence[str] | str,
    *,
    gate: GateLike = "controller",
    preprocess: nn.Module | None = None,
    spec: str | None = None,
) -> Network:
    """Make a network of one trained model in which rows may skip some units.

    Args:
        model: in eval mode; it is not changed.
        example: a batch as the model (or its preprocessing) takes it.
        skip: names of units, or patterns such as "layer3.*", in which a * matches one part of a
            name. A unit must give the shape that it takes. Matches of a pattern that do not are
            left out.
        gate: chooses at each unit, as in `Fork`.
        preprocess: the preprocessing of the model.
        spec: the text that names the model, so that a saved network can be built again.

    Returns:
        A network with a fork before each unit. Its name is `skip-` and the unit's name, with - for
        the dots.

    Raises:
        UnknownName: there is no module with this name.
        BadNetwork: no unit can be skipped, or another tensor is needed behind a unit.
        InvalidArgument: skip is neither a name nor a list of names.
    """
    inputs = as_inputs(example)
    if len(inputs) > 1:
        raise InvalidArgument(f"skip= needs a model of one input, got {', '.join(inputs)}")
    x = given(inputs)
    with torch.no_grad():
        floats = x if preprocess is None else preprocess(x)
    names = _matching(model, skip)
    units = _units(model, names, floats)
    if not units:
        raise BadNetwork(
            f"none of {', '.join(names)} can be skipped: a unit must give the shape that it takes "
            f"and begin where another module ends"
        )

    # Split the model at the beginning and at the end of each unit.
    cuts = list[str]()
    for unit, before in units.items():
        for cut in (before, unit):
            if cut not in cuts:
                cuts.append(cut)
    parts = pieces_after(model, floats, cuts, consequence="so it cannot be skipped")

    # A piece has the name of the module at whose end it stops. So the piece of a unit becomes a
    # fork, and every other piece a segment.
    steps = list[Any]()
    for number, (end, module) in enumerate(parts):
        name = end.replace(".", "-")
        if end in units:
            steps.append(Fork(f"skip-{name}", {f"none-{name}": [], name: module}, gate))
            continue
        segment = f"to-{name}" if end else "end"
        if number == 0 and preprocess is not None:
            steps.append((segment, (module, preprocess)))
        else:
            steps.append((segment, module))
    network = route(steps, example=example)
    patterns = [skip] if isinstance(skip, str) else in_order(skip)
    network.whole = WholeModel(spec, SKIP, tuple(patterns))
    return network


def _matching(model: nn.Module, skip: object) -> list[str]:
    """The modules that a pattern or a list of them names, in order. Raises UnknownName,
    InvalidArgument.
    """
    patterns = list[str]()
    if isinstance(skip, str):
        patterns.append(skip)
    elif isinstance(skip, (list, tuple, set, frozenset)):
        patterns.extend(in_order(skip))
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidArgument(
            f"skip must be a name of a module, a pattern such as 'layer3.*', or a list, got "
            f"{skip!r}"
        )
    names = [name for name, _ in model.named_modules() if name]
    matches = set[str]()
    for pattern in patterns:
        of_pattern = [name for name in names if _matches(name, pattern)]
        if not of_pattern:
            raise unknown(pattern, names, "module of this model")
        matches.update(of_pattern)
    return [name for name in names if name in matches]


def _matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern, part by part."""
    parts = name.split(".")
    wanted = pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _units(model: nn.Module, names: Sequence[str], x: Tensor) -> Mapping[str, str]:
    """The units that can be skipped, each with the module at whose end it begins.

    The model runs once with two hooks on every module. A unit takes one tensor, which is the very
    output of another module, and gives one of the same shape.
    """
    makers: dict[int, str] = {}  # by the identity of a tensor, the outermost module that gave it
    held = list[Tensor]()  # as long as they are held, no other tensor gets their identity
    begins: dict[str, str] = {}  # by unit, the module at whose end it begins
    handles = list[Any]()

    def before(name: str, _module: nn.Module, taken: tuple[Any, ...]) -> None:
        if name not in names or len(taken) != 1 or not isinstance(taken[0], Tensor):
            return
        if id(taken[0]) in makers:
            begins[name] = makers[id(taken[0])]
            held.append(taken[0])

    def after(name: str, _module: nn.Module, taken: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            begins.pop(name, None)
            return
        held.append(output)
        makers[id(output)] = name  # an outer module ends later and replaces an inner one
        one_tensor = len(taken) == 1 and isinstance(taken[0], Tensor)
        if not one_tensor or taken[0].shape != output.shape:
            begins.pop(name, None)

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(partial(before, name)))
                handles.append(module.register_forward_hook(partial(after, name)))
        with torch.no_grad(), plain_attention():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: begins[name] for name in names if name in begins}
