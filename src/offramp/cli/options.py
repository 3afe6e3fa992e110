"""Options that several commands share, and functions that turn their texts into objects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp._support.arguments import pairs
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from offramp.guarantees.risks import Risk
    from offramp.networks.network import Network
    from offramp.plans.plan import Plan
    from offramp.plans.trace import Trace

# Files and folders that a command reads.

NetworkFolder = Annotated[
    str, typer.Argument(metavar="NETWORK", help="Folder written by `offramp ladder` or `cut`.")
]
PlanFile = Annotated[
    str,
    typer.Argument(
        metavar="PLAN", help="File written by `offramp calibrate`; - for one made of --threshold."
    ),
]
TraceFile = Annotated[
    str, typer.Argument(metavar="TRACE", help="File written by `offramp record`.")
]
DataSpec = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Rows: digits, cifar10:DIR, mnist:DIR, imagefolder:DIR, images:DIR, parquet:PATH, "
        "npz:PATH, tsv:PATH?tokenizer=FOLDER&length=64 or my.module:factory, each with "
        "[a:b] to select.",
    ),
]
Threshold = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold",
        metavar="GATE=VALUE",
        help="Set a threshold by hand (inf closes the exit); drops the promise.",
    ),
]
# Rows and risks.

RowRange = Annotated[
    str | None, typer.Option("--rows", metavar="A:B", help="Only these rows of the trace.")
]
RiskName = Annotated[
    str | None,
    typer.Option(
        "--risk",
        metavar="RISK",
        help="disagreement, accuracy_gap, error, or my.module:my_risk (a Risk).",
    ),
]
# Parts of a network that its folder cannot hold, because they are the user's own code. They have
# to be given again with every command.

Given = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MEMBER=SPEC",
        help="A member given again: my.module:factory or hf:NAME (weights are saved). Of a network "
        "of `offramp route` the factory alone.",
    ),
]
GivenPreprocess = Annotated[
    list[str] | None,
    typer.Option(
        "--preprocess-of",
        metavar="MEMBER=SPEC",
        help="The preprocessing of a member given again: my.module:factory.",
    ),
]
GivenGate = Annotated[
    list[str] | None,
    typer.Option(
        "--gate-of", metavar="NODE=SPEC", help="A gate of your own, given again: my.module:gate."
    ),
]
# How a network is made and run.

Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="FILE", help="Its .safetensors, .pt or .pth (read safely)."),
]
Preprocess = Annotated[
    str,
    typer.Option(
        "--preprocess",
        metavar="PREPROCESS",
        help="Its input: auto (default), none, unit, imagenet, my.module:preprocess.",
    ),
]
GateName = Annotated[
    str,
    typer.Option(
        "--gate",
        metavar="GATE",
        help="margin, max_logit, max_prob, neg_entropy, patience, agreement, ensemble, "
        "uncertainty, my.module:score.",
    ),
]
OutputFolder = Annotated[
    str, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Rows that run together.")
]
Augmented = Annotated[
    str | None,
    typer.Option(
        "--augment", metavar="NAME", help="crop_flip, flip, or my.module:function of a batch."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="N", help="Everything that is drawn depends on it alone.")
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="ENGINE",
        help="torch, torch:bf16,channels_last, torch:threads=1, torch:compile, torch:cuda_graphs, "
        "onnxruntime, openvino, openvino:bf16; a plan keeps to its own.",
    ),
]
# Rows that must not count, and the form of the output.

Repeats = Annotated[
    str | None,
    typer.Option(
        "--repeats",
        metavar="independent|once",
        help="Rows with equal content: count all (each was drawn on its own), or one of each; "
        "by default they are refused.",
    ),
]
DropSeen = Annotated[
    bool,
    typer.Option("--drop-seen", help="Leave out rows that the network or the plan was made from."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")
]


def network_of(
    folder: str, models: list[str] | None, fronts: list[str] | None, gates: list[str] | None
) -> Network:
    """The network in a folder, with the parts that are not in its files.

    Args:
        folder: written by `offramp ladder`, `cut` or `fit`.
        models: MEMBER=SPEC texts, of the user's own models; or the factory of `offramp route`.
        fronts: MEMBER=SPEC texts, of the user's own preprocessing.
        gates: NODE=SPEC texts, of the user's own gates.

    Raises:
        InvalidArgument: a part is missing. The message has the flags.
    """
    from offramp.building.factories import make_gate, make_model, make_preprocess
    from offramp.building.saving import GiveAgain, load

    factories = [text for text in models or () if "=" not in text.partition("?")[0]]
    if factories:
        return _routed_again(folder, factories, models, fronts, gates)
    # A member is a model, or a model with its preprocessing.
    members: dict[str, Any] = {}
    for member, spec in pairs(models, "--model").items():
        members[member] = make_model(spec, fetch=False)
    for member, spec in pairs(fronts, "--preprocess-of").items():
        if member not in members:
            raise InvalidArgument(
                f"--preprocess-of {member} must come with --model {member}=SPEC, got it alone"
            )
        members[member] = (members[member], make_preprocess(spec))
    own_gates = {}
    for node, spec in pairs(gates, "--gate-of").items():
        own_gates[node] = make_gate(spec)
    try:
        return load(folder, members, gates=own_gates)
    except GiveAgain as problem:
        # The flags as they were typed, and those that are missing: `--model MEMBER=...`.
        typed = list[str]()
        for option, texts in (
            ("--model", models),
            ("--preprocess-of", fronts),
            ("--gate-of", gates),
        ):
            for text in texts or ():
                typed.append(f"{option} {text}")
        known = {flag.split("=")[0] for flag in typed}
        missing = [flag for flag in problem.flags if flag.split("=")[0] not in known]
        ending = ""
        if problem.has_forks and len(missing) > 1:
            ending = ". If `offramp route` wrote it, --model my.module:factory alone is enough"
        if problem.exits:
            ending += (
                f"; the exit {problem.exits[0]!r} can be given only in Python, load(..., exits=)"
            )
        raise InvalidArgument(
            f"{problem.what}; give again, with every command on this network: "
            f"{' '.join([*typed, *missing])}{ending}"
        ) from problem


def routed_network(factory: str, example: Any) -> Network:
    """The network of a factory's steps, or the network that it makes itself.

    Args:
        factory: my.module:factory.
        example: a small batch of rows.

    Raises:
        InvalidArgument: the factory fails, or gives neither steps nor a network.
    """
    from offramp._support.find import imported, users_code
    from offramp.building.routing import route
    from offramp.networks.network import Network

    if ":" not in factory:
        raise InvalidArgument(f"FACTORY must be my.module:factory, got {factory}")
    steps = imported(factory)
    if callable(steps):
        with users_code(factory, "make a list of steps or a network"):
            steps = steps()
    if isinstance(steps, Network):
        return steps
    if not isinstance(steps, (list, tuple)):
        raise InvalidArgument(
            f"{factory} must give a list of steps or a network, got a {type(steps).__name__}"
        )
    return route(steps, example=example)


def _routed_again(
    folder: str,
    factories: list[str],
    models: list[str] | None,
    fronts: list[str] | None,
    gates: list[str] | None,
) -> Network:
    """The network in a folder that `offramp route` wrote, with all parts from its factory."""
    from offramp.building.saving import example_in, load

    if len(models or ()) > 1 or fronts or gates:
        raise InvalidArgument(
            f"--model {factories[0]} gives all parts of a network and must be given alone"
        )
    again = routed_network(factories[0], example_in(folder))
    members: dict[str, Any] = {}
    for member in again.members:
        preprocess = again.preprocess_of(member)
        members[member.name] = again.model_of(member)
        if preprocess is not None:
            members[member.name] = (again.model_of(member), preprocess)
    topology = again.topology
    return load(
        folder,
        members,
        gates={name: again.gate_of(name) for name in topology.gates},
        exits={name: again.exit_of(name) for name in topology.exits},
    )


def plan_of(path: str, thresholds: list[str] | None) -> Plan:
    """The plan in a file, or a plan by hand.

    Args:
        path: of the file, or - for a plan of the thresholds alone.
        thresholds: GATE=VALUE texts. They replace those of the file.

    Raises:
        InvalidArgument: a threshold is not a number, or there is none for -.
    """
    from offramp.plans.plan import Plan

    by_hand: dict[str, float] = {}
    for gate, value in pairs(thresholds, "--threshold").items():
        by_hand[gate] = number(value, f"--threshold {gate}=")
    # A plan of thresholds alone, or the plan of a file with some of them changed.
    if path == "-":
        if not by_hand:
            raise InvalidArgument("PLAN - must come with --threshold GATE=VALUE, got none")
        return Plan.by_hand(by_hand)
    plan = Plan.load(path)
    if not by_hand:
        return plan
    changed = dict(plan.thresholds)
    for gate, threshold in by_hand.items():
        changed[gate] = (threshold,)
    # Without its promise a plan may run on any engine.
    return plan.changed(thresholds=changed, origin=None)


def trace_of(path: str, rows: str | None) -> Trace:
    """The trace in a file, or the rows `a:b` of it."""
    from offramp.data import specs
    from offramp.plans.trace import Trace

    trace = Trace.load(path)
    if rows is None:
        return trace
    # `a:b` means the same as in a data spec, so it is read as one
    chosen = specs.selection(specs.Spec(path, "", "", None, "", rows), len(trace))
    indices = specs.chosen(range(len(trace)), chosen, rows, path, len(trace))
    return trace[slice(indices.start, indices.stop, indices.step)]


def risk_of(name: str | None) -> str | Risk | None:
    """A risk by its name, or the user's own for `my.module:my_risk`."""
    if name is None or ":" not in name:
        return name
    from offramp._support.find import imported
    from offramp.guarantees.risks import find_risk

    return find_risk(imported(name))


