"""`offramp route`, `resolutions` and `unrolled`: networks whose rows take paths of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp._support.arguments import words
from offramp.cli.converting import example_rows, model_of
from offramp.cli.cuts import Example, Model
from offramp.cli.options import (
    AsJson,
    OutputFolder,
    Preprocess,
    Weights,
    require_apart,
    routed_network,
    writable,
)
from offramp.cli.printing import answer, note
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from offramp.networks.network import Network

Steps = Annotated[
    str,
    typer.Argument(
        metavar="FACTORY",
        help="my.module:factory, a function without arguments that gives the steps of off.route, "
        "or a network.",
    ),
]
Sizes = Annotated[
    str,
    typer.Option("--sizes", metavar="A,B", help="Heights in pixels, such as 16,24,32."),
]
SizeGate = Annotated[
    str,
    typer.Option(
        "--gate", metavar="GATE", help="Scores the sizes: predictor, 'predictor?width=16', ..."
    ),
]


def route(factory: Steps, example: Example, output: OutputFolder, as_json: AsJson = False) -> None:
    r"""Make a network with forks from steps in your own code.

    The factory gives what `off.route` takes: pairs (name, module), off.Fork and off.Leave; or a
    network, such as one of offramp.templates. Your code is not saved: give it again with every
    command on this network, as --model my.module:factory. Train it with the recipes gumbel, d2nn
    or random_ways.

    Example:
      offramp route my.forks:steps --example 'cifar10:data[0:8]' -o network/
      offramp fit network/ 'cifar10/train:data' --model my.forks:steps --recipe d2nn -o trained/
    """
    writable(output, folder=True)
    network = routed_network(factory, example_rows(example, None))
    _saved(network, output, as_json)


def resolutions(
    model: Model,
    example: Example,
    output: OutputFolder,
    sizes: Sizes,
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    gate: SizeGate = "predictor",
    as_json: AsJson = False,
) -> None:
    r"""Let every image choose the size at which one model reads it.

    Convolutions are shared, batch norms are separate for each size. Train with the recipe drnet.

    Example:
      offramp resolutions offramp:resnet20 --weights r20.safetensors --sizes 16,24,32 \
        --example 'cifar10:data[0:8]' -o network/
      offramp fit network/ 'cifar10/train:data' --recipe drnet -o trained/
    """
    from offramp.building.resolving import resolutions as at_sizes

    writable(output, folder=True)
    require_apart(output, [weights])
    pixels = []
    for word in words(sizes) or ():
        if not word.isdecimal():
            raise InvalidArgument(
                f"--sizes must be numbers of pixels, such as 16,24,32, got {sizes}"
            )
        pixels.append(int(word))
    module, before, spec = model_of(model, weights, preprocess)
    batch = example_rows(example, before)
    network = at_sizes(module, batch, pixels, gate=gate, preprocess=before, spec=spec)
    _saved(network, output, as_json)


def unrolled(
    model: Model,
    example: Example,
    output: OutputFolder,
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    as_json: AsJson = False,
) -> None:
    r"""Let samples leave each stage of adaptive depth (ACT) after any of its units.

    The model has stages that halt by sample: `offramp convert` makes them, and the recipe pondered
    trains them. Each unit becomes a stage of the plan, with a threshold of its own.

    Example:
      offramp unrolled network:trained --example 'cifar10:data[0:8]' -o network/
      offramp convert offramp:resnet20 --weights r20.safetensors \
        --layer 'layer*=adaptive_depth?per=sample&bias=-1' -o act/
      offramp fit act/ 'cifar10/train:data' --recipe pondered --with tau=0.02 -o trained/
      offramp record network/ 'cifar10:data[1000:5000]' --settings 0.9,0.7,0.5,0.3 -o trace.npz
    """
    from offramp.building.unrolling import unrolled as taken_apart

    writable(output, folder=True)
    require_apart(output, [weights])
    module, before, spec = model_of(model, weights, preprocess)
    batch = example_rows(example, before)
    network = taken_apart(module, batch, preprocess=before, spec=spec)
    _saved(network, output, as_json)


def _saved(network: Network, output: str, as_json: bool) -> None:
    """Write a network, and print it as a tree."""
    from offramp.building.saving import FOLDER, save

    FOLDER.require_own(Path(output))
    save(network, output)
    body: dict[str, Any] = {
        "network": output,
        **network.config(),
        "fingerprint": network.fingerprint(),
        "untrained": list(network.untrained()),
    }
    answer(body, as_json, f"{network}", f"written: {output}")
    if network.topology.has_many_paths:
        note("more than sixteen paths: record it with --settings")
