"""`offramp inspect`, `cut` and `adopt`: list where a model can be cut, cut it, or use its exits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp._support.arguments import pairs, words
from offramp.building.placement.flags import AUTO, exits_at, require_placement_flags
from offramp.cli.converting import TIMED_ROWS, costs_table, example_rows, model_of
from offramp.cli.options import (
    AsJson,
    GateName,
    OutputFolder,
    Preprocess,
    Weights,
    require_apart,
    writable,
)
from offramp.cli.placement import figures
from offramp.cli.printing import answer, note, table
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from offramp.networks.network import Network

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="offramp:resnet20, timm:NAME, torchvision:NAME, hf:NAME-OR-FOLDER (pretrained; "
        "NAME?num_classes=10&pretrained=no; ours take arguments alike) or my.module:factory.",
    ),
]
Example = Annotated[
    str,
    typer.Option(
        "--example", metavar="DATA", help="Rows to try it on, such as digits[0:4] or npz:some.npz."
    ),
]
At = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="A,B",
        help="Cut after these modules, such as layer1,layer2; or auto: where it pays.",
    ),
]
Parts = Annotated[
    int | None,
    typer.Option(
        "--parts",
        metavar="K",
        help="Or cut into K parts of about equal work; with --at auto at most K.",
    ),
]
Labelled = Annotated[
    str | None,
    typer.Option(
        "--labelled", metavar="DATA", help="For --at auto: labelled rows to try places on."
    ),
]
Exit = Annotated[
    str,
    typer.Option(
        "--exit",
        metavar="EXIT",
        help="linear, linear_grid, linear_masked, mlp, branch, strided?width=64, ... (see "
        "doctor), my.module:factory.",
    ),
]

ExitOf = Annotated[
    list[str] | None,
    typer.Option(
        "--exit-of",
        metavar="NODE=EXIT",
        help="Another exit than --exit after a module of --at; repeat it.",
    ),
]
Exits = Annotated[
    list[str] | None,
    typer.Option(
        "--exits",
        metavar="LAYER=HEAD",
        help="The module that is the exit after a layer; repeat it.",
    ),
]
Length = Annotated[
    str | None,
    typer.Option(
        "--length",
        metavar="A,B",
        help="Inputs whose length of text is free: input_ids,attention_mask. Else it is that of "
        "--example.",
    ),
]

Skip = Annotated[
    str | None,
    typer.Option(
        "--skip",
        metavar="A,B",
        help="Instead of --at: residual units that rows may skip, such as 'layer3.*'.",
    ),
]


def cut(
    model: Model,
    example: Example,
    output: OutputFolder,
    at: At = None,
    parts: Parts = None,
    labelled: Labelled = None,
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    exit_: Exit = "linear_grid",
    exit_of: ExitOf = None,
    gate: GateName = "margin",
    length: Length = None,
    skip: Skip = None,
    as_json: AsJson = False,
) -> None:
    r"""Hang exits on one trained model, or make units of it that rows may skip.

    The model is cut after the modules in --at, or into --parts; its weights stay as they are. The
    exits are not trained yet: `offramp fit` does that, or any loop of yours over net(x) in Python.
    With --at auto a quick linear exit is tried at up to 24 places on the rows of --labelled and
    timed on this machine; those places are taken where the time that leaving saves is worth the
    exits. Such rows promise nothing later.
    With --skip there are no exits: before each of these residual units rows go on or skip it. Train
    that with the recipes gumbel or d2nn.

    Example:
      offramp cut offramp:resnet20 --weights r20.safetensors --at layer1,layer2 \
        --example 'cifar10:data[0:8]' -o network/
      offramp cut hf:bert-sst2/ --at bert.encoder.layer.3 --exit linear_masked \
        --length input_ids,attention_mask --example 'tsv:dev.tsv?tokenizer=bert-sst2/[0:8]' \
        -o network/
      offramp cut offramp:resnet20 --weights r20.safetensors --skip 'layer3.*' \
        --example 'cifar10:data[0:8]' -o network/
    """
    from offramp.building.cutting import cut as skipping
    from offramp.building.cutting import cut_and_placement as made
    from offramp.building.saving import FOLDER, save

    # 1. Check the output and the flags, before anything is loaded.
    writable(output, folder=True)
    FOLDER.require_own(Path(output))
    require_apart(output, [weights])
    if skip is None:
        require_placement_flags(at, parts, labelled)
    else:
        _require_skip_alone(at, parts, labelled, exit_of, length)
    module, before, spec = model_of(model, weights, preprocess)
    batch = example_rows(example, before)

    # 2. With --skip the network has forks and no exits.
    if skip is not None:
        network = skipping(
            module, batch, skip=words(skip) or (), gate=gate, preprocess=before, spec=spec
        )
        save(network, output)
        answer(_described(network, output), as_json, f"{network}", f"written: {output}")
        if network.topology.has_many_paths:
            note("more than sixteen paths: record it with --settings")
        return

    # 3. Otherwise cut after the named modules, or where `auto` finds that exits pay.
    places: str | Sequence[str] | None = at
    if at != AUTO:
        places = words(at)
    network, placement = made(
        module,
        batch,
        at=places,
        parts=parts,
        exits=exits_at(at, exit_, exit_of),
        gate=gate,
        preprocess=before,
        spec=spec,
        length=words(length) or (),
        labelled=labelled,
    )
    save(network, output)
    body = _described(network, output)
    body["untrained"] = list(network.untrained())
    measured, drawn = figures(placement)
    body.update(measured)
    answer(
        body,
        as_json,
        f"Network of one model with exits {', '.join(network.topology.exits)}, gate {gate}: "
        f"{output}",
        *drawn,
    )
    if network.untrained():
        note(f"not trained yet: {', '.join(network.untrained())}")


def _described(network: Network, output: str) -> dict[str, Any]:
    """A network as plain data, for --json."""
    return {"network": output, **network.config(), "fingerprint": network.fingerprint()}


def _require_skip_alone(*others: object) -> None:
    """Raise InvalidArgument if options of exits are given besides --skip."""
    names = ("--at", "--parts", "--labelled", "--exit-of", "--length")
    for name, value in zip(names, others, strict=True):
        if value is not None:
            raise InvalidArgument(f"{name} must be left out with --skip, which makes no exits")


def adopt(
    model: Model,
    example: Example,
    output: OutputFolder,
    exits: Exits = None,
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    gate: GateName = "margin",
    length: Length = None,
    as_json: AsJson = False,
) -> None:
    """Make a network of a model that was trained with exits of its own.

    Its forward gives the logits of all exits, and one run on --example finds the module behind each
    of them; or name them with --exits. Nothing is trained and nothing is copied.

    Example:
      offramp adopt my.sensors:Sensors --weights sensors.pt --example npz:some.npz -o network/
      offramp adopt my.sensors:Sensors --exits blocks.0=heads.0 --example npz:some.npz -o network/
    """
    from offramp.building.adopting import adopt as adopted
    from offramp.building.saving import FOLDER, save

    writable(output, folder=True)
    FOLDER.require_own(Path(output))
    require_apart(output, [weights])
    module, before, _ = model_of(model, weights, preprocess)
    heads = pairs(exits, "--exits") or None
    batch = example_rows(example, before)
    free = words(length) or ()
    network = adopted(
        module, batch, exits=heads, gate=gate, preprocess=before, spec=model, length=free
    )
    save(network, output)
    body = _described(network, output)
    shown = (
        f"Network of one model with its own exits {', '.join(network.topology.exits)}, gate "
        f"{gate}: {output}"
    )
    answer(body, as_json, shown)


def inspect(
    model: Model,
    example: Example,
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    length: Length = None,
    as_json: AsJson = False,
) -> None:
    """List where a model can be cut.

    For every module, in the order in which they end: the share of multiply-adds (MACs) and of
    milliseconds up to there, the bytes per row that go on from there, or why it is no place to cut.
    The milliseconds are one measurement of the plain model on this machine, at the batch that
    --example gives (at most 64). A model that mixes rows, or cannot be exported, is refused. For a
    converted model, as in the second example, a table of its layers' parameters, bytes, bit
    operations and milliseconds follows, before and after.

    Example:
      offramp inspect offramp:resnet20 --example 'cifar10:data[0:8]'
      offramp inspect 'offramp:resnet20|layer3.*=ghost?ratio=2' --example 'cifar10:data[0:8]'
    """
    from offramp.building.converting import BAR, split_spec
    from offramp.building.factories import make_model
    from offramp.building.inspecting import inspect as inspected

    module, before, spec = model_of(model, weights, preprocess)
    # The costs of a converted model are compared with those of the model before its conversions.
    original = None
    if BAR in spec:
        original = make_model(split_spec(spec)[0], fetch=False)
    rows = example_rows(example, before, TIMED_ROWS)
    inspection = inspected(
        module, rows, preprocess=before, length=words(length) or (), original=original
    )
    # Heads in two lines leave room for the reasons, which are long.
    heads = ("cut after", "MACs\nso far", "ms\nso far", "bytes\nper row", "carries")
    drawn = table(*heads, rows=inspection.rows())
    answer(
        {"model": model, **inspection.to_json()},
        as_json,
        f"{model}: {inspection}",
        drawn,
        *costs_table(list(inspection.changes)),
    )
