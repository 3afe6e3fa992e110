"""Models, preprocessing, exits and gates from their names, and weights from a file.

    offramp:NAME
    timm:NAME
    torchvision:NAME
    hf:FOLDER-OR-NAME
    onnx:FILE
    my.module:factory

Models of hubs come with their pretrained weights, unless a file of weights is given. Arguments
follow a question mark: `timm:resnet18?num_classes=10&pretrained=no`, `offramp:alexnet?classes=100`,
`strided?width=64`. Layers to convert follow a bar (see `converting`):
`offramp:resnet20|layer3.*=ghost?ratio=2`.

A name that the user typed may import the user's code. A name in a file may not: from a file only
`offramp:`, `timm:` and `torchvision:` work, nothing is downloaded, and the caller must give
everything else again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from offramp._support.arguments import name_of
from offramp._support.find import (
    files,
    find,
    find_file,
    imported,
    shelved,
    unknown,
    users_code,
)
from offramp.building.converting import BAR, convert, split_spec
from offramp.building.weights import load_weights
from offramp.errors import BadFile, InvalidArgument, OfframpError
from offramp.networks.nodes import Exit, Gate, Scorer

OURS = "offramp:"
MADE_FROM = "_offramp_made_from"  # attribute of preprocessing: the word that was typed for it
ONNX = "onnx:"
# Specs that a file may name: architectures only. `hf:` reads configurations from elsewhere.
FROM_FILES = (OURS, "timm:", "torchvision:", ONNX + "?")


def make_model(spec: str, weights: str | Path | None = None, *, fetch: bool = True) -> nn.Module:
    """Make the model that a typed spec names.

    Args:
        spec: such as `offramp:resnet20`.
        weights: a file of weights (see `weights.load_weights`). For a model with conversions they
            may be those of the model before or after.
        fetch: whether a hub may download pretrained weights; it never does if there are `weights`.

    Returns:
        The model, in eval mode.

    Raises:
        UnknownName: there is no model with this name; the message offers the nearest names.
        InvalidArgument: the spec is malformed, or an argument in it is wrong.
        BadFile: the weights do not fit.
        MissingExtra: the package of the hub is not installed.
    """
    if BAR in spec:
        return _converted(spec, weights, fetch=fetch)
    hub = _hub(spec)
    if spec.startswith(ONNX):
        model = find("members", "wrapped")(spec)
    elif hub is not None:
        model = find_file("hubs", hub[0]).build(hub[1], hub[2], fetch and weights is None)
    else:
        factory, arguments = model_factory(spec)
        with _checked(spec, "make a model"):
            model = _called(factory, arguments, f"{spec!r}", "write NAME?argument=value&...")
    if not isinstance(model, nn.Module):
        model = find("members", "wrapped")(model) or model  # such as a scikit-learn estimator
    model = _as_module(spec, model)
    if weights is not None:
        _load_whole_or_part(model, weights)
    return model.eval()


def _load_whole_or_part(model: nn.Module, weights: str | Path) -> None:
    """Load the weights of a model, or of the one part that has any, such as a model behind a layer
    that resizes.
    """
    parts = [part for part in model.children() if [*part.state_dict()]]
    if not isinstance(model, nn.Sequential) or len(parts) != 1:
        load_weights(model, weights)
        return
    try:
        load_weights(model, weights)
    except BadFile as problem:
        try:
            load_weights(parts[0], weights)
        except BadFile:
            raise problem from None


def _as_module(spec: str, thing: object) -> nn.Module:
    """The module that a factory made. Raises InvalidArgument for anything else."""
    if not isinstance(thing, nn.Module):
        raise InvalidArgument(f"{spec!r} must make a torch.nn.Module, got a {type(thing).__name__}")
    return thing


def _converted(spec: str, weights: str | Path | None, *, fetch: bool) -> nn.Module:
    """The model of a spec with conversions."""
    base, layers = split_spec(spec)
    try:
        model = make_model(base, weights, fetch=fetch)
    except BadFile:
        if weights is None:
            raise
        # the weights do not fit the model before: try them on the model after
        converted = convert(make_model(base, fetch=False), layers)
        load_weights(converted, weights)
        return converted.eval()
    return convert(model, layers).eval()


def model_factory(spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Find the factory of a model that is not on a hub.

    Args:
        spec: `offramp:NAME?argument=value` or the user's `my.module:factory`.

    Returns:
        The factory, and its arguments in the spec.

    Raises:
        UnknownName: there is no model with this name; the message offers the nearest names.
        InvalidArgument: the spec is malformed, or the module cannot be imported.
    """
    name, arguments = name_of(spec)
    if ":" not in name:
        raise InvalidArgument(
            f"the model must be offramp:NAME (see offramp doctor), timm:NAME, torchvision:NAME, "
            f"hf:NAME or my.module:factory, got {spec!r}"
        )
    if name.startswith(OURS):
        return shelved("models", name.removeprefix(OURS)), arguments
    return imported(name), arguments


