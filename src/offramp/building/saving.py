"""Networks on disk: `network.json` describes the parts, `weights.safetensors` holds the tensors.

A file never names code to run. Models, preprocessing, gates and exits of the user's own must be
given again when a network is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require_path
from offramp._support.files import digest_file, read_json, read_tensors, write_json, write_tensors
from offramp._support.find import find, shelved
from offramp._support.ownership import FolderKind
from offramp._support.replacement import read_whole, replacing_folder
from offramp.building.factories import MADE_FROM, built_from_file, make_gate, model_from_file
from offramp.building.rebuilding import pieces_of, whole_from_json
from offramp.errors import BadFile, InvalidArgument, OfframpError
from offramp.networks.members import BACKBONE, ModelSpec, require_name
from offramp.networks.network import Network, as_network
from offramp.networks.nodes import Exit, Gate
from offramp.networks.trained import remember, rows_behind
from offramp.plans.provenance import SeenRows
from offramp.plans.signature import Input, is_label
from offramp.plans.signature import example as rows_like
from offramp.plans.topology import Topology

SCHEMA = 1
FLOATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# The most members that a file may name: each one is built before its weights are checked.
MOST_MEMBERS = 256
ROWS = 4  # rows that a model is taken apart on
FOLDER = FolderKind(
    "a network", "network.json", "network", frozenset({"network.json", "weights.safetensors"})
)
Given = nn.Module | tuple[nn.Module, nn.Module | None]


def save(network: Network, folder: str | Path) -> None:
    """Write a network as a folder: network.json and weights.safetensors.

    An earlier network in the folder is replaced in one step.

    Args:
        network: The network. The user's own classes are not saved; `load` asks for them again.
        folder: The folder to write. It may hold an earlier network and nothing else.

    Raises:
        BadFile: The folder cannot be written, or holds a file that offramp did not write.
    """
    with saving(network, folder):
        pass


@contextlib.contextmanager
def saving(network: Network, folder: str | Path, kind: FolderKind = FOLDER) -> Iterator[Path]:
    """Write a network as `save` does, and yield the temporary folder before it is put into place.
    Files that are written there become part of the result.

    Args:
        network: The network.
        folder: The folder to write.
        kind: Which earlier folders may be replaced.

    Yields:
        The temporary folder.
    """
    network = as_network(network)
    with replacing_folder(folder, kind.require_own) as path:
        weights = path / "weights.safetensors"
        write_tensors(weights, network.state_dict())
        body = network.config()
        body["made"] = network.made
        body["types"] = _types(network)
        if network.whole is not None:
            body["whole"] = asdict(network.whole)
        tied = _tied(network)
        if tied:
            body["tied"] = tied
        # The rows that trained the network, and its parts that were trained by rows.
        body["learned"] = None
        rows = network.training_rows()
        if rows is not None:
            body["learned"] = rows.to_json()
        trained = list[str]()
        for name, part in network.parts().items():
            if rows_behind(part) is not None:
                trained.append(name)
        body["trained"] = trained
        body["weights"] = digest_file(weights)
        body["fingerprint"] = network.fingerprint()
        # The words that were typed for preprocessing; `load` offers them if it must be given again.
        specs = dict[str, str]()
        for name, preprocess in network.fronts.items():
            spec = getattr(preprocess, MADE_FROM, None)
            if spec is not None:
                specs[name] = spec
        if any(specs.values()):
            body["front_specs"] = specs
        if network.class_names is not None:
            body["class_names"] = list(network.class_names)
        write_json(path / "network.json", "network", SCHEMA, body)
        yield path


def load(
    folder: str | Path,
    model: Mapping[str, Given] | Given | None = None,
    *,
    gates: Mapping[str, Gate] | None = None,
    exits: Mapping[str, Exit] | None = None,
) -> Network:
    """Read a network that `save` wrote. No code is imported or run except offramp's own shelves.

    Args:
        folder: A folder that `save` wrote.
        model: The models that are the user's own, by name: a module, or (module, preprocess) if the
            preprocessing is the user's too. Scikit-learn estimators, functions and endpoints belong
            here as well; an ONNX file is in the folder.
        gates: The user's own gates, by node name.
        exits: The user's own exits, by node name.

    Returns:
        The network in eval mode, with the weights and the precision of the files.

    Raises:
        BadFile: The folder is missing, damaged or edited.
        NewerSchema: A newer offramp wrote it.
        InvalidArgument: The user's own code must be given again.
    """
    return read_whole(
        require_path("folder", folder),
        lambda path: _load(path, model, gates or {}, exits or {}),
        FOLDER.require_own,
    )


def example_in(folder: str | Path) -> Any:
    """Seeded rows like those that a saved network was made with; None if it has not seen any."""

    def read(path: Path) -> Any:
        _, body = read_json(path / "network.json", "network", SCHEMA)
        for entry in body["rungs"]:
            member = _member(entry)
            if member.inputs:
                return rows_like(member.inputs, ROWS)
        return None

    return read_whole(require_path("folder", folder), read, FOLDER.require_own)


def _load(
    path: Path,
    model: Mapping[str, Given] | Given | None,
    gates: Mapping[str, Gate],
    exits: Mapping[str, Exit],
) -> Network:
    """See `load`."""
    _, body = read_json(path / "network.json", "network", SCHEMA)
    weights = path / "weights.safetensors"
    tensors = read_tensors(weights)
    if digest_file(weights) != body.get("weights"):
        raise BadFile(
            f"{weights} is not the file that {path / 'network.json'} was written with. Save the "
            f"network again"
        )
    # Build the network, then give its tensors the types and the values of the file.
    try:
        given = _models_by_name(model, body)
        _require_given(body, given, gates, exits)
        if _needs_whole(body, given):
            given = _with_pieces(body, given)
        network = _build(body, given, gates, exits)
        _tie(network, body.get("tied", ()))
        _cast(network, tensors, body.get("types", {}))
    except OfframpError:
        raise
    except Exception as problem:  # a damaged file can hold any arguments for our classes
        raise BadFile(
            f"{path / 'network.json'} is not a complete network ({problem!r}). Save it again"
        ) from problem
    _fill(network, tensors, weights)
    # The fingerprint differs if the user gave another model, preprocessing, exit or gate.
    if network.fingerprint() != body.get("fingerprint"):
        different = _different(network.state_dict(), tensors)
        if different:
            raise InvalidArgument(
                f"the model given for {path} ties weights that were saved apart (such as "
                f"{different[0]}). Use the model that was saved"
            )
        raise InvalidArgument(
            f"preprocessing, exit or gate given for {path} differs from the one that was saved. "
            f"Use the same one"
        )
    if network.trained_on is not None:
        # Files of the first edition do not list the parts that were trained: it can be all of them.
        for name, part in network.parts().items():
            if name in body.get("trained", [name]):
                remember(part, network.trained_on)
    return network.eval()


class GiveAgain(InvalidArgument):
    """Parts of a saved network that are the user's own code, which a file may not name.

    Args:
        parts: (kind, name, spec) of each part. The kind is model, preprocess, gate or exit; the
            spec is the text that names it, None if there is none.
        models: the specs of all models by name.
        has_forks: whether `route` may have made the network.

    Attributes:
        what: the parts, as the beginning of a sentence.
        flags: the flags to type for them at the command line.
        exits: the names of those that are exits; the command line cannot give them.
        has_forks: whether `route` may have made the network.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, str, str | None]],
        models: Mapping[str, str | None],
        *,
        has_forks: bool = False,
    ) -> None:
        self.has_forks = has_forks
        by_kind: dict[str, dict[str, str | None]] = {
            "model": {},
            "preprocess": {},
            "gate": {},
            "exit": {},
        }
        phrases = list[str]()
        for kind, name, spec in parts:
            by_kind[kind][name] = spec
            phrases.append(_phrase(kind, name, spec))
        self.what = ", ".join(phrases) + ", and a file may not name code to run"
        self.exits = tuple(by_kind["exit"])

        # Preprocessing is given together with its model, so its model is needed too.
        fronts = by_kind["preprocess"]
        needed_models = {name: models.get(name) for name in fronts} | by_kind["model"]
        self.flags = (
            *_flags("--model", needed_models),
            *_flags("--preprocess-of", fronts),
            *_flags("--gate-of", by_kind["gate"]),
        )

        arguments = list[str]()
        if needed_models:
            entries = list[str]()
            for name in needed_models:
                value = "(model, preprocess)" if name in fronts else "model"
                entries.append(f"{name!r}: {value}")
            arguments.append(f"model={{{', '.join(entries)}}}")
        for kind in ("gate", "exit"):
            if by_kind[kind]:
                names = ", ".join(f"{name!r}: {kind}" for name in by_kind[kind])
                arguments.append(f"{kind}s={{{names}}}")
        again = "give it again" if len(parts) == 1 else "give them again"
        super().__init__(f"{self.what}; {again}: load(folder, {', '.join(arguments)})")


