"""`convert`: make a copy of a model in which some layers are replaced by cheaper ones."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from offramp._support.arguments import name_of
from offramp._support.find import failure, files, find, imported, names, unknown, users_code
from offramp._support.notices import say
from offramp._support.sentences import few, first_line
from offramp.errors import BadNetwork, InvalidArgument, OfframpError, UnknownName
from offramp.networks.hooks import forward_hooks
from offramp.networks.layer import Layer, SavesNothing, outer_layers
from offramp.networks.wrappers import deep_copy, require_plain, unwrapped

Method = str | type[Layer] | Callable[[nn.Module], nn.Module]
BAR = "|"  # between a model and its conversions
KEEP = "keep"  # the method that leaves layers as they are
RESIZED = "resized"  # gives a plain layer other widths: how a pruned model is built again
SHOWN = 4  # names in a message
# The attributes with the input and the output widths of plain layers.
CHANNELS = ("in_channels", "out_channels")
FEATURES = ("num_features", "num_features")
WIDTHS: dict[type[nn.Module], tuple[str, str]] = {
    nn.Conv1d: CHANNELS,
    nn.Conv2d: CHANNELS,
    nn.Conv3d: CHANNELS,
    nn.ConvTranspose2d: CHANNELS,
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm1d: FEATURES,
    nn.BatchNorm2d: FEATURES,
    nn.BatchNorm3d: FEATURES,
    nn.InstanceNorm2d: FEATURES,
    nn.GroupNorm: ("num_channels", "num_channels"),
    nn.PReLU: ("num_parameters", "num_parameters"),
}


def convert(
    model: nn.Module,
    layers: Mapping[Any, Method],
    *,
    example: Any = None,
    data: Any = None,
) -> nn.Module:
    """Make a copy of a model with cheaper layers. The copy is an ordinary model that can be cut,
    stacked, trained and exported.

    Args:
        model: a trained model, in the mode that the copy shall have. It is not changed.
        layers: the method by which each layer is replaced. A key is a pattern of module names, in
            which `*` matches anything ("layer3.*"), or a class of modules: `torch.nn.Conv2d`, or
            its name "Conv2d". If several keys match a layer, the last one counts. A method is the
            name of a file on the shelf `layers`, with options behind a question mark
            ("ghost?ratio=2", "low_rank?energy=0.8"), a `Layer` of yours ("my.module:Mine" or the
            class), a function of the layer, or "keep".
        example: a small batch as the model takes it. Methods that change the whole model, such as
            "pruned", need it; for other methods the copy is tried on it.
        data: labelled rows, for methods that use gradients or features.

    Returns:
        The copy. Modules that are not replaced keep their names and weights.

    Raises:
        UnknownName: a pattern matches no module, or there is no method with this name; the message
            offers the nearest names.
        InvalidArgument: the method has no such option, or the option has a wrong value.
        BadNetwork: the method cannot replace a layer, or a layer shares weights with another one.

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
    for key in layers:
        if not isinstance(key, (str, type)):
            raise InvalidArgument(
                f"a key of layers must be a pattern of names or a class of modules, got {key!r}"
            )
    inner = unwrapped(model)[0]
    require_plain(inner, "model")
    changed = deep_copy(inner)
    for method, layer_names in _by_method(changed, layers):
        if method == KEEP:
            continue
        if isinstance(method, str) and name_of(method)[0] == KEEP:
            raise InvalidArgument(f"keep has no options, got {method!r}")
        rewrite = _rewrite_of(method)
        if rewrite is None:  # replace layers one by one
            changed = _replaced(changed, method, layer_names)
        else:  # change the whole model at once
            arguments = name_of(str(method))[1]
            changed = _called(
                rewrite, method, arguments, changed, layer_names, example=example, data=data
            )
    if example is not None:
        _try_out(changed, example)
    return changed


def _by_method(model: nn.Module, layers: Mapping[Any, Method]) -> list[tuple[Method, list[str]]]:
    """The methods in order, each with the names of its layers. If several keys match a layer, the
    last one counts.
    """
    last_key: dict[str, int] = {}  # by layer, the number of the key that counts
    for number, key in enumerate(layers):
        for name in matched(model, key):
            last_key[name] = number
    by_method: list[tuple[Method, list[str]]] = []
    for number, method in enumerate(layers.values()):
        chosen = [name for name, last in last_key.items() if last == number]
        by_method.append((method, chosen))
    return by_method


