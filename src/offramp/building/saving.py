"""A network on disk: `network.json` (what it is made of) and `weights.safetensors`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.files import digest_file, read_json, read_tensors, write_json, write_tensors
from offramp._support.find import find, shelved
from offramp._support.ownership import FolderKind
from offramp._support.replacement import read_whole, replacing_folder
from offramp.building.factories import MADE_FROM, built_from_file, make_gate, model_from_file
from offramp.errors import BadFile, InvalidArgument, OfframpError
from offramp.networks.members import BACKBONE, ModelSpec, require_name
from offramp.networks.network import Network, as_network
from offramp.networks.nodes import Exit, Gate
from offramp.networks.trained import remember, rows_behind
from offramp.plans.provenance import SeenRows
from offramp.plans.signature import Input, is_label
from offramp.plans.topology import Topology

SCHEMA = 1
FLOATS = {
    str(kind).removeprefix("torch."): kind
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
MOST_MEMBERS = 256  # that a file may name: each of them is built before its weights are looked at
FOLDER = FolderKind(
    "a network", "network.json", "network", frozenset({"network.json", "weights.safetensors"})
)
Given = nn.Module | tuple[nn.Module, nn.Module | None]


def save(network: Network, folder: str | Path) -> None:
    """Write a network as a folder: network.json and weights.safetensors.

    An earlier network there is replaced whole, in one step.

    Args:
        network: What to save. Classes that are the user's code are not saved; `load` asks for them
            again.
        folder: Where. It may hold an earlier network and nothing else.

    Raises:
        BadFile: The folder cannot be written, or holds a file that offramp did not write.
    """
    with saving(network, folder):
        pass


@contextlib.contextmanager
def saving(network: Network, folder: str | Path, kind: FolderKind = FOLDER) -> Iterator[Path]:
    """As `save`, and yield the folder while it is still a temporary one: what is put beside the
    network comes along.

    kind: which earlier folders may be replaced.
    """
    network = as_network(network)
    with replacing_folder(folder, kind.require_own) as path:
        weights = path / "weights.safetensors"
        write_tensors(weights, network.state_dict())
        marks = {"weights": digest_file(weights), "fingerprint": network.fingerprint()}
        rows = network.training_rows()
        training_rows = None if rows is None else rows.to_json()
        trained = [name for name, part in network.parts().items() if rows_behind(part) is not None]
        told = {
            "made": network.made,
            "types": _types(network),
            "learned": training_rows,
            "trained": trained,
        }
        body = {**network.config(), **told, **marks}
        typed = {
            name: getattr(preprocess, MADE_FROM, None)
            for name, preprocess in network.fronts.items()
        }
        if any(typed.values()):
            body["front_specs"] = {name: spec for name, spec in typed.items() if spec is not None}
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
    """Read a network that `save` wrote, in eval mode. Nothing but offramp's own shelves is imported
    or run.

    Args:
        folder: What `save` wrote.
        model: The models that are the user's own, by name: a module, or (module, preprocess) if the
            preprocessing is the user's too. Scikit-learn estimators, functions and endpoints belong
            here as well; an ONNX file is in the folder.
        gates: The user's own gates, by node name.
        exits: The user's own exits, by node name.

    Returns:
        The network, with the weights and the precision of the files.

    Raises:
        BadFile: Missing, damaged or edited.
        NewerSchema: Written by a newer offramp.
        InvalidArgument: Something that is the user's code must be given again.
    """
    return read_whole(
        Path(folder), lambda path: _load(path, model, gates or {}, exits or {}), FOLDER.require_own
    )


def _load(
    path: Path,
    model: Mapping[str, Given] | Given | None,
    gates: Mapping[str, Gate],
    exits: Mapping[str, Exit],
) -> Network:
    _, body = read_json(path / "network.json", "network", SCHEMA)
    weights = path / "weights.safetensors"
    tensors = read_tensors(weights)
    if digest_file(weights) != body.get("weights"):
        raise BadFile(
            f"{weights} is not the file that {path / 'network.json'} was written with; save the "
            f"network again"
        )
    try:
        network = _build(body, _given(model, body), gates, exits)
        _cast(network, tensors, body.get("types", {}))
    except OfframpError:
        raise
    except Exception as problem:  # plain data of any kind reaches the constructors of our shelves
        raise BadFile(
            f"{path / 'network.json'} is no complete network ({problem!r}); save it again"
        ) from problem
    _fill(network, tensors, weights)
    if network.fingerprint() != body.get("fingerprint"):
        if other := _other(network.state_dict(), tensors):
            raise InvalidArgument(
                f"the model given for {path} ties weights that were saved apart (such as "
                f"{other[0]}); give the model "
                "that was saved"
            )
        raise InvalidArgument(
            f"preprocessing, exit or gate given for {path} differs from the one that was saved; "
            f"give the same again"
        )
    if network.trained_on is not None:
        # Files of the first edition do not tell which parts the rows trained: it may have been all
        # of them.
        for name, part in network.parts().items():
            if name in body.get("trained", [name]):
                remember(part, network.trained_on)
    return network.eval()


class GiveAgain(InvalidArgument):
    """Parts of a saved network that are their user's code, which no file may name.

    Attributes:
        what: the parts, in a sentence without its end.
        flags: what to type for them at the command line.
        exits: those among them that are exits: the command line cannot give them.
    """

    def __init__(
        self, parts: Sequence[tuple[str, str, str | None]], models: Mapping[str, str | None]
    ) -> None:
        said = {
            "model": lambda name, spec: (
                f"member {name!r} {'was built by its user' if spec is None else f'is {spec!r}'}"
            ),
            "preprocess": lambda name, spec: f"the preprocessing of member {name!r} is {spec!r}",
            "gate": lambda name, spec: f"the gate {name!r} is {spec!r}",
            "exit": lambda name, spec: f"the exit {name!r} is {spec!r}",
        }
        self.what = ", ".join(said[kind](name, spec) for kind, name, spec in parts)
        self.what += ", and a file may not name code to run"
        of_kind = {
            kind: {name: spec for other, name, spec in parts if other == kind} for kind in said
        }
        self.exits = tuple(of_kind["exit"])
        flags = {"model": "--model", "preprocess": "--preprocess-of", "gate": "--gate-of"}
        with_preprocess = {name: models.get(name) for name in of_kind["preprocess"]}
        # preprocessing is given beside its model
        of_kind["model"] = with_preprocess | of_kind["model"]
        self.flags = tuple(
            f"{flag} {name}={spec or 'my.module:factory'}"
            for kind, flag in flags.items()
            for name, spec in of_kind[kind].items()
        )
        fronts = of_kind["preprocess"]
        members = [
            f"{name!r}: {'(model, preprocess)' if name in fronts else 'model'}"
            for name in of_kind["model"]
        ]
        arguments = [f"model={{{', '.join(members)}}}"] if members else []
        for word in ("gate", "exit"):
            if of_kind[word]:
                arguments.append(
                    f"{word}s={{{', '.join(f'{name!r}: {word}' for name in of_kind[word])}}}"
                )
        again = "give it again" if len(parts) == 1 else "give them again"
        super().__init__(f"{self.what}; {again}: load(folder, {', '.join(arguments)})")


def _require_given(
    body: Mapping[str, Any],
    given: Mapping[str, Given],
    gates: Mapping[str, Gate],
    exits: Mapping[str, Exit],
) -> None:
    """Raise GiveAgain with all that only the user can give, in one sentence."""
    parts: list[tuple[str, str, str | None]] = []
    specs = {member["name"]: member["spec"] for member in body["rungs"]}
    typed = body.get("front_specs", {})
    for name, spec in specs.items():
        if name not in given and not built_from_file(spec):
            parts.append(("model", name, spec))
        preprocess = body["fronts"].get(name)
        has_preprocess = isinstance(given.get(name), tuple) and given[name][1] is not None  # type: ignore[index]
        if preprocess is not None and preprocess["name"] != "Front" and not has_preprocess:
            parts.append(("preprocess", name, typed.get(name) or preprocess["name"]))
    for kind, configs, own in (("gate", body["gates"], gates), ("exit", body["exits"], exits)):
        for name, config in configs.items():
            code = _code_in(config, kind)
            if code is not None and name not in own:
                parts.append((kind, name, code))
    if parts:
        raise GiveAgain(parts, specs)


def _code_in(config: Mapping[str, Any], kind: str) -> str | None:
    """The user's own class or function that the configuration of a gate or an exit names; of one
    that wraps, within.
    """
    if ":" in config["name"]:
        return str(config["name"])
    inner = config.get(kind)
    return _code_in(inner, kind) if isinstance(inner, Mapping) else None


def _given(model: Mapping[str, Given] | Given | None, body: Mapping[str, Any]) -> dict[str, Given]:
    if model is None:
        return {}
    if isinstance(model, Mapping):
        given = dict(model)
    else:
        given = {body["rungs"][0]["name"]: model}
    return {name: _as_modules(one) for name, one in given.items()}


def _as_modules(given: Any) -> Given:
    """A module, or (module, preprocess), where what is no torch module is wrapped as `ladder` did
    it.
    """
    model, preprocess = given if isinstance(given, tuple) else (given, None)
    if not isinstance(model, nn.Module):
        wrapped = find("members", "wrapped")(model)
        if wrapped is None:
            raise InvalidArgument(
                f"the model given must be a torch.nn.Module, got a {type(model).__name__}"
            )
        model = wrapped
    return (model, preprocess) if isinstance(given, tuple) else model


def _build(
    body: Mapping[str, Any],
    given: Mapping[str, Given],
    gates: Mapping[str, Gate],
    exits: Mapping[str, Exit],
) -> Network:
    if len(body["rungs"]) > MOST_MEMBERS:
        raise BadFile(
            f"the file names {len(body['rungs']):,} models, expected at most {MOST_MEMBERS}; save "
            f"it again"
        )
    _require_given(body, given, gates, exits)
    members = [_member(member) for member in body["rungs"]]
    for member in members:
        if member.name != BACKBONE or len(members) > 1:  # the one model that was cut has that name
            require_name(member.name)
    models = dict[str, nn.Module]()
    fronts = dict[str, nn.Module]()
    for member in members:
        name = member.name
        model = given[name] if name in given else model_from_file(member.spec, name)
        models[name], preprocess = model if isinstance(model, tuple) else (model, None)
        if name in body["fronts"]:
            fronts[name] = (
                preprocess if preprocess is not None else _preprocess(body["fronts"][name], name)
            )
    network = Network(
        backbone=models[BACKBONE] if [*models] == [BACKBONE] else nn.ModuleDict(models),
        members=tuple(members),
        topology=Topology.from_json(body["chain"]),
        fronts=fronts,
        exits={name: _exit_of(name, config, exits) for name, config in body["exits"].items()},
        gates={
            name: gates.get(name) or make_gate(config) for name, config in body["gates"].items()
        },
        made={str(name): str(mark) for name, mark in body["made"].items()},
    )
    if body["learned"] is None:
        network.trained_on = None
    else:
        network.trained_on = SeenRows.from_json(body["learned"])
    names = body.get("class_names")  # not in files of the first version
    network.class_names = None if names is None else tuple(map(str, names))
    for member in members:
        known = dict(network.model_of(member).named_modules(remove_duplicate=False))
        if missing := [cut for cut in member.cuts if cut not in known]:
            raise InvalidArgument(
                f"the model of {member.name!r} has no module {missing[0]!r}; give the one that "
                f"was cut"
            )
    return network


def _member(body: Mapping[str, Any]) -> ModelSpec:
    every = [Input.from_json(given) for given in body["inputs"]]
    # the first edition took labels as inputs
    inputs = tuple(one for one in every if not is_label(one.name[2:]))
    length = tuple(map(str, body.get("length", ())))  # not in files of the first version
    output = body.get("output")  # neither
    cuts = tuple(map(str, body["cuts"]))
    return ModelSpec(
        body["name"], body["spec"], cuts, inputs, length, None if output is None else str(output)
    )


def _preprocess(config: Mapping[str, Any], member: str) -> nn.Module:
    if config["name"] != "Front":
        raise InvalidArgument(
            f"the preprocessing of member {member!r} is {config['name']!r}, and a file may not "
            f"name code; "
            f"give it again: load(folder, model={{{member!r}: (model, preprocess)}})"
        )
    preprocess: nn.Module = shelved("layers", "Preprocess")(
        **{key: value for key, value in config.items() if key != "name"}
    )
    return preprocess


def _exit_of(name: str, config: Mapping[str, Any], exits: Mapping[str, Exit]) -> Exit:
    if name in exits:
        return exits[name]
    arguments = {key: value for key, value in config.items() if key != "name"}
    if "exit" in arguments:  # one that wraps another
        arguments["exit"] = _exit_of(name, arguments["exit"], {})
    if ":" in config["name"]:
        raise InvalidArgument(
            f"the exit {name!r} is {config['name']!r}, and a file may not name code to run; give "
            f"it again with exits="
        )
    kind = shelved("exits", config["name"])
    # Arguments that files of the first edition leave out, and what leaving them out meant.
    made: Exit = kind(**{**getattr(kind, "FIRST_EDITION", {}), **arguments})
    return made


def _types(network: Network) -> dict[str, str]:
    """The floating-point types of buffers that are no state, such as preprocessing's constants:
    `half()` casts them too.
    """
    kept = network.state_dict().keys()
    return {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in network.named_buffers(remove_duplicate=False)
        if value.is_floating_point() and name not in kept
    }


def _cast(network: Network, tensors: Mapping[str, Tensor], types: Mapping[str, str]) -> None:
    """Give every floating-point tensor of a network the type that it had when it was saved."""
    kinds = {name: FLOATS[kind] for name, kind in types.items()} | {
        name: value.dtype for name, value in tensors.items()
    }
    own = (
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    )
    for name, value in own:
        kind = kinds.get(name, value.dtype)
        if value.is_floating_point() and kind.is_floating_point and kind != value.dtype:
            value.data = value.data.to(kind)  # the same tensor, so that what is tied stays tied


def _other(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """The names under which a network holds other bytes than a file."""
    ours, its = ({name: _bytes(value) for name, value in each.items()} for each in (state, tensors))
    return [name for name in sorted(its) if ours[name] != its[name]]


def _bytes(value: Tensor) -> bytes:
    return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _fill(network: Network, tensors: Mapping[str, Tensor], weights: Path) -> None:
    try:
        network.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as problem:
        brief = str(problem).splitlines()[-1].strip()
        raise BadFile(
            f"{weights} does not fit the network ({brief}); give the model that was saved"
        ) from problem
