"""`convert`: a copy of a model in which cheaper layers stand in the place of some of its own."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from offramp._support.arguments import name_of
from offramp._support.find import files, find, imported, names, unknown
from offramp._support.notices import say
from offramp.errors import BadNetwork, InvalidArgument, OfframpError, UnknownName
from offramp.networks.layer import Layer, SavesNothing, outer_layers
from offramp.networks.wrappers import require_plain, unwrapped

Method = str | type[Layer] | Callable[[nn.Module], nn.Module]
BAR = "|"  # between a model and its conversions
KEEP = "keep"  # the method that leaves layers as they are
RESIZED = "resized"  # gives a plain layer other widths: how a pruned model is built again
SHOWN = 4  # names in a sentence


def convert(
    model: nn.Module,
    layers: Mapping[Any, Method],
    *,
    example: Any = None,
    data: Any = None,
) -> nn.Module:
    """A copy of a model with cheaper layers; an ordinary model, to be cut, stacked, trained,
    exported.

    Args:
        model: trained, in the mode in which the copy is wanted. It is not changed.
        layers: what to replace, and by which method. A key is a pattern of module names, in which
            `*` stands for anything ("layer3.*"), or a class of modules: `torch.nn.Conv2d`, or its
            name "Conv2d". Where several keys match a layer the last one counts. A method is the
            name of a file on the shelf `layers`, with options behind a question mark
            ("ghost?ratio=2", "low_rank?energy=0.8"), a `Layer` of yours ("my.module:Mine" or the
            class), a function of the layer, or "keep".
        example: a small batch as the model takes it. Methods that look at the whole model, such as
            "pruned", need it; for others it tries the copy out.
        data: labelled rows, for methods that look at gradients or features.

    Returns:
        The copy. Modules that are not replaced keep their names and weights.

    Raises:
        UnknownName: a pattern that matches nothing, or a method that is on no shelf; the nearest
            names are offered.
        InvalidArgument: an option that the method does not take, or takes with other values.
        BadNetwork: a layer that the method cannot replace; layers that share weights with others.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
        >>> cheaper = convert(model, {"0": "low_rank?rank=8"})
        >>> cheaper[0].first.weight.shape, cheaper(torch.zeros(2, 64)).shape
        (torch.Size([8, 64]), torch.Size([2, 3]))
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(layers, Mapping) or not layers:
        raise InvalidArgument(
            'layers must map patterns to methods, such as {"layer3.*": "ghost?ratio=2"}'
        )
    inner = unwrapped(model)[0]
    require_plain(inner, "model")
    made = copy.deepcopy(inner)
    for method, chosen in _by_method(made, layers):
        if method == KEEP:
            continue
        rewrite = _rewrite_of(method)
        if rewrite is not None:
            arguments = name_of(str(method))[1]
            made = _called(rewrite, method, arguments, made, chosen, example=example, data=data)
        else:
            made = _replaced(made, method, chosen)
    if example is not None:
        _try_out(made, example)
    return made


def _by_method(model: nn.Module, layers: Mapping[Any, Method]) -> list[tuple[Method, list[str]]]:
    """The methods in order, each with the names that it gets: the last key that matches counts."""
    winner: dict[str, int] = {}
    for number, key in enumerate(layers):
        for name in _matched(model, key):
            winner[name] = number
    found: list[tuple[Method, list[str]]] = []
    for number, method in enumerate(layers.values()):
        chosen = [name for name, best in winner.items() if best == number]
        found.append((method, chosen))
    return found