def _phrase(kind: str, name: str, spec: str | None) -> str:
    """A part that must be given again, in words."""
    if kind == "model":
        if spec is None:
            return f"member {name!r} was built by its user"
        return f"member {name!r} is {spec!r}"
    if kind == "preprocess":
        return f"the preprocessing of member {name!r} is {spec!r}"
    return f"the {kind} {name!r} is {spec!r}"


def _flags(flag: str, specs: Mapping[str, str | None]) -> list[str]:
    """Flags of the command line, such as `--model small=offramp:resnet20`."""
    return [f"{flag} {name}={spec or 'my.module:factory'}" for name, spec in specs.items()]


def _require_given(
    body: Mapping[str, Any],
    given: Mapping[str, Given],
    gates: Mapping[str, Gate],
    exits: Mapping[str, Exit],
) -> None:
    """Raise GiveAgain with all parts that only the user can give, in one sentence."""
    specs = {member["name"]: member["spec"] for member in body["rungs"]}
    fronts = body["fronts"]
    typed = body.get("front_specs", {})
    is_whole = _needs_whole(body, given)
    if is_whole:
        # The one model stands for its pieces, and has the preprocessing of the first piece.
        first = body["rungs"][0]["name"]
        specs = {BACKBONE: whole_from_json(body["whole"]).spec}
        fronts = {BACKBONE: fronts[first]} if first in fronts else {}
        typed = {BACKBONE: typed.get(first)}

    parts: list[tuple[str, str, str | None]] = []  # kind, name, spec
    for name, spec in specs.items():
        if name not in given and not built_from_file(spec):
            parts.append(("model", name, spec))
        preprocess = fronts.get(name)
        pair = given.get(name)
        has_preprocess = isinstance(pair, tuple) and pair[1] is not None
        if preprocess is not None and preprocess["name"] != "Front" and not has_preprocess:
            parts.append(("preprocess", name, typed.get(name) or preprocess["name"]))
    for kind, configs, given_parts in (
        ("gate", body["gates"], gates),
        ("exit", body["exits"], exits),
    ):
        for name, config in configs.items():
            code = _code_in(config, kind)
            if code is not None and name not in given_parts:
                parts.append((kind, name, code))
    if parts:
        has_forks = not is_whole and not Topology.from_json(body["chain"]).is_chain
        raise GiveAgain(parts, specs, has_forks=has_forks)


