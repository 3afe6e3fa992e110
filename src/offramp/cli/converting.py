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

NETWORK = "network:"  # prefix of a folder with a network of one model
ROWS = 8  # that a model is tried on
TIMED_ROWS = 64  # that its layers are timed on
LABELLED = 256  # rows for methods that use gradients
LONGEST = 300  # characters of a spec that is printed

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
    rows = None  # as the model takes them
    few = None
    if example is not None:
        rows = _rows(example, before, TIMED_ROWS)
        few = rows[:ROWS]
    labelled = None
    if data is not None:
        labelled = _labelled(data, before)
    cheaper = converted(module, pairs(layer, "--layer"), example=few, data=labelled)

    # The spec names all conversions, also those that the model had before.
    base = split_spec(spec)[0]
    plain = module
    if base != spec:
        plain = make_model(base, fetch=False)
    new_spec: str | None = None
    try:
        new_spec = spec_with(base, conversions_of(cheaper, plain))
    except InvalidArgument as problem:  # a layer of the user's own
        note(f"offramp: {problem}")

    network = plain_network(cheaper, ModelSpec(BACKBONE, new_spec), before).eval()
    save(network, output)
    changed: list[Change] = []
    if rows is not None:
        changed = changes(module, cheaper, rows)
    body = {
        "network": output,
        "spec": new_spec,
        "fingerprint": network.fingerprint(),
        "changes": list(map(asdict, changed)),
    }
    shown: list[Any] = [f"Network of one converted model: {output}"]
    if new_spec is not None and len(new_spec) < LONGEST:
        shown.append(f"the same architecture by name: {new_spec}")
    shown.extend(costs_table(changed))
    answer(body, as_json, *shown)


def model_of(
    spec: str, weights: str | None, preprocess: str
) -> tuple[nn.Module, nn.Module | None, str]:
    """A model, its preprocessing, and the spec that builds the model again.

    Args:
        spec: as typed: a spec, or network:FOLDER.
        weights: a file, or None.
        preprocess: as typed: auto, none, unit, imagenet, or `my.module:preprocess`.

    Raises:
        InvalidArgument: the folder has more than one model, or comes with a file of weights.
    """
    from offramp.building.factories import make_model, make_preprocess, preprocess_of
    from offramp.building.saving import GiveAgain, load

    # 1. A model by name, or by a factory.
    if not spec.startswith(NETWORK):
        module = make_model(spec, weights)
        if preprocess == "auto":
            return module, preprocess_of(spec), spec
        return module, make_preprocess(preprocess), spec
    # 2. The only model of a saved network.
    folder = spec.removeprefix(NETWORK)
    if weights is not None:
        raise InvalidArgument(
            f"--weights must be left out for {spec}, which has its own weights. In a list of "
            f"weights use -"
        )
    try:
        network: Network = load(folder)
    except GiveAgain as problem:
        raise InvalidArgument(
            f"{problem.what}. Name the model itself instead of {spec}"
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
    """A table of costs before and after; an empty list if nothing was measured."""
    if not changed:
        return []
    heads = ("module", "now", "parameters", "bytes", "MACs", "bit operations", "ms")
    rows = []
    for change in changed:
        figures = _figures(change.before, change.after)
        rows.append((change.name or "whole model", change.kind, *figures))
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


def example_rows(example: str, before: nn.Module | None, most: int = ROWS) -> Any:
    """The first rows of --example, as the data has them.

    Args:
        example: a data spec.
        before: the model's preprocessing, whose sizes the data may follow.
        most: the number of rows.

    Raises:
        InvalidArgument: there are no rows.
    """
    from offramp.data.rows import proposing, rows

    with proposing([before]):
        batch = next(iter(rows(example).batches(most)), None)
    if batch is None:
        raise InvalidArgument(f"--example must have at least one row, got none in {example}")
    return batch.x


def _rows(spec: str, before: nn.Module | None, most: int) -> Any:
    """Rows as the model takes them, after its preprocessing."""
    import torch

    x = example_rows(spec, before, most)
    if not isinstance(x, torch.Tensor):
        if isinstance(x, (dict, tuple, list)):
            raise InvalidArgument(f"rows must have one input for convert, got several in {spec}")
        x = torch.as_tensor(x)
    if before is None:
        return x
    return before(x)


def _labelled(spec: str, before: nn.Module | None) -> tuple[Any, Any]:
    """Rows as the model takes them, and their labels."""
    import torch

    from offramp.data.rows import proposing, rows

    with proposing([before]):
        batch = next(iter(rows(spec).batches(LABELLED)), None)
    if batch is None or batch.y is None:
        raise InvalidArgument(f"--data must have rows with labels, got none in {spec}")
    return _rows(spec, before, LABELLED), torch.as_tensor(batch.y)
