"""`offramp convert`: a model with cheaper layers; and models named by the folders that it
writes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp._support.arguments import pairs
from offramp.cli.options import AsJson, OutputFolder, Preprocess, Weights, require_apart, writable
from offramp.cli.printing import answer, note, table
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from torch import nn

    from offramp.building.costing import Change, Cost
    from offramp.networks.network import Network

NETWORK = "network:"  # before the folder of a network whose one model is meant
ROWS = 8
LABELLED = 256

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="As in `offramp cut`, or network:FOLDER with what convert wrote before.",
    ),
]
Layers = Annotated[
    list[str],
    typer.Option(
        "--layer",
        metavar="PATTERN=METHOD",
        help="Which modules, by names with * or by their class, and what to put there, such as "
        "'layer3.*=ghost?ratio=2' or 'Conv2d=low_rank'; repeat it, the last that matches counts.",
    ),
]
Example = Annotated[
    str | None,
    typer.Option(
        "--example",
        metavar="DATA",
        help="Rows to try it on and to time it on, such as digits[0:64].",
    ),
]
Labelled = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="Labelled rows, for methods that look at gradients (pruned)."
    ),
]


def convert(
    model: Model,
    layer: Layers,
    output: OutputFolder,
    example: Example = None,
    data: Labelled = None,
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    as_json: AsJson = False,
) -> None:
    r"""Put cheaper layers in the place of some of a model's.

    `offramp doctor` lists the methods, as layers; or name my.module:Mine. See
    docs/how-to/make-parts-cheaper.md. What is written is a network of one model:
    `offramp fit --recipe recover` brings its accuracy back, and cut and ladder take it as
    network:FOLDER. With --example the costs of all replaced layers are printed, before and after.

    Example:
      offramp convert offramp:resnet20 --weights r20.safetensors --layer 'layer3.*=ghost?ratio=2' \
        --example 'cifar10:data[0:64]' -o ghost/
      offramp fit ghost/ 'cifar10/train:data' --recipe recover \
        --original-weights r20.safetensors -o recovered/
      offramp ladder --model network:recovered --weights - \
        --model offramp:resnet56 --weights r56.safetensors -o network/
    """
    from offramp.building.converting import conversions_of, spec_with, split_spec
    from offramp.building.converting import convert as converted
    from offramp.building.costing import changes
    from offramp.building.factories import make_model
    from offramp.building.saving import FOLDER, save
    from offramp.networks.members import BACKBONE, ModelSpec
    from offramp.networks.network import plain_network

    writable(output, folder=True)
    FOLDER.require_own(Path(output))
    require_apart(output, [weights])
    module, before, spec = model_of(model, weights, preprocess)
    rows = None if example is None else _rows(example, before, 64)
    given = None if data is None else _labelled(data, before)
    made = converted(module, pairs(layer, "--layer"), example=_some(rows), data=given)
    base = split_spec(spec)[0]
    plain = make_model(base, fetch=False) if base != spec else module
    text = _text(lambda: spec_with(base, conversions_of(made, plain)))
    network = plain_network(made, ModelSpec(BACKBONE, text), before).eval()
    save(network, output)
    changed = [] if rows is None else changes(module, made, rows)
    body: dict[str, Any] = {"network": output, "spec": text, "fingerprint": network.fingerprint()}
    body["changes"] = [asdict(one) for one in changed]
    shown = [f"Network of one converted model: {output}", *costs_table(changed)]
    if text is not None:
        shown.insert(1, f"the same architecture by name: {text}" if len(text) < 300 else "")
    answer(body, as_json, *[thing for thing in shown if thing != ""])


def _text(make: Any) -> str | None:
    """The spec of a converted model; None, with a word, where its layers are the user's own."""
    try:
        text: str = make()
    except InvalidArgument as problem:
        note(f"offramp: {problem}")
        return None
    return text


def model_of(
    spec: str, weights: str | None, preprocess: str
) -> tuple[nn.Module, nn.Module | None, str]:
    """A model, its preprocessing, and the spec that builds the model again.

    Args:
        spec: as typed: a spec, or network:FOLDER.
        weights: a file, or None.
        preprocess: as typed: auto, none, unit, imagenet, or `my.module:preprocess`.

    Raises:
        InvalidArgument: a folder with more than one model, or weights beside it.
    """
    from offramp.building.factories import make_model, make_preprocess, preprocess_of
    from offramp.building.saving import GiveAgain, load

    if not spec.startswith(NETWORK):
        module = make_model(spec, weights)
        return (
            module,
            preprocess_of(spec) if preprocess == "auto" else make_preprocess(preprocess),
            spec,
        )
    folder = spec.removeprefix(NETWORK)
    if weights is not None:
        raise InvalidArgument(f"{spec} has its own weights; leave --weights out, or give - for it")
    try:
        network: Network = load(folder)
    except GiveAgain as problem:
        raise InvalidArgument(
            f"{problem.what}; name the model itself instead of {spec}"
        ) from problem
    if len(network.members) > 1:
        raise InvalidArgument(
            f"{folder} must hold a network of one model, got {len(network.members)}"
        )
    member = network.members[0]
    if preprocess == "auto":
        before = network.preprocess_of(member)
    else:
        before = make_preprocess(preprocess)
    return network.model_of(member), before, member.spec or spec


def costs_table(changed: list[Change]) -> list[Any]:
    """A table of costs before and after; nothing where nothing was measured."""
    if not changed:
        return []
    heads = ("module", "now", "parameters", "bytes", "MACs", "bit operations", "ms")
    rows = []
    for one in changed:
        pair = (one.before, one.after)
        rows.append((one.name or "whole model", one.kind, *_figures(*pair)))
    return [table(*heads, rows=rows)]


def _figures(before: Cost, after: Cost) -> list[str]:
    """Each figure as `before -> after`."""
    names = ("parameters", "stored_bytes", "macs", "bit_operations", "ms")
    figures = []
    for name in names:
        first = getattr(before, name)
        second = getattr(after, name)
        if first is None or second is None:
            figures.append("-")
        elif name == "ms":
            figures.append(f"{first:.3g} -> {second:.3g}")
        else:
            figures.append(f"{first:,.0f} -> {second:,.0f}")
    return figures


def _some(rows: Any) -> Any:
    """The first rows of an example, enough to try a model on."""
    return None if rows is None else rows[:ROWS]


def _rows(spec: str, before: nn.Module | None, most: int) -> Any:
    """Rows as the model takes them, behind its preprocessing."""
    import torch

    from offramp.data.rows import proposing, rows

    with proposing([before]):
        batch = next(iter(rows(spec).batches(most)), None)
    if batch is None:
        raise InvalidArgument(f"--example must have at least one row, got none in {spec}")
    x: Any = batch.x
    if not isinstance(x, torch.Tensor):
        if isinstance(x, (dict, tuple, list)):
            raise InvalidArgument(f"convert takes models of one input, and {spec} has several")
        x = torch.as_tensor(x)
    return x if before is None else before(x)


def _labelled(spec: str, before: nn.Module | None) -> tuple[Any, Any]:
    """Rows and their labels."""
    import torch

    from offramp.data.rows import proposing, rows

    with proposing([before]):
        batch = next(iter(rows(spec).batches(LABELLED)), None)
    if batch is None or batch.y is None:
        raise InvalidArgument(f"--data {spec} must have rows with labels")
    return _rows(spec, before, LABELLED), torch.as_tensor(batch.y)