def _needs_whole(body: Mapping[str, Any], given: Mapping[str, Given]) -> bool:
    """Whether the members are pieces of one model, and the user has not given all of them."""
    if body.get("whole") is None:
        return False
    return not all(member["name"] in given for member in body["rungs"])


def _code_in(config: Mapping[str, Any], kind: str) -> str | None:
    """The user's own class or function in the configuration of a gate or an exit, or in that of the
    one that it wraps; None if there is none.
    """
    if ":" in config["name"]:
        return str(config["name"])
    inner = config.get(kind)
    return _code_in(inner, kind) if isinstance(inner, Mapping) else None


def _models_by_name(
    model: Mapping[str, Given] | Given | None, body: Mapping[str, Any]
) -> dict[str, Given]:
    """The models that the user gave, by the names of their members."""
    if model is None:
        return {}
    if isinstance(model, Mapping):
        models = dict(model)
    else:
        names = [member["name"] for member in body["rungs"]]
        if body.get("whole") is not None:
            names = [BACKBONE]  # the model of which all members are pieces
        if len(names) != 1:
            raise InvalidArgument(f"model must be a mapping from names for {names}, got one model")
        models = {names[0]: model}
    return {name: _as_modules(value) for name, value in models.items()}


def _with_pieces(body: Mapping[str, Any], given: Mapping[str, Given]) -> dict[str, Given]:
    """The models of a network whose members are pieces of one model, by the names of the members.

    Args:
        body: the content of network.json.
        given: what the user gave: the one model as `backbone`, some pieces, or nothing. Nothing
            that only the user can give is missing.
    """
    whole = whole_from_json(body["whole"])
    models = dict(given)
    model = models.pop(BACKBONE, None)
    preprocess = None
    if isinstance(model, tuple):
        model, preprocess = model
    if model is None:
        model = model_from_file(whole.spec, BACKBONE)
    first_member = body["rungs"][0]
    first = first_member["name"]
    has_own_preprocess = preprocess is not None
    if first in body["fronts"] and not has_own_preprocess:
        preprocess = _preprocess(body["fronts"][first], first)

    example = rows_like(_member(first_member).inputs, ROWS)
    pieces: dict[str, Given] = {**pieces_of(whole, model, example, preprocess)}
    if has_own_preprocess:
        piece = pieces[first]
        assert isinstance(piece, nn.Module)
        pieces[first] = (piece, preprocess)
    return {**pieces, **models}