def built_from_file(spec: str | None) -> bool:
    """Whether a model that a file names can be built again without running the user's own code.

    Args:
        spec: of the model; None if there is none.
    """
    if spec is None:
        return False
    base, layers = split_spec(spec)
    for method in layers.values():
        name = method.partition("?")[0]
        if ":" in name:  # my.module:Layer
            return False
    # the bytes of an ONNX model are among the weights
    return base.startswith(FROM_FILES) or base == ONNX


def model_from_file(spec: str | None, member: str) -> nn.Module:
    """Make the model that a file names, without pretrained weights: its weights were saved.

    Args:
        spec: of the model. Only `offramp:`, `timm:` and `torchvision:` are allowed.
        member: its name, for the message.

    Returns:
        The model, in eval mode.

    Raises:
        InvalidArgument: there is no spec, or another one.
    """
    if spec is not None and built_from_file(spec):
        return make_model(spec, fetch=False)
    reason = "was built by its user"
    if spec is not None:
        reason = f"is {spec!r}, and a file may not name code to run"
    raise InvalidArgument(
        f"member {member!r} {reason}. Give it again: load(folder, model={{{member!r}: model}})"
    )


def preprocess_of(spec: str) -> nn.Module | None:
    """Make the preprocessing that belongs to a model of ours or of a hub.

    Args:
        spec: of the model.

    Returns:
        The preprocessing; None for the user's own models and for models of texts.
    """
    spec = split_spec(spec)[0]
    hub = _hub(spec)
    if hub is not None:
        preprocess: nn.Module | None = find_file("hubs", hub[0]).preprocess(hub[1], hub[2])
        return preprocess
    if not spec.startswith(OURS):
        return None
    factory, _ = model_factory(spec)
    module: nn.Module = imported(f"{factory.__module__}:preprocess")()
    return module


def make_preprocess(spec: str) -> nn.Module | None:
    """Make the preprocessing that a typed word names.

    Args:
        spec: `none`, `unit` (divide by 255), `imagenet`, `my.module:preprocess`, or a model of ours
            or of a hub, such as `offramp:resnet20`, for the preprocessing that belongs to it.

    Returns:
        A module from uint8 images to the input of the model; None for `none`.

    Raises:
        InvalidArgument: there is no preprocessing with this name.
        UnknownName: there is no model with this name.
    """
    preprocess = find("layers", "Preprocess")
    if spec.startswith(OURS) or _hub(spec) is not None:
        return preprocess_of(spec)
    if spec == "none":
        return None
    if spec == "unit":
        unit: nn.Module = preprocess()
        return unit
    if spec == "imagenet":
        mean = (0.485, 0.456, 0.406)
        std = (0.229, 0.224, 0.225)
        imagenet: nn.Module = preprocess(mean, std)
        return imagenet
    if ":" not in spec:
        raise InvalidArgument(
            f"the preprocessing must be none, unit, imagenet, my.module:factory or a model such as "
            f"offramp:resnet20, got {spec!r}"
        )
    factory = imported(spec)
    with _checked(spec, "make a torch.nn.Module"):
        module = _as_module(spec, factory())
    # plain data, so that a saved network can name the flag to type again
    setattr(module, MADE_FROM, spec)
    return module