def matched(model: nn.Module, key: str | type[nn.Module]) -> list[str]:
    """List the modules that a key of `convert` matches.

    Args:
        model: a model.
        key: a pattern of names with `*`, a class of modules, or the name of a class.

    Returns:
        The names of these modules.

    Raises:
        UnknownName: there are none; the message offers the nearest names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    matches = list[str]()
    if isinstance(key, type):
        for name, module in modules.items():
            if isinstance(module, key):
                matches.append(name)
        if not matches:
            raise UnknownName(f"the model has no {key.__name__}; it has {_kinds(modules)}")
        return matches

    # first the modules whose names match, then those whose class has this name
    matches += [name for name in modules if fnmatch.fnmatchcase(name, key)]
    for name, module in modules.items():
        if type(module).__name__ == key and name not in matches:
            matches.append(name)
    # the model itself has the name "", which "*" matches: it is meant only if the key is empty
    if key != "" and "" in matches:
        matches.remove("")
    if matches:
        return matches

    near = difflib.get_close_matches(key.rstrip(".*"), [name for name in modules if name], n=3)
    if near:
        offer = f"the nearest names are {', '.join(near)}"
    else:
        offer = f"it has {_kinds(modules)}"
    raise UnknownName(f"the pattern {key!r} matches no module of this model; {offer}")


def _kinds(modules: Mapping[str, nn.Module]) -> str:
    """The classes of a model's modules, in a message."""
    kinds = set[str]()
    for name, module in modules.items():
        if name:  # not the model itself
            kinds.add(type(module).__name__)
    return ", ".join(sorted(kinds))


def _rewrite_of(method: Method) -> Callable[..., nn.Module] | None:
    """The function behind a method that changes a whole model at once, such as `pruned`."""
    if not isinstance(method, str) or ":" in method:
        return None
    name = name_of(method)[0]
    if name not in names("layers"):
        return None
    rewrite: Callable[..., nn.Module] = find("layers", name)
    return rewrite if getattr(rewrite, "rewrites", False) else None


def layer_class(name: str) -> type[Layer]:
    """Find the class of a method: `low_rank` is `LowRank` in layers/low_rank.py.

    Args:
        name: of a file on the shelf `layers`, or `my.module:Mine`.

    Returns:
        The class.

    Raises:
        UnknownName: there is no method with this name; the message offers the nearest ones.
        InvalidArgument: `my.module:Mine` is not a Layer.
    """
    if ":" in name:
        kind = imported(name)
        if not (isinstance(kind, type) and issubclass(kind, Layer)):
            raise InvalidArgument(f"{name!r} must be a subclass of offramp.contracts.Layer")
        return kind
    if name in files("layers"):
        kind = _class_of_file(name)
        if kind is not None:
            return kind
    raise unknown(name, methods(), "method that replaces layers")


def _class_of_file(name: str) -> type[Layer] | None:
    """The Layer of a file on the shelf, which has the file's name in title case; None if it has
    none.
    """
    title = name.replace("_", " ").title().replace(" ", "")
    if title not in names("layers"):
        return None
    kind = find("layers", title)
    return kind if isinstance(kind, type) and issubclass(kind, Layer) else None


def methods() -> list[str]:
    """The names of all methods on the shelf `layers`."""
    methods = [KEEP]
    for name in files("layers"):
        is_layer = _class_of_file(name) is not None
        if is_layer or _rewrite_of(name) is not None:
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
    for name in chosen:
        if name not in modules:
            raise BadNetwork(
                f"{name!r} is inside a module that an earlier key replaced. Put the key of "
                f"{_title(method)} before it, or convert the copy once more"
            )
    suited = outermost([name for name in chosen if isinstance(modules[name], kinds)])
    if not suited:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        matched = list[str]()
        for name in chosen[:SHOWN]:
            matched.append(f"{name!r} ({type(modules[name]).__name__})")
        raise BadNetwork(
            f"{_title(method)} replaces {wanted}; the pattern matched only {', '.join(matched)}"
        )
    _require_unshared(model, suited)
    for name in suited:
        _require_no_code(name, modules[name])

    # Layers that would not become smaller stay as they are.
    unchanged: dict[str, SavesNothing] = {}
    for name in suited:
        try:
            layer = _called(build, method, arguments, modules[name])
        except SavesNothing as problem:
            unchanged[name] = problem
            continue
        except InvalidArgument as problem:
            raise type(problem)(f"{name!r}: {problem}") from problem
        if not isinstance(layer, nn.Module):
            raise InvalidArgument(
                f"{_title(method)} must give a module, got {type(layer).__name__}"
            )
        if name == "":  # the model itself
            return layer
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    if len(unchanged) == len(suited):
        name, reason = next(iter(unchanged.items()))
        raise BadNetwork(f"{_title(method)} saves nothing here: {name!r}: {reason}") from reason
    if unchanged:
        listed = few(unchanged, SHOWN)
        say(f"{_title(method)} left {listed} as they are: it would not make them smaller")
    return model


