"""Models, preprocessing and gates from names: `offramp:resnet56`, `timm:resnet18`,
`my.module:factory`; weights from a file.

    offramp:NAME
    timm:NAME
    torchvision:NAME
    hf:FOLDER-OR-NAME
    onnx:FILE
    my.module:factory

The models of hubs come with their pretrained weights, unless a file of weights is given. Arguments
stand behind a question mark, for models and exits: `timm:resnet18?num_classes=10&pretrained=no`,
`offramp:alexnet?classes=100`, `strided?width=64`.
Behind a bar stand layers to convert (see `converting`): `offramp:resnet20|layer3.*=ghost?ratio=2`.
A name that the user typed may import the user's code. A name that stands in a file may not: from a
file only `offramp:`, `timm:` and `torchvision:` resolve, nothing is fetched, and anything else must
be given again by the caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from offramp._support.arguments import name_of
from offramp._support.find import files, find, find_file, imported, shelved, unknown
from offramp.building.converting import BAR, convert, split_spec
from offramp.building.weights import load_weights
from offramp.errors import BadFile, InvalidArgument, OfframpError
from offramp.networks.nodes import Exit, Gate, Scorer

OURS = "offramp:"
MADE_FROM = "_offramp_made_from"  # on a preprocessing module: the word that was typed for it
ONNX = "onnx:"
FROM_FILES = (
    OURS,
    "timm:",
    "torchvision:",
    ONNX + "?",
)  # names of architectures alone: hf reads configurations from elsewhere


def make_model(spec: str, weights: str | Path | None = None, *, fetch: bool = True) -> nn.Module:
    """The model that a typed spec names, in eval mode, with weights loaded strictly (see
    `weights.load_weights`).

    fetch: whether a hub may fetch pretrained weights; never where `weights` are given. Raises
    UnknownName or InvalidArgument for the spec, BadFile for weights that do not fit, MissingExtra
    where the hub's package is not installed. Of a model with conversions the weights may be those
    of the model before or after them.
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
        model = _called(factory, arguments, f"{spec!r}", "write NAME?argument=value&...")
    if not isinstance(model, nn.Module):
        model = find("members", "wrapped")(model) or model  # such as a scikit-learn estimator
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"{spec!r} gave a {type(model).__name__}, expected a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def _converted(spec: str, weights: str | Path | None, *, fetch: bool) -> nn.Module:
    """The model of a spec with conversions."""
    base, layers = split_spec(spec)
    try:
        model = make_model(base, weights, fetch=fetch)
    except BadFile:
        if weights is None:
            raise
        made = convert(make_model(base, fetch=False), layers)
        load_weights(made, weights)
        return made.eval()
    return convert(model, layers).eval()