def make_exit(
    exit_: str | Exit | Callable[..., Exit],
    shape: tuple[int, ...],
    classes: int,
    earlier: Sequence[str] | None = None,
    layout: str | None = None,
) -> Exit:
    """Make an exit from its name or from a function.

    Args:
        exit_: a name, with or without arguments (`strided?width=64`); a function of (shape of one
            row's features, classes); or an Exit, which is returned as it is. A function with an
            argument `reads` gets the names of the earlier exits, one with an argument `layout` gets
            the layout.
        shape: of one row's features.
        classes: number of classes C.
        earlier: the names of the earlier exits, shallow to deep; None if they are not known.
        layout: where the features have their channels: "channels_first", "channels_last", "both",
            or None if it is not known.

    Returns:
        The exit.

    Raises:
        UnknownName: there is no exit, or argument of it, with this name; the message offers the
            nearest names.
        InvalidArgument: it is neither an exit nor a function that makes one.
        BadNetwork: the exit cannot read such features.
    """
    factory: Any = exit_
    arguments: dict[str, Any] = {}
    if isinstance(exit_, str):
        factory, arguments = exit_factory(exit_)
    if isinstance(factory, Exit):
        return factory
    takes_layout = callable(factory) and _takes(factory, "layout")
    if layout is not None and "layout" not in arguments and takes_layout:
        factory = partial(factory, layout=layout)
    reads = _reads(factory, exit_, earlier)
    if arguments:
        bound = partial(factory, shape, classes, **reads)
        with _checked(exit_, "make an Exit"):
            made = _called(
                bound, arguments, f"the exit {exit_!r}", "see the arguments that it takes"
            )
    else:
        with _checked(exit_, "make an Exit"):
            try:
                made = factory(shape, classes, **reads)
            except TypeError as problem:
                raise InvalidArgument(
                    f"the exit must be a name, an Exit or a function of (shape, classes), got "
                    f"{exit_!r} ({problem})"
                ) from problem
    if not isinstance(made, Exit):
        raise InvalidArgument(f"the exit {exit_!r} must make an Exit, got a {type(made).__name__}")
    return made


def exit_factory(name: str) -> tuple[Any, dict[str, Any]]:
    """Find the factory of an exit.

    Args:
        name: of the exit, with or without arguments.

    Returns:
        The factory, and the arguments in the name.

    Raises:
        UnknownName: there is no exit, or argument of it, with this name; the message offers the
            nearest names.
        InvalidArgument: the arguments are malformed.
    """
    word, arguments = name_of(name)
    factory = find("exits", word)
    known = list[str]()
    if arguments and callable(factory):
        known = [*inspect.signature(factory).parameters][2:]  # behind shape and classes
    for argument in arguments:
        if argument not in known:
            offered = [other for other in known if other != "reads"]
            raise unknown(argument, offered, f"argument of the exit {word!r}")
    return factory, arguments


def _called(
    factory: Callable[..., Any], arguments: Mapping[str, Any], what: str, remedy: str
) -> Any:
    """Call a factory with arguments as they were typed.

    Args:
        factory: makes a model, an exit or a gate.
        arguments: a wrong value can raise any exception.
        what: the factory, for the message.
        remedy: advice, for the message.
    """
    try:
        return factory(**arguments)
    except OfframpError:
        raise
    except Exception as problem:
        if not arguments and not isinstance(problem, TypeError):
            raise  # an error inside the factory, and not of its arguments
        how = "with these arguments" if arguments else "without arguments"
        raise InvalidArgument(f"{what} cannot be called {how} ({problem}); {remedy}") from problem


def _checked(name: object, wanted: str) -> AbstractContextManager[None]:
    """While it is open, an error of code that the user named ends in one sentence.

    An error of a function that the user passed as an object, or of our own, keeps its traceback.

    Args:
        name: of a factory, or the factory itself.
        wanted: what the factory must do.
    """
    if isinstance(name, str) and ":" in name and not name.startswith(OURS):
        return users_code(name, wanted)
    return nullcontext()