def _called(
    build: Callable[..., Any], method: Method, options: Mapping[str, Any], *given: Any, **more: Any
) -> Any:
    """Call a method.

    Args:
        build: the function of the method.
        method: its name, for messages.
        options: written behind its name.
        given: its positional arguments.
        more: further keyword arguments.
    """
    known = inspect.signature(build).parameters
    offered = list[str]()
    for name, parameter in known.items():
        if parameter.kind is parameter.KEYWORD_ONLY and name not in more:
            offered.append(name)
    for option in options:
        if option not in known:
            raise unknown(option, offered or ["none"], f"option of {_title(method)}")
    named: AbstractContextManager[None] = nullcontext()
    if isinstance(method, str) and ":" in method:  # a Layer of the user
        named = users_code(_title(method), "make a layer")
    try:
        with named:
            return build(*given, **options, **more)
    except OfframpError:
        raise
    except (TypeError, ValueError) as problem:
        if not options and not isinstance(method, str):
            raise  # from a function of the user
        if not options:
            raise InvalidArgument(f"{_title(method)} needs options ({problem})") from problem
        written = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise InvalidArgument(f"{_title(method)} cannot use {written} ({problem})") from problem


def _title(method: Method) -> str:
    """The name of a method, for messages."""
    if isinstance(method, str):
        return name_of(method)[0]
    return getattr(method, "__name__", type(method).__name__)