def _tied(network: Network) -> list[list[str]]:
    """The names under which several members have the same parameter, as arms of one model do."""
    names_of: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    return [names for names in names_of.values() if len(names) > 1]


def _tie(network: Network, groups: Sequence[Sequence[str]]) -> None:
    """Let members share parameters as they did when the network was saved."""
    # By their whole names, because names of nodes may have dots, which get_submodule splits.
    modules = dict(network.named_modules(remove_duplicate=False))
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for first, *others in groups:
        parameter = parameters[first]
        for name in others:
            known = parameters[name]
            if known is not parameter and known.shape == parameter.shape:
                module_name, _, last = name.rpartition(".")
                setattr(modules[module_name], last, parameter)


def _as_modules(given: Any) -> Given:
    """A module, or (module, preprocess). Other objects are wrapped as `ladder` wraps them."""
    if isinstance(given, tuple):
        model, preprocess = given
        return _as_module(model), preprocess
    return _as_module(given)


def _as_module(model: Any) -> nn.Module:
    """A model as a module. Raises InvalidArgument if it cannot be wrapped."""
    if isinstance(model, nn.Module):
        return model
    wrapped: nn.Module | None = find("members", "wrapped")(model)
    if wrapped is None:
        raise InvalidArgument(
            f"the model given must be a torch.nn.Module, got a {type(model).__name__}"
        )
    return wrapped


def _build(
    body: Mapping[str, Any],
    given: Mapping[str, Given],
    gates: Mapping[str, Gate],
    exits: Mapping[str, Exit],
) -> Network:
    """The network that network.json describes, without its weights.

    Args:
        body: the content of network.json.
        given: the user's own models by name; so are gates and exits.
        gates: by node.
        exits: by node.
    """
    count = len(body["rungs"])
    if count > MOST_MEMBERS:
        raise BadFile(f"the file must name at most {MOST_MEMBERS} models, got {count:,}")
    members = [_member(member) for member in body["rungs"]]
    for member in members:
        # `backbone` is reserved, but a single model that was cut has that name
        if member.name != BACKBONE or len(members) > 1:
            require_name(member.name)

    # Models and preprocessing: the user's own, or from our shelves.
    models = dict[str, nn.Module]()
    fronts = dict[str, nn.Module]()
    for member in members:
        name = member.name
        preprocess = None
        if name not in given:
            models[name] = model_from_file(member.spec, name)
        else:
            model = given[name]
            if isinstance(model, tuple):
                models[name], preprocess = model
            else:
                models[name] = model
        if name in body["fronts"]:
            if preprocess is None:
                preprocess = _preprocess(body["fronts"][name], name)
            fronts[name] = preprocess

    # Exits and gates: the user's own, or ours from their configurations.
    all_exits = dict[str, Exit]()
    for name, config in body["exits"].items():
        all_exits[name] = _exit(name, config, exits)
    all_gates = dict[str, Gate]()
    for name, config in body["gates"].items():
        all_gates[name] = gates.get(name) or make_gate(config)
    # A single model that was cut is the backbone itself, members of a ladder are in a dict.
    backbone: nn.Module = nn.ModuleDict(models)
    if [*models] == [BACKBONE]:
        backbone = models[BACKBONE]
    network = Network(
        backbone=backbone,
        members=tuple(members),
        topology=Topology.from_json(body["chain"]),
        fronts=fronts,
        exits=all_exits,
        gates=all_gates,
        made={str(name): str(mark) for name, mark in body["made"].items()},
    )
    network.trained_on = None
    if body["learned"] is not None:
        network.trained_on = SeenRows.from_json(body["learned"])
    network.class_names = None
    if body.get("whole") is not None:
        network.whole = whole_from_json(body["whole"])
    names = body.get("class_names")  # not in files of the first version
    if names is not None:
        network.class_names = tuple(map(str, names))
    # A model that the user gave must have the modules after which it was cut.
    for member in members:
        known = dict(network.model_of(member).named_modules(remove_duplicate=False))
        for cut in member.cuts:
            if cut not in known:
                raise InvalidArgument(
                    f"the model of {member.name!r} has no module {cut!r}. Use the model that was "
                    f"cut"
                )
    return network