def make_gate(
    gate: str | Gate | Callable[..., Any] | Mapping[str, Any],
    earlier: Sequence[str] | None = None,
    shape: tuple[int, ...] | None = None,
    choices: int = 2,
) -> Gate:
    """Make a gate from its name, from a function, or from its configuration.

    Args:
        gate: a name, with or without arguments ("controller?width=16"); a function of logits
            [B, C] that gives scores [B]; a Gate, which is returned as it is; or the configuration
            of a gate of ours. A function or class with an argument `reads` makes a gate of the
            names of the earlier exits; one of (shape, choices) makes a gate for the features.
        earlier: the names of the earlier exits; None if they are not known.
        shape: of one row's features; None if it is not known.
        choices: number of ways that the gate chooses between.

    Returns:
        The gate.

    Raises:
        UnknownName: there is no gate with this name; the message offers the nearest names.
        InvalidArgument: it is neither a gate nor a function that makes one.
    """
    if isinstance(gate, Mapping):
        return _gate_from(gate)
    if made_for_features(gate):
        if shape is None:
            raise InvalidArgument(
                f"the gate {gate!r} is made for the features at its node. Pass its name to route "
                f"or cut"
            )
        return _gate_for(gate, shape, choices)
    factory: Any = find("gates", gate) if isinstance(gate, str) else gate
    reads = _reads(factory, gate, earlier)
    is_class = isinstance(factory, type) and issubclass(factory, Gate)
    if reads or is_class:
        with _checked(gate, "make a Gate"):
            try:
                factory = factory(**reads)
            except TypeError as problem:
                raise InvalidArgument(
                    f"the gate {gate!r} needs arguments ({problem}). Make it yourself and pass the "
                    f"object"
                ) from problem
    if isinstance(factory, Gate):
        return factory
    if not callable(factory):
        raise InvalidArgument(
            f"the gate must be a name, a Gate or a function of logits [B, C], got {gate!r}"
        )
    name = gate
    if not isinstance(name, str):
        name = f"{factory.__module__}:{getattr(factory, '__qualname__', 'gate')}"
    return Scorer(name, factory)


def made_for_features(gate: object) -> bool:
    """Whether a gate, or its name, is made by a function of (shape, choices).

    Args:
        gate: as for `make_gate`.
    """
    if isinstance(gate, Gate):
        return False
    factory: Any = find("gates", name_of(gate)[0]) if isinstance(gate, str) else gate
    try:
        names = [*inspect.signature(factory).parameters]
    except (TypeError, ValueError):
        return False
    return names[:2] == ["shape", "choices"]


def _gate_for(gate: Any, shape: tuple[int, ...], choices: int) -> Gate:
    """A gate that is made for the features at its node."""
    arguments: dict[str, Any] = {}
    factory = gate
    if isinstance(gate, str):
        word, arguments = name_of(gate)
        factory = find("gates", word)
        known = [*inspect.signature(factory).parameters][2:]  # behind shape and choices
        for argument in arguments:
            if argument not in known:
                raise unknown(argument, known, f"argument of the gate {word!r}")
    bound = partial(factory, shape, choices)
    with _checked(gate, "make a Gate"):
        made = _called(bound, arguments, f"the gate {gate!r}", "see the arguments that it takes")
    if not isinstance(made, Gate):
        raise InvalidArgument(f"the gate {gate!r} must make a Gate, got a {type(made).__name__}")
    return made


def _gate_from(config: Mapping[str, Any]) -> Gate:
    """A gate of ours from its configuration in a file."""
    arguments = dict(config)
    name = arguments.pop("name")
    if ":" in name:
        raise InvalidArgument(
            f"the gate is {name!r}, and a file may not name code to run. Give it again with gates="
        )
    if "gate" in arguments:  # this one wraps another gate
        arguments["gate"] = _gate_from(arguments["gate"])
    if not arguments:
        return make_gate(name)
    return make_gate(shelved("gates", name)(**arguments))


def _reads(factory: Any, name: object, earlier: Sequence[str] | None) -> dict[str, Any]:
    """The argument `reads` for a factory of an exit or a gate; empty if it has no such argument."""
    if isinstance(factory, (Exit, Gate)) or not callable(factory):
        return {}
    if not _takes(factory, "reads"):
        return {}
    if earlier is None:
        raise InvalidArgument(
            f"{name!r} reads earlier exits, which are not known here. Pass its name to cut or "
            f"ladder"
        )
    return {"reads": tuple(earlier)}


def _takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has an argument of this name."""
    try:
        return argument in inspect.signature(function).parameters
    except ValueError:  # functions written in C may have no signature
        return False


def _hub(spec: str) -> tuple[str, str, dict[str, str]] | None:
    """The hub, the name and the options of `hub:name?option=value&...`; None for other specs."""
    hub, colon, rest = spec.partition(":")
    if not colon or hub not in files("hubs"):
        return None
    name, mark, written = rest.partition("?")
    options = dict[str, str]()
    is_right = bool(name)
    for text in written.split("&") if mark else ():
        key, _, value = text.partition("=")
        is_right = is_right and bool(key and value)
        options[key] = value
    if not is_right:
        raise InvalidArgument(
            f"the model must be {hub}:NAME or {hub}:NAME?option=value&..., got {spec!r}"
        )
    return hub, name, options