def model_factory(spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What `offramp:NAME?argument=value` or a user's `module:factory` names, and its arguments; of
    no hub.

    Raises UnknownName with the nearest names, InvalidArgument.
    """
    name, arguments = name_of(spec)
    if ":" not in name:
        raise InvalidArgument(
            f"the model is {spec!r}, expected offramp:NAME (see offramp doctor), timm:NAME, "
            "torchvision:NAME, hf:NAME or my.module:factory"
        )
    return shelved("models", name.removeprefix(OURS)) if name.startswith(OURS) else imported(
        name
    ), arguments


def built_from_file(spec: str | None) -> bool:
    """Whether a model that a file names can be built again without running code of the user's."""
    if spec is None:
        return False
    base, layers = split_spec(spec)
    ours = not any(":" in method.partition("?")[0] for method in layers.values())
    # an ONNX file's bytes are in the weights
    return ours and (base.startswith(FROM_FILES) or base == ONNX)


def model_from_file(spec: str | None, member: str) -> nn.Module:
    """The model that a spec found in a file names, without pretrained weights: they were saved.

    Only `offramp:`, `timm:` and `torchvision:` resolve. Raises InvalidArgument for any other.
    """
    if spec is None or not built_from_file(spec):
        if spec is None:
            what = "was built by its user"
        else:
            what = f"is {spec!r}, and a file may not name code to run"
        raise InvalidArgument(
            f"member {member!r} {what}; give it again: load(folder, model={{{member!r}: model}})"
        )
    return make_model(spec, fetch=False)


def preprocess_of(spec: str) -> nn.Module | None:
    """The preprocessing that belongs to a model on our shelf or of a hub; None for the user's own
    models and texts.
    """
    spec = split_spec(spec)[0]
    hub = _hub(spec)
    if hub is not None:
        preprocess: nn.Module | None = find_file("hubs", hub[0]).preprocess(hub[1], hub[2])
        return preprocess
    if not spec.startswith(OURS):
        return None
    made: nn.Module = imported(f"{model_factory(spec)[0].__module__}:preprocess")()
    return made


def make_preprocess(spec: str) -> nn.Module | None:
    """The preprocessing that a typed word names.

    Args:
        spec: `none`, `unit` (divide by 255), `imagenet`, `my.module:preprocess`, or a model on our
            shelf or of a hub, such as `offramp:resnet20`, for the one that belongs to it.

    Returns:
        A module from uint8 images to what the model takes; None where nothing is to be done.

    Raises:
        InvalidArgument: no such preprocessing.
        UnknownName: no such model.
    """
    preprocess = find("layers", "Preprocess")
    if spec.startswith(OURS) or _hub(spec) is not None:
        return preprocess_of(spec)
    if spec == "none":
        return None
    if spec in {"unit", "imagenet"}:
        scaled: nn.Module = (
            preprocess()
            if spec == "unit"
            else preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        return scaled
    if ":" not in spec:
        raise InvalidArgument(
            f"the preprocessing is {spec!r}, expected none, unit, imagenet, my.module:factory or "
            f"a model such as "
            "offramp:resnet20"
        )
    made = imported(spec)()
    if not isinstance(made, nn.Module):
        raise InvalidArgument(f"{spec!r} gave a {type(made).__name__}, expected a torch.nn.Module")
    # plain data, so that a saved network can name the flag to type again
    setattr(made, MADE_FROM, spec)
    return made


def make_exit(
    exit_: str | Exit | Callable[..., Exit],
    shape: tuple[int, ...],
    classes: int,
    earlier: Sequence[str] | None = None,
    layout: str | None = None,
) -> Exit:
    """An exit from its name or from a function of (shape of one row's features, classes); an Exit
    as it is.

    A name may have arguments: `strided?width=64`.
    A function with an argument `reads` is also given the names of the `earlier` exits, shallow to
    deep; one with an argument `layout` where the features have their channels ("channels_first",
    "channels_last", "both"). Raises UnknownName with the nearest names, InvalidArgument for what is
    no exit, BadNetwork for features that do not suit.
    """
    found, arguments = exit_factory(exit_) if isinstance(exit_, str) else (exit_, dict[str, Any]())
    if isinstance(found, Exit):
        return found
    if (
        layout is not None
        and callable(found)
        and "layout" not in arguments
        and _takes(found, "layout")
    ):
        found = partial(found, layout=layout)
    if arguments:
        given = partial(found, shape, classes, **_reading(found, exit_, earlier))
        made = _called(given, arguments, f"the exit {exit_!r}", "see what it takes")
    else:
        try:
            made = found(shape, classes, **_reading(found, exit_, earlier))
        except TypeError as problem:
            raise InvalidArgument(
                f"the exit {exit_!r} is no function of (shape, classes) ({problem}); give one, or "
                f"an Exit"
            ) from problem
    if not isinstance(made, Exit):
        raise InvalidArgument(f"the exit {exit_!r} gave a {type(made).__name__}, expected an Exit")
    return made


def exit_factory(name: str) -> tuple[Any, dict[str, Any]]:
    """What the name of an exit stands for, and its arguments.

    Raises UnknownName with the nearest names, InvalidArgument also for an argument that it does not
    take.
    """
    word, arguments = name_of(name)
    found = find("exits", word)
    if arguments and callable(found):
        known = [*inspect.signature(found).parameters][2:]
    else:
        known = []
    for argument in arguments:
        if argument not in known:
            raise unknown(
                argument,
                [each for each in known if each != "reads"],
                f"argument of the exit {word!r}",
            )
    return found, arguments


def _called(
    factory: Callable[..., Any], arguments: Mapping[str, Any], what: str, remedy: str
) -> Any:
    """What a factory makes with arguments as they were typed: values that it cannot take raise
    anything.
    """
    try:
        return factory(**arguments)
    except OfframpError:
        raise
    except Exception as problem:
        if not arguments and not isinstance(problem, TypeError):
            raise
        how = "with these arguments" if arguments else "without arguments"
        raise InvalidArgument(f"{what} cannot be called {how} ({problem}); {remedy}") from problem


def make_gate(
    gate: str | Gate | Callable[..., Any] | Mapping[str, Any],
    earlier: Sequence[str] | None = None,
    shape: tuple[int, ...] | None = None,
    choices: int = 2,
) -> Gate:
    """A gate from its name, from a function of logits [B, C] -> [B], or from the config of one on
    our shelf.

    A function or class with an argument `reads` makes a gate of the names of the `earlier` exits.
    One of (shape, choices) makes it for the `shape` of a row's features and so many ways; it may
    have more arguments: "controller?width=16".
    Raises UnknownName with the nearest names, InvalidArgument for what is no gate.
    """
    if isinstance(gate, Mapping):
        return _gate_from(gate)
    if made_for_features(gate):
        if shape is None:
            raise InvalidArgument(
                f"the gate {gate!r} is made for the features at its node; give its name to route "
                f"or cut"
            )
        return _gate_for(gate, shape, choices)
    found: Any = find("gates", gate) if isinstance(gate, str) else gate
    if (reads := _reading(found, gate, earlier)) or (
        isinstance(found, type) and issubclass(found, Gate)
    ):
        try:
            found = found(**reads)
        except TypeError as problem:
            raise InvalidArgument(
                f"the gate {gate!r} needs arguments ({problem}); build it and give the object"
            ) from problem
    if isinstance(found, Gate):
        return found
    if not callable(found):
        raise InvalidArgument(
            f"the gate is {gate!r}, expected a name, a Gate or a function of logits [B, C]"
        )
    if isinstance(gate, str):
        name = gate
    else:
        name = f"{found.__module__}:{getattr(found, '__qualname__', 'gate')}"
    return Scorer(name, found)


def made_for_features(gate: object) -> bool:
    """Whether a gate, or its name, is made by a function of (shape, choices)."""
    if isinstance(gate, Gate):
        return False
    found: Any = find("gates", name_of(gate)[0]) if isinstance(gate, str) else gate
    try:
        names = [*inspect.signature(found).parameters]
    except (TypeError, ValueError):
        return False
    return names[:2] == ["shape", "choices"]


def _gate_for(gate: Any, shape: tuple[int, ...], choices: int) -> Gate:
    arguments: dict[str, Any] = {}
    found = gate
    if isinstance(gate, str):
        word, arguments = name_of(gate)
        found = find("gates", word)
        known = [*inspect.signature(found).parameters][2:]
        for argument in arguments:
            if argument not in known:
                raise unknown(argument, known, f"argument of the gate {word!r}")
    made = _called(
        partial(found, shape, choices), arguments, f"the gate {gate!r}", "see what it takes"
    )
    if not isinstance(made, Gate):
        raise InvalidArgument(f"the gate {gate!r} gave a {type(made).__name__}, expected a Gate")
    return made


def _gate_from(config: Mapping[str, Any]) -> Gate:
    arguments = dict(config)
    name = arguments.pop("name")
    if ":" in name:
        raise InvalidArgument(
            f"the gate is {name!r}, and a file may not name code to run; give it again with gates="
        )
    if "gate" in arguments:
        arguments["gate"] = _gate_from(arguments["gate"])
    return make_gate(shelved("gates", name)(**arguments) if arguments else name)


def _reading(found: Any, name: object, earlier: Sequence[str] | None) -> dict[str, Any]:
    """The argument `reads` of what makes an exit or a gate, if it has one."""
    if isinstance(found, (Exit, Gate)) or not callable(found):
        return {}
    if not _takes(found, "reads"):
        return {}
    if earlier is None:
        raise InvalidArgument(
            f"{name!r} looks at earlier exits, which are not known here; give its name to cut or "
            f"ladder"
        )
    return {"reads": tuple(earlier)}


def _takes(function: Callable[..., Any], argument: str) -> bool:
    try:
        return argument in inspect.signature(function).parameters
    except ValueError:  # what is written in C may have no signature
        return False


def _hub(spec: str) -> tuple[str, str, dict[str, str]] | None:
    """The hub, the name and the options of `hub:name?option=value&...`; None for what names no
    hub.
    """
    hub, colon, rest = spec.partition(":")
    if not colon or hub not in files("hubs"):
        return None
    name, mark, behind = rest.partition("?")
    options = [text.partition("=") for text in behind.split("&")] if mark else []
    if not name or not all(key and value for key, _, value in options):
        raise InvalidArgument(
            f"the model is {spec!r}, expected {hub}:NAME or {hub}:NAME?option=value&...; write it "
            f"so"
        )
    return hub, name, {key: value for key, _, value in options}