def outermost(names: list[str]) -> list[str]:
    """The names without those of modules inside another one."""
    outermost = list[str]()
    for name in names:
        others = [other for other in names if other != name]
        if not _is_inside(name, others):
            outermost.append(name)
    return outermost


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is inside one of these; the model itself has the name ""."""
    for outer in modules:
        if outer == "" or name.startswith(f"{outer}."):
            return True
    return False


def _require_no_code(name: str, module: nn.Module) -> None:
    """Raise BadNetwork if a layer has code of the user, which its substitute would not run."""
    if forward_hooks(module):
        code = "a forward hook"
    elif "forward" in vars(module):
        code = "a forward of its own"
    else:
        return
    raise BadNetwork(
        f"{name!r} has {code}, which the layer in its place would not call. Remove it first (for "
        f"weights that a hook computes: torch.nn.utils.remove_weight_norm, or prune.remove), or "
        f"leave the layer out of the patterns"
    )


def _require_unshared(model: nn.Module, chosen: list[str]) -> None:
    """Raise BadNetwork if a layer to replace shares weights with a module outside it."""
    first_names: dict[int, str] = {}  # by the identity of a parameter, its first name
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in module.named_parameters(recurse=False):
            parameter = f"{name}.{key}" if name else key
            first = first_names.setdefault(id(value), parameter)
            if first == parameter:
                continue
            # `value` has two names. Both must be inside the layer, or both outside.
            for layer in chosen:
                is_first_inside = first.startswith(f"{layer}.")
                if is_first_inside != parameter.startswith(f"{layer}."):
                    raise BadNetwork(
                        f"{first!r} and {parameter!r} are the same weights; replacing {layer!r} "
                        f"would untie them. Leave it out of the patterns, or untie them first"
                    )


def _try_out(model: nn.Module, example: Any) -> None:
    """Raise BadNetwork if the copy fails on the example."""
    import torch

    from offramp.networks.inputs import as_inputs, call_model, copies

    try:
        with torch.no_grad():
            call_model(model, None, copies(as_inputs(example)))
    except (RuntimeError, IndexError, TypeError, ValueError) as problem:
        why = first_line(problem)
        raise BadNetwork(f"the converted model fails on the example: {why}") from problem
    except Exception as problem:  # code of the user can raise anything
        raise BadNetwork(f"the converted model fails on the example: {failure(problem)}") from (
            problem
        )


def conversions_of(model: nn.Module, base: nn.Module | None = None) -> dict[str, str]:
    """List the methods by which a model's layers were converted, with all options as numbers.

    Args:
        model: a converted model.
        base: the model before. With it layers that lost channels ("pruned") are found too, and it
            is checked that the methods make the same layers of it again.

    Returns:
        Methods by layer.

    Raises:
        InvalidArgument: there is no text for the model: a layer is of the user's own class, was
            made by a function, or was converted twice.
    """
    conversions: dict[str, str] = {}
    for name, layer in outer_layers(model).items():
        conversions[name] = _spec_of(name, layer)
    if base is None:
        return conversions
    # Layers outside of converted ones may have other widths.
    before = dict(base.named_modules())
    converted = list(conversions)
    for name, module in model.named_modules():
        if name not in before or name in converted or _is_inside(name, converted):
            continue
        spec = _resized_spec(before[name], module)
        if spec is not None:
            conversions[name] = spec
    _require_same_again(model, base, conversions)
    return conversions


def _require_same_again(model: nn.Module, base: nn.Module, conversions: Mapping[str, str]) -> None:
    """Raise InvalidArgument unless the conversions make the same modules of `base` again.

    They do not if a layer was made by a function, if the parts of a converted layer were converted
    once more, or if Torch-Pruning changed a kind of layer that `resized` does not make.
    """
    again = base
    why = "the names of its methods make other layers"
    try:
        if conversions:
            again = convert(base, conversions)
        if _structure(again) == _structure(model):
            return
    except (OfframpError, RuntimeError, TypeError, ValueError) as problem:
        why = first_line(problem)
    raise InvalidArgument(
        f"the converted model cannot be written as a spec ({why}). Give the model again when the "
        f"network is loaded"
    )


def _structure(model: nn.Module) -> list[tuple[str, ...]]:
    """The modules and tensors of a model: names, classes, settings and shapes."""
    lines = list[tuple[str, ...]]()
    for name, module in model.named_modules():
        settings = ""
        if type(module).__module__.startswith("torch.nn."):
            settings = module.extra_repr()
        lines.append((name, type(module).__qualname__, settings))
    for name, value in model.state_dict().items():
        lines.append((name, str(tuple(value.shape))))
    return lines


def _resized_spec(before: nn.Module, after: nn.Module) -> str | None:
    """How a plain layer of other widths is made again; None if the widths are the same."""
    if type(before) is not type(after):
        return None
    widths = _widths_of(after)
    if widths is None or widths == _widths_of(before):
        return None
    inputs, outputs = widths
    return f"{RESIZED}?inputs={inputs}&outputs={outputs}"


def _widths_of(module: nn.Module) -> tuple[int, int] | None:
    """The input and the output width of a plain layer; None for other modules."""
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return module.normalized_shape[0], module.normalized_shape[0]
    if type(module) not in WIDTHS:
        return None
    inputs_name, outputs_name = WIDTHS[type(module)]
    return getattr(module, inputs_name), getattr(module, outputs_name)


def spec_with(base: str, conversions: Mapping[str, str]) -> str:
    """Write a model's spec with its conversions: `offramp:resnet20|layer1.0.conv1=ghost?ratio=2`.

    Args:
        base: the spec of the model before.
        conversions: methods by layer or pattern; layers with the same method are joined.

    Returns:
        The spec.
    """
    by_method: dict[str, list[str]] = {}
    for name, method in conversions.items():
        by_method.setdefault(method, []).append(name)
    spec = base
    for method, patterns in by_method.items():
        spec += f"{BAR}{','.join(patterns)}={method}"
    return spec


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split a model's spec into the spec without conversions, and the conversions.

    Args:
        spec: such as `offramp:resnet20|layer3.*=ghost?ratio=2|conv1=keep`.

    Returns:
        The spec of the model before, and methods by pattern.

    Raises:
        InvalidArgument: a part behind a bar is not PATTERN=METHOD.

    >>> split_spec("offramp:resnet20|layer1.*,layer2.*=ghost?ratio=2")
    ('offramp:resnet20', {'layer1.*': 'ghost?ratio=2', 'layer2.*': 'ghost?ratio=2'})
    """
    base, *parts = spec.split(BAR)
    conversions: dict[str, str] = {}
    for part in parts:
        patterns, equals, method = part.partition("=")
        if not (patterns.strip() and equals and method.strip()):
            raise InvalidArgument(f"a conversion must be PATTERN=METHOD, got {part!r} in {spec!r}")
        for pattern in patterns.split(","):
            conversions[pattern.strip()] = method.strip()
    return base.strip(), conversions


def _spec_of(name: str, layer: Layer) -> str:
    """The method and the options of a converted layer, such as `ghost?ratio=2`."""
    file = type(layer).__module__.rpartition(".")[2]
    ours = type(layer).__module__.startswith("offramp.layers.")
    if not ours or file not in files("layers") or layer_class(file) is not type(layer):
        raise InvalidArgument(
            f"{name!r} is a {type(layer).__name__}, which cannot be written as a spec. Give the "
            f"model again when the network is loaded"
        )
    try:
        values = layer.options()
    except AttributeError as problem:  # it reads a part that is no longer what the method made
        raise InvalidArgument(
            f"a part of {name!r} was converted once more, which cannot be written as a spec. Give "
            f"the model again when the network is loaded"
        ) from problem
    options = "&".join(f"{key}={_text(value)}" for key, value in values.items())
    return f"{file}?{options}" if options else file


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
