"""`offramp fit`: teach a network's exits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli.options import (
    AsJson,
    BatchSize,
    DataSpec,
    Given,
    GivenFront,
    GivenGate,
    NetworkFolder,
    network_of,
    writable,
)
from offramp.cli.printing import answer, main_process, note
from offramp.errors import BadInput

Output = Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write the network to.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="hinge, cross_entropy, joint, sdn, ztw, distill, boosted, ... (see doctor), my.module:Recipe.",
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option("--with", metavar="NAME=VALUE", help="An argument of the recipe, such as epochs=5; repeat it."),
]
Development = Annotated[
    str | None,
    typer.Option("--development", metavar="DATA", help="Rows on which the recipe chooses, and each epoch is measured."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Everything that is drawn depends on it alone.")]
Augmented = Annotated[
    str | None, typer.Option("--augment", metavar="NAME", help="crop_flip, flip, or my.module:function of a batch.")
]
Views = Annotated[
    int,
    typer.Option("--views", metavar="K", min=1, help="Augmented copies of each row, where features are pooled once."),
]
Precision = Annotated[str, typer.Option("--precision", metavar="no|bf16|fp16", help="Mixed precision.")]
Folder = Annotated[
    str | None,
    typer.Option("--folder", metavar="FOLDER", help="Keep metrics.csv, checkpoints here."),
]
Cache = Annotated[
    str | None, typer.Option("--cache", metavar="FOLDER", help="Keep pooled features here, for other runs too.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --folder.")]
Track = Annotated[str | None, typer.Option("--track", metavar="TRACKER", help="Also log to tensorboard, in --folder.")]


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
    model: Given = None,
    front_of: GivenFront = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    r"""Teach the exits of a network by a recipe.

    hinge and cross_entropy leave the model as it is and solve for its exits to a proven gap; joint trains
    model and exits together; sdn, ztw, distill, patience and objective are those of their papers.
    The rows are remembered: a promise is never made on them. Ctrl-C leaves a checkpoint in --folder, from
    which --resume goes on.

    Example:
      offramp fit network/ 'cifar10/train:data' --recipe hinge \
        --development 'cifar10:data[0:1000]' -o taught/
    """
    from offramp.arguments import arguments_of
    from offramp.fitting.teaching import fit as fitted
    from offramp.fitting.teaching import recipe_of
    from offramp.storing import save

    _require_apart(output, folder, cache)
    method, net = recipe_of(recipe, **arguments_of(arguments)), network_of(network, model, front_of, gate_of)
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
        history = fitted(net, data, recipe=method, development=development, folder=folder, resume=resume, **options)
    except KeyboardInterrupt as problem:
        where = f"go on with --folder {folder} --resume" if folder else "nothing was written; with --folder it goes on"
        note(f"offramp: interrupted; {where}")
        raise typer.Exit(130) from problem
    if main_process():
        save(net, output)
    body = {
        "network": output,
        "recipe": recipe,
        "fingerprint": net.fingerprint(),
        "untaught": list(net.untaught()),
        "epochs": [epoch.flat() for epoch in history.epochs],
        "notes": list(history.notes),
    }
    answer(body, as_json, str(history), f"Taught in {history.seconds:.1f} s: {output}")
    if net.untaught():
        note(f"not taught yet: {', '.join(net.untaught())}")


def _tell_where_it_begins(folder: str | None) -> None:
    """A word where there is nothing to go on from. Raises BadInput without a folder."""
    if not folder:
        raise BadInput("got --resume without --folder, expected the folder of the run; give it")
    from offramp.files import restored

    if not restored(Path(folder) / "checkpoint").is_dir():
        note(f"{folder} holds no checkpoint: teaching begins at the start")


def _require_apart(output: str, *beside: str | None) -> None:
    """Raise, before anything is taught, where the network could not be written in the end, or would replace the run."""
    from offramp.files import require_replaceable

    for place in (output, *beside):
        writable(place, folder=True)
    require_replaceable(Path(output))
    for place in beside:
        if place is not None and Path(output).absolute() in (Path(place).absolute(), *Path(place).absolute().parents):
            raise BadInput(f"got {place} inside the output {output}, which is replaced whole; name another folder")