def _matched(model: nn.Module, key: str | type[nn.Module]) -> list[str]:
    """The names of the modules that a pattern, a class, or the name of a class matches."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(key, type):
        found = [name for name, module in modules.items() if isinstance(module, key)]
        if not found:
            raise UnknownName(f"the model has no {key.__name__}; it has {_kinds(modules)}")
        return found
    found = [name for name in modules if fnmatch.fnmatchcase(name, key)]
    found += [name for name, module in modules.items() if type(module).__name__ == key]
    found = [name for name in dict.fromkeys(found) if name or key == ""]
    if found:
        return found
    near = difflib.get_close_matches(key.rstrip(".*"), [name for name in modules if name], n=3)
    if near:
        offer = f"the nearest names are {', '.join(near)}"
    else:
        offer = f"it has {_kinds(modules)}"
    raise UnknownName(f"the pattern {key!r} matches no module of this model; {offer}")


def _kinds(modules: Mapping[str, nn.Module]) -> str:
    kinds = sorted({type(module).__name__ for name, module in modules.items() if name})
    return ", ".join(kinds)


def _rewrite_of(method: Method) -> Callable[..., nn.Module] | None:
    """The function behind a method that changes a whole model at once, such as `pruned`."""
    if not isinstance(method, str) or ":" in method:
        return None
    name = name_of(method)[0]
    if name not in names("layers"):
        return None
    found = find("layers", name)
    if not getattr(found, "rewrites", False):
        return None
    rewrite: Callable[..., nn.Module] = found
    return rewrite


def layer_class(name: str) -> type[Layer]:
    """The class that a method's name stands for: `low_rank` is `LowRank` in layers/low_rank.py.

    Args:
        name: of a file on the shelf `layers`, or `my.module:Mine`.

    Raises:
        UnknownName: there is no such method; the nearest are offered.
        InvalidArgument: it names something that is no Layer.
    """
    if ":" in name:
        own = imported(name)
        if not (isinstance(own, type) and issubclass(own, Layer)):
            raise InvalidArgument(f"{name!r} must be a subclass of offramp.contracts.Layer")
        return own
    title = "".join(word.title() for word in name.split("_"))
    if name in files("layers") and title in names("layers"):
        found = find("layers", title)
        if isinstance(found, type) and issubclass(found, Layer):
            return found
    raise unknown(name, methods(), "method that replaces layers")


def methods() -> list[str]:
    """The names of all methods on the shelf `layers`."""
    methods = [KEEP]
    for name in files("layers"):
        title = "".join(word.title() for word in name.split("_"))
        offered = names("layers")
        if title in offered:
            kind = find("layers", title)
            if isinstance(kind, type) and issubclass(kind, Layer):
                methods.append(name)
        elif name in offered and getattr(find("layers", name), "rewrites", False):
            methods.append(name)
    return methods


def _replaced(model: nn.Module, method: Method, chosen: list[str]) -> nn.Module:
    """The model with the chosen layers replaced by one method, in place."""
    kinds: tuple[type[nn.Module], ...] = (nn.Module,)
    arguments: dict[str, Any] = {}
    build: Callable[..., nn.Module]
    if isinstance(method, str) and name_of(method)[0] == RESIZED:
        build = find("layers", RESIZED)
        arguments = name_of(method)[1]
    elif isinstance(method, str):
        name, arguments = name_of(method)
        kind = layer_class(name)
        kinds = kind.kinds
        build = kind.from_layer
    elif isinstance(method, type) and issubclass(method, Layer):
        kinds = method.kinds
        build = method.from_layer
    elif callable(method) and not isinstance(method, type):
        build = method
    else:
        raise InvalidArgument(f"a method must be a name, a Layer or a function, got {method!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    suited = [name for name in chosen if isinstance(modules[name], kinds)]
    suited = _outermost(suited)
    if not suited:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        got = ", ".join(f"{name!r} ({type(modules[name]).__name__})" for name in chosen[:SHOWN])
        raise BadNetwork(f"{_title(method)} replaces {wanted}; the pattern matched only {got}")
    _require_unshared(model, suited)
    left: dict[str, SavesNothing] = {}
    for name in suited:
        try:
            layer = _called(build, method, arguments, modules[name])
        except SavesNothing as problem:
            left[name] = problem
            continue
        except InvalidArgument as problem:
            raise type(problem)(f"{name!r}: {problem}") from problem
        if not isinstance(layer, nn.Module):
            raise InvalidArgument(
                f"{_title(method)} must give a module, got {type(layer).__name__}"
            )
        if name == "":
            return layer
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    if len(left) == len(suited):
        name, why = next(iter(left.items()))
        raise BadNetwork(f"{_title(method)} saves nothing here: {name!r}: {why}") from why
    if left:
        some = ", ".join(list(left)[:SHOWN])
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        say(f"{_title(method)} left {some}{more} as they are: it would not make them smaller")
    return model


def _called(
    build: Callable[..., Any], method: Method, options: Mapping[str, Any], *given: Any, **more: Any
) -> Any:
    """What a method makes, with the options that were written behind its name."""
    known = inspect.signature(build).parameters
    for option in options:
        if option not in known:
            offered = [
                name
                for name, one in known.items()
                if one.kind is one.KEYWORD_ONLY and name not in more
            ]
            raise unknown(option, offered or ["none"], f"option of {_title(method)}")
    try:
        return build(*given, **options, **more)
    except OfframpError:
        raise
    except (TypeError, ValueError) as problem:
        if not options:
            raise
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise InvalidArgument(f"{_title(method)} cannot use {told} ({problem})") from problem


def _title(method: Method) -> str:
    if isinstance(method, str):
        return name_of(method)[0]
    return getattr(method, "__name__", type(method).__name__)


def _outermost(chosen: list[str]) -> list[str]:
    """The names without those that are inside of another one."""
    kept: list[str] = []
    for name in chosen:
        inside = any(
            outer == "" or name.startswith(f"{outer}.") for outer in chosen if outer != name
        )
        if not inside:
            kept.append(name)
    return kept


def _require_unshared(model: nn.Module, chosen: list[str]) -> None:
    """Raise BadNetwork where a layer to replace is used under two names, or ties its weights."""
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in module.named_parameters(recurse=False):
            index = f"{name}.{key}" if name else key
            first = owners.setdefault(id(value), index)
            if first == index:
                continue
            for layer in chosen:
                within = [each for each in (first, index) if each.startswith(f"{layer}.")]
                if len(within) == 1:
                    raise BadNetwork(
                        f"{first!r} and {index!r} are the same weights; replacing {layer!r} would "
                        "untie them, so leave it out of the patterns or untie them first"
                    )


def _try_out(model: nn.Module, example: Any) -> None:
    """Raise BadNetwork where the copy fails on the example."""
    import torch

    from offramp.networks.inputs import as_inputs, call_model, copies

    try:
        with torch.no_grad():
            call_model(model, None, copies(as_inputs(example)))
    except (RuntimeError, IndexError, TypeError, ValueError) as problem:
        why = str(problem).strip().splitlines()[0]
        raise BadNetwork(f"the converted model fails on the example: {why}") from problem


def conversions_of(model: nn.Module, base: nn.Module | None = None) -> dict[str, str]:
    """The methods by which a model's layers came to be, with all options as numbers, by layer.

    Args:
        model: a converted one.
        base: the model as it was, if layers may have lost channels ("pruned").

    Raises:
        InvalidArgument: a layer of the user's own class, or by a function: no text stands for it.
    """
    conversions: dict[str, str] = {}
    for name, layer in outer_layers(model).items():
        conversions[name] = _spec_of(name, layer)
    if base is not None:
        before = dict(base.named_modules())
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{outer}.") or name == outer for outer in conversions)
            if not inside and name in before:
                spec = _resized_spec(before[name], module)
                if spec is not None:
                    conversions[name] = spec
    return conversions


def _resized_spec(before: nn.Module, after: nn.Module) -> str | None:
    """How a plain layer of other widths is made again; None where the widths are the same."""
    widths = {
        nn.Conv2d: ("in_channels", "out_channels"),
        nn.Linear: ("in_features", "out_features"),
        nn.BatchNorm2d: ("num_features", "num_features"),
    }
    kind = type(after)
    if kind not in widths or type(before) is not kind:
        return None
    inputs, outputs = (getattr(after, name) for name in widths[kind])
    if (inputs, outputs) == tuple(getattr(before, name) for name in widths[kind]):
        return None
    return f"{RESIZED}?inputs={inputs}&outputs={outputs}"


def spec_with(base: str, conversions: Mapping[str, str]) -> str:
    """A model's spec with its conversions: `offramp:resnet20|layer1.0.conv1=ghost?ratio=2`.

    Args:
        base: the spec of the model before.
        conversions: methods by layer or pattern; layers with the same method are put together.
    """
    together: dict[str, list[str]] = {}
    for name, method in conversions.items():
        together.setdefault(method, []).append(name)
    parts = [f"{','.join(found)}={method}" for method, found in together.items()]
    return BAR.join([base, *parts])


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """A model's spec without its conversions, and those by pattern.

    Args:
        spec: `offramp:resnet20|layer3.*=ghost?ratio=2|conv1=keep`.

    Raises:
        InvalidArgument: a part behind a bar is no PATTERN=METHOD.

    >>> split_spec("offramp:resnet20|layer1.*,layer2.*=ghost?ratio=2")
    ('offramp:resnet20', {'layer1.*': 'ghost?ratio=2', 'layer2.*': 'ghost?ratio=2'})
    """
    base, *parts = spec.split(BAR)
    found: dict[str, str] = {}
    for part in parts:
        pattern, equals, method = part.partition("=")
        if not (pattern.strip() and equals and method.strip()):
            raise InvalidArgument(f"a conversion must be PATTERN=METHOD, got {part!r} in {spec!r}")
        for one in pattern.split(","):
            found[one.strip()] = method.strip()
    return base.strip(), found


def _spec_of(name: str, layer: Layer) -> str:
    file = type(layer).__module__.rpartition(".")[2]
    ours = type(layer).__module__.startswith("offramp.layers.")
    if not ours or file not in files("layers") or layer_class(file) is not type(layer):
        raise InvalidArgument(
            f"{name!r} is a {type(layer).__name__}, which no text stands for; give the model again "
            "where the network is loaded"
        )
    options = "&".join(f"{key}={_text(value)}" for key, value in layer.options().items())
    return f"{file}?{options}" if options else file


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
