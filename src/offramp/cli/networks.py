"""`offramp ladder`: trained models -> a network."""

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
    from offramp.building.cutting import ladder as stacked
    from offramp.data.rows import proposing, rows

    files = _beside(model, weights, "--weights", "-")
    fronts = _beside(model, preprocess, "--preprocess", "auto")
    names = _beside(model, name, "--name", "") if name else _unique(model)
    if len(set(names)) < len(names):
        raise InvalidArgument(f"each --name must be given once, got {', '.join(names)}")
    members: dict[str, Any] = {}
    specs: dict[str, str] = {}
    for member, spec, file, kind in zip(names, model, files, fronts, strict=True):
        made, before, specs[member] = model_of(spec, None if file == "-" else file, kind)
        members[member] = (made, before)
    with proposing(before for _, before in members.values()):
        sample = None if example is None else next(rows(example).batches(2)).x
    return stacked(
        members, gate=gate, temperature=temperature, answer=answers, example=sample, sources=specs
    )


def _beside(
    models: Sequence[str], given: Sequence[str] | None, option: str, default: str
) -> list[str]:
    """One value per model: those given, or the default for all."""
    if given and len(given) != len(models):
        raise InvalidArgument(
            f"{option} must be given once for each --model, in order: {len(models)} times, "
            f"got {len(given)}"
        )
    return list(given) if given else [default] * len(models)


def _unique(models: Sequence[str]) -> list[str]:
    """The last word of each spec (of a hub's the name, of a file its stem); of equal ones the later
    get a number.
    """
    from offramp._support.find import files

    names: list[str] = []
    for typed in models:
        spec = typed.partition("|")[0].rstrip("/")  # without its conversions
        bare = spec.partition("?")[0].rstrip("/")
        parts = r"[:/]" if spec.partition(":")[0] in files("hubs") else r"[:.]"
        if spec.startswith("onnx:"):
            bare = Path(bare.removeprefix("onnx:")).stem
        word = re.sub(r"[^A-Za-z0-9_\-]", "-", re.split(parts, bare)[-1]) or "member"
        names.append(
            next(
                each for each in (word, *(f"{word}-{n}" for n in range(2, 99))) if each not in names
            )
        )
    return names
