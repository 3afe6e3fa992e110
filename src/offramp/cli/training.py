"""`offramp fit`: train a network's exits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from offramp.cli.options import (
    AsJson,
    Augmented,
    BatchSize,
    DataSpec,
    Given,
    GivenGate,
    GivenPreprocess,
    NetworkFolder,
    Seed,
    network_of,
    require_apart,
    writable,
)
from offramp.cli.printing import answer, main_process, note
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from offramp.networks.network import Network

RECIPE = "offramp.networks.recipe"  # the key of the recipe's name in the context of the command

Output = Annotated[
    str,
    typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write the network to."),
]


class FitCommand(TyperCommand):
    """`offramp fit`. With --recipe, its help also lists the arguments of that recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Store the recipe's name, because the help is printed before the options are read."""
        ctx.meta[RECIPE] = _named_recipe(args)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The arguments of the recipe, or how to see them."""
        name = ctx.meta.get(RECIPE)
        if name is None:
            text = (
                "The arguments of a recipe: offramp fit --recipe NAME --help, or "
                "docs/reference/recipes.md"
            )
        else:
            from offramp.fitting.describing import described

            text = described(name.partition("?")[0])
        formatter.write(f"\n{text}\n")


def _named_recipe(args: list[str]) -> str | None:
    """The value of --recipe among the words of a command line."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word.startswith("--recipe="):
            return word.partition("=")[2]
        if word == "--recipe" and following:
            return following
    return None


RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="hinge, cross_entropy, joint, sdn, ztw, ... (see doctor), 'joint?epochs=5', or "
        "my.module:Recipe.",
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NAME=VALUE",
        help="An argument of the recipe, such as epochs=5; repeat it.",
    ),
]
Development = Annotated[
    str | None,
    typer.Option(
        "--development",
        metavar="DATA",
        help="Rows on which the recipe chooses, and each epoch is measured.",
    ),
]
Views = Annotated[
    int,
    typer.Option(
        "--views",
        metavar="K",
        min=1,
        help="Augmented copies of each row, where features are pooled once.",
    ),
]
Precision = Annotated[
    str, typer.Option("--precision", metavar="no|bf16|fp16", help="Mixed precision.")
]
Folder = Annotated[
    str | None,
    typer.Option("--folder", metavar="FOLDER", help="Keep metrics.csv, checkpoints here."),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="FOLDER", help="Keep pooled features here, for other runs too."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --folder.")]
Original = Annotated[
    str | None,
    typer.Option(
        "--original",
        metavar="MODEL",
        help="For the recipe recover: the model before it was converted; by default its name "
        "without conversions.",
    ),
]
OriginalWeights = Annotated[
    str | None,
    typer.Option("--original-weights", metavar="FILE", help="The weights of --original."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Allow --output to be NETWORK itself.")
]
Track = Annotated[
    str | None,
    typer.Option("--track", metavar="TRACKER", help="Also log to tensorboard, in --folder."),
]


def fit(
    network: NetworkFolder,
    data: DataSpec,
    output: Output,
    recipe: RecipeName = "hinge",
    arguments: With = None,
    development: Development = None,
    batch_size: BatchSize = 128,
    seed: Seed = 0,
    augment: Augmented = None,
    views: Views = 1,
    precision: Precision = "no",
    folder: Folder = None,
    cache: Cache = None,
    resume: Resume = False,
    track: Track = None,
    original: Original = None,
    original_weights: OriginalWeights = None,
    overwrite: Overwrite = False,
    model: Given = None,
    preprocess_of: GivenPreprocess = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    r"""Train the exits, or the forks, of a network by a recipe.

    hinge and cross_entropy leave the model as it is and solve for its exits to a proven gap; joint
    trains model and exits together; sdn, ztw, distill, patience and objective are those of their
    papers. Networks with forks take gumbel, d2nn, drnet and random_ways, and models with stages of
    adaptive depth pondered. The rows are remembered: a promise is never made on them. Ctrl-C leaves
    a checkpoint in --folder, from which --resume goes on.

    Example:
      offramp fit network/ 'cifar10/train:data' --recipe hinge \
        --development 'cifar10:data[0:1000]' -o trained/
    """
    from offramp._support.arguments import arguments_of
    from offramp.building.saving import save
    from offramp.fitting.training import fit as fitted
    from offramp.fitting.training import recipe_of

    # 1. Check everything that will be written, before anything is read or trained.
    _require_places(network, output, folder, cache, overwrite=overwrite)

    # 2. Load the network and the recipe.
    values = arguments_of(arguments)
    # The recipe recover learns from another model, which only the command line can name.
    if recipe.partition("?")[0] == "recover":
        net = network_of(network, model, preprocess_of, gate_of)
        method = recipe_of(recipe, **values, original=_original(net, original, original_weights))
    else:
        if original is not None or original_weights is not None:
            raise InvalidArgument(
                f"--recipe must be recover for --original and --original-weights, got {recipe}"
            )
        method = recipe_of(recipe, **values)
        net = network_of(network, model, preprocess_of, gate_of)

    # 3. Train. After Ctrl-C the training can go on from its checkpoint.
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "augment": augment,
        "views": views,
        "precision": precision,
        "track": track,
        "cache": cache,
    }
    if resume:
        _tell_where_it_begins(folder)
    try:
        history = fitted(
            net,
            data,
            recipe=method,
            development=development,
            folder=folder,
            resume=resume,
            **options,
        )
    except KeyboardInterrupt as problem:
        if folder:
            where = f"go on with --folder {folder} --resume"
        else:
            where = "nothing was written; with --folder it goes on"
        note(f"offramp: interrupted; {where}")
        raise typer.Exit(130) from problem

    # 4. Write the network and print the result. Of several processes only one writes.
    if main_process():
        save(net, output)
    body = {
        "network": output,
        "recipe": recipe,
        "fingerprint": net.fingerprint(),
        "untrained": list(net.untrained()),
        "epochs": [epoch.flat() for epoch in history.epochs],
        "notes": list(history.notes),
    }
    answer(body, as_json, str(history), f"Trained in {history.seconds:.1f} s: {output}")
    if net.untrained():
        note(f"not trained yet: {', '.join(net.untrained())}")


def _original(network: Network, spec: str | None, weights: str | None) -> Any:
    """The original model for the recipe recover. Raises InvalidArgument if it is not known."""
    from offramp.building.converting import split_spec
    from offramp.building.factories import OURS
    from offramp.cli.converting import model_of

    own = network.members[0].spec
    if spec is None:
        if own is None:
            raise InvalidArgument(
                "--original must be given, because this model has no name that could be used "
                "instead"
            )
        spec = split_spec(own)[0]
    if spec.startswith(OURS) and weights is None:
        raise InvalidArgument(
            f"--original-weights FILE must be given, because {spec} has no weights of its own. "
            "They are those before the conversion"
        )
    return model_of(spec, weights, "none")[0]


def _tell_where_it_begins(folder: str | None) -> None:
    """Note if there is no checkpoint to go on from. Raises InvalidArgument without a folder."""
    if not folder:
        raise InvalidArgument("--folder must be the folder of the run for --resume, got none")
    from offramp._support.replacement import restored
    from offramp.fitting.checkpoint import FOLDER

    if not restored(Path(folder) / "checkpoint", FOLDER.require_own).is_dir():
        note(f"{folder} has no checkpoint, so the training begins at the start")


def _require_places(network: str, output: str, *beside: str | None, overwrite: bool) -> None:
    """Check all outputs before anything is trained.

    Raises BadFile or InvalidArgument if one cannot be written in the end, or would replace an
    input.
    """
    from offramp.building.saving import FOLDER

    for path in (output, *beside):
        writable(path, folder=True)
    FOLDER.require_own(Path(output))
    if not overwrite:
        require_apart(
            output, [network], way_out="Name another folder, or allow it with --overwrite"
        )
    # A saved network is replaced as a whole, with everything in its folder.
    for path in filter(None, beside):
        place = Path(path).absolute()
        for word, folder in (("output", output), ("network", network)):
            outer = Path(folder).absolute()
            if outer == place or outer in place.parents:
                raise InvalidArgument(
                    f"{path} must not be inside the {word} {folder}, which can hold only a "
                    f"network. Name another folder"
                )