def _member(body: Mapping[str, Any]) -> ModelSpec:
    """A member from plain data. Files of the first version have no length and no output."""
    inputs = list[Input]()
    for entry in body["inputs"]:
        model_input = Input.from_json(entry)
        # files of the first edition list labels as inputs; names begin with "x/"
        if not is_label(model_input.name[2:]):
            inputs.append(model_input)
    length = tuple(map(str, body.get("length", ())))
    output = body.get("output")
    if output is not None:
        output = str(output)
    cuts = tuple(map(str, body["cuts"]))
    return ModelSpec(body["name"], body["spec"], cuts, tuple(inputs), length, output)


def _preprocess(config: Mapping[str, Any], member: str) -> nn.Module:
    """Our own preprocessing from its configuration, which the files call `Front`."""
    if config["name"] != "Front":
        raise InvalidArgument(
            f"the preprocessing of member {member!r} is {config['name']!r}, and a file may not "
            f"name code. Give it again: load(folder, model={{{member!r}: (model, preprocess)}})"
        )
    arguments = _arguments(config)
    preprocess: nn.Module = shelved("layers", "Preprocess")(**arguments)
    return preprocess


def _exit(name: str, config: Mapping[str, Any], exits: Mapping[str, Exit]) -> Exit:
    """The exit of a node: the user's own, or ours from its configuration."""
    if name in exits:
        return exits[name]
    arguments = _arguments(config)
    if "exit" in arguments:  # this one wraps another exit
        arguments["exit"] = _exit(name, arguments["exit"], {})
    if ":" in config["name"]:
        raise InvalidArgument(
            f"the exit {name!r} is {config['name']!r}, and a file may not name code to run. Give "
            f"it again with exits="
        )
    kind = shelved("exits", config["name"])
    # Files of the first edition leave some arguments out; FIRST_EDITION has their values.
    defaults = getattr(kind, "FIRST_EDITION", {})
    exit_: Exit = kind(**{**defaults, **arguments})
    return exit_


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its name."""
    return {key: value for key, value in config.items() if key != "name"}


def _types(network: Network) -> dict[str, str]:
    """The types of floating-point buffers that are not in the state dict, such as preprocessing's
    constants: `half()` casts them too.
    """
    saved = network.state_dict().keys()
    types = dict[str, str]()
    for name, value in network.named_buffers(remove_duplicate=False):
        if value.is_floating_point() and name not in saved:
            types[name] = str(value.dtype).removeprefix("torch.")
    return types


def _cast(network: Network, tensors: Mapping[str, Tensor], types: Mapping[str, str]) -> None:
    """Give every floating-point tensor of a network the type that it had when it was saved."""
    kinds = {name: FLOATS[kind] for name, kind in types.items()}
    kinds |= {name: value.dtype for name, value in tensors.items()}
    parameters = network.named_parameters(remove_duplicate=False)
    buffers = network.named_buffers(remove_duplicate=False)
    for name, value in (*parameters, *buffers):
        kind = kinds.get(name, value.dtype)
        if value.is_floating_point() and kind.is_floating_point and kind != value.dtype:
            value.data = value.data.to(kind)  # the same tensor, so that tied weights stay tied


def _different(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """The names under which a network and a file hold different bytes."""
    return [name for name in sorted(tensors) if _bytes(state[name]) != _bytes(tensors[name])]


def _bytes(value: Tensor) -> bytes:
    return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _fill(network: Network, tensors: Mapping[str, Tensor], weights: Path) -> None:
    """Load the weights. Raises BadFile if names or shapes differ."""
    try:
        network.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as problem:
        brief = str(problem).splitlines()[-1].strip()
        raise BadFile(
            f"{weights} does not fit the network ({brief}). Use the model that was saved"
        ) from problem
