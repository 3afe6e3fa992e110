"""`offramp ladder`: stack trained models into a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.converting import model_of
from offramp.cli.options import AsJson, GateName, OutputFolder, require_apart, writable
from offramp.cli.printing import answer
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from offramp.networks.network import Network

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        metavar="SPEC",
        help="A model as in `offramp cut`, such as timm:resnet18; cheapest first.",
    ),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights", metavar="FILE", help="Its .safetensors, .pt or .pth (read safely); - for none."
    ),
]
Preprocesses = Annotated[
    list[str] | None,
    typer.Option(
        "--preprocess",
        metavar="PREPROCESS",
        help="Its input: auto (default), none, unit, imagenet, my.module:preprocess.",
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="NAME", help="Its name; by default the last word of SPEC."),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", metavar="T", help="Divide the logits by it before they are scored."
    ),
]
Answer = Annotated[
    str,
    typer.Option(
        "--answer",
        metavar="own|mean",
        help="The member's own logits, or the mean of the members visited.",
    ),
]
Example = Annotated[
    str | None,
    typer.Option(
        "--example",
        metavar="DATA",
        help="Rows to try the members on: they must agree on the classes.",
    ),
]


def ladder(
    model: Models,
    output: OutputFolder,
    weights: Weights = None,
    preprocess: Preprocesses = None,
    name: Names = None,
    gate: GateName = "margin",
    temperature: Temperature = None,
    answers: Answer = "own",
    example: Example = None,
    as_json: AsJson = False,
) -> None:
    r"""Stack trained models into a network, cheapest first.

    Nothing is trained. Repeated options pair up in order: the n-th --weights, --preprocess and
    --name belong to the n-th --model.

    Example:
      offramp ladder --model offramp:resnet20 --weights r20.safetensors \
        --model offramp:resnet56 --weights r56.safetensors -o network/
    """
    from offramp.building.saving import FOLDER, save

    writable(output, folder=True)
    FOLDER.require_own(Path(output))
    require_apart(output, weights or ())
    network = _network(model, weights, preprocess, name, gate, temperature, answers, example)
    save(network, output)
    body: dict[str, Any] = {
        "network": output,
        **network.config(),
        "fingerprint": network.fingerprint(),
    }
    exits = ", ".join(network.topology.exits)
    answer(
        body,
        as_json,
        f"Network of {len(model)} members ({exits}), gate {gate}, answer {answers}: {output}",
    )


def _network(
    model: list[str],
    weights: list[str] | None,
    preprocess: list[str] | None,
    name: list[str] | None,
    gate: str,
    temperature: float | None,
    answers: str,
    example: str | None,
) -> Network:
    """The network of the options, as they were typed."""
    from offramp.building.cutting import ladder as stacked
    from offramp.data.rows import proposing, rows

    # 1. One value of each option per model, or its default.
    weight_files = _one_each(model, weights, "--weights", "-")
    preprocess_specs = _one_each(model, preprocess, "--preprocess", "auto")
    if name:
        names = _one_each(model, name, "--name", "")
    else:
        names = _unique_names(model)
    if len(set(names)) < len(names):
        raise InvalidArgument(f"each --name must be given once, got {', '.join(names)}")

    # 2. Build every member with its preprocessing.
    members: dict[str, Any] = {}
    specs: dict[str, str] = {}
    modules = list[Any]()  # the members' preprocessing
    for index, member in enumerate(names):
        file: str | None = weight_files[index]
        if file == "-":
            file = None
        built, before, specs[member] = model_of(model[index], file, preprocess_specs[index])
        members[member] = (built, before)
        modules.append(before)

    # 3. Read the rows to try them on, in a size that all of them take.
    sample = None
    if example is not None:
        with proposing(modules):
            sample = next(rows(example).batches(2)).x
    return stacked(
        members, gate=gate, temperature=temperature, answer=answers, example=sample, sources=specs
    )


def _one_each(
    models: Sequence[str], values: Sequence[str] | None, option: str, default: str
) -> list[str]:
    """One value per model: the values of an option, or the default for all."""
    if not values:
        return [default] * len(models)
    if len(values) != len(models):
        raise InvalidArgument(
            f"{option} must be given once for each --model, in order: {len(models)} times, "
            f"got {len(values)}"
        )
    return list(values)


def _unique_names(models: Sequence[str]) -> list[str]:
    """A name for each model: the last word of its spec. Equal names get a number."""
    names: list[str] = []
    for spec in models:
        # The second of two equal names gets a 2.
        word = _last_word(spec)
        name = word
        number = 2
        while name in names:
            name = f"{word}-{number}"
            number += 1
        names.append(name)
    return names


def _last_word(typed: str) -> str:
    """The last word of a spec: `resnet20` of `offramp:resnet20?classes=100`."""
    from offramp._support.find import files

    spec = typed.partition("|")[0].rstrip("/")  # without conversions
    bare = spec.partition("?")[0].rstrip("/")  # without arguments
    separators = r"[:.]"  # my.module:factory
    if spec.partition(":")[0] in files("hubs"):
        separators = r"[:/]"  # a hub's names have dots
    if spec.startswith("onnx:"):
        bare = Path(bare.removeprefix("onnx:")).stem
    word = re.split(separators, bare)[-1]
    return re.sub(r"[^A-Za-z0-9_\-]", "-", word) or "member"