def number(text: str, what: str) -> float:
    """A number as it was typed. Raises InvalidArgument."""
    try:
        return float(text)
    except ValueError as problem:
        raise InvalidArgument(
            f"--threshold must be GATE=NUMBER (inf closes the exit), got {what}{text}"
        ) from problem


def writable(
    path: str | None, *, kinds: Mapping[str, tuple[bytes, str]] | None = None, folder: bool = False
) -> None:
    """Check before the work that an output can be written.

    Args:
        path: the output.
        kinds: by the ending of its name, bytes near the beginning of our files of this kind, and
            the name of the kind. A file without these bytes is not ours and is not replaced.
        folder: whether it is a folder.

    Raises:
        InvalidArgument: the name has another ending.
        BadFile: the path cannot be written, or has a file that is not ours.
    """
    if path is None:
        return
    from offramp._support.replacement import require_own_file, require_writable

    location = Path(path)
    if kinds is not None and location.suffix not in kinds:
        raise InvalidArgument(f"--output must end in {' or '.join(kinds)}, got {path}")
    require_writable(location, folder=folder)
    if kinds is not None:
        require_own_file(location, *kinds[location.suffix])


def require_apart(
    output: str, inputs: Sequence[str | None], *, way_out: str = "Name another output"
) -> None:
    """Raise InvalidArgument if the output would replace a file or a folder that the command reads.

    Args:
        output: the file or folder that will be written.
        inputs: those that are read; None for an option that was not given.
        way_out: what to do, for the message.
    """
    # Links are followed. An input inside of an output folder would be lost too.
    folder = Path(os.path.realpath(output))
    for name in inputs:
        if name is None or not os.path.exists(name):
            continue
        path = Path(os.path.realpath(name))
        if folder in (path, *path.parents):
            raise InvalidArgument(f"the output {output} would replace the input {name}. {way_out}")
