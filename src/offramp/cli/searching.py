"""`offramp search`: find the best network within a budget among many that share weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp._support.arguments import pairs, words
from offramp.cli.converting import model_of
from offramp.cli.options import (
    AsJson,
    Augmented,
    BatchSize,
    DataSpec,
    GateName,
    OutputFolder,
    Preprocess,
    Seed,
    Weights,
    require_apart,
    writable,
)
from offramp.cli.printing import answer, note, table
from offramp.errors import InvalidArgument

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="As in `offramp cut`, or network:FOLDER with what convert wrote."
    ),
]
Choices = Annotated[
    list[str],
    typer.Option(
        "--choice",
        metavar="PATTERN=A,B",
        help="The options at some modules: dense, skip, narrow?by=2, or a method of convert, "
        "such as 'layer*.*=dense,ghost?ratio=2,skip'; repeat it. The first one is the reference.",
    ),
]
Development = Annotated[
    str,
    typer.Option("--development", metavar="DATA", help="Held-out labelled rows that judge."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--other-task",
        metavar="NAME=DATA",
        help="One more task with a head of its own, and the rows that train it; repeat it. The "
        "task of DATA is called `task`.",
    ),
]
Searched = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="The task to search for; by default that of DATA."),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="The most that a row may cost on average, as a share of the dense network's cost.",
    ),
]
Limit = Annotated[
    float | None,
    typer.Option("--limit", metavar="COST", help="The same in the unit, instead of --budget."),
]
Unit = Annotated[
    str, typer.Option("--unit", metavar="macs|ms", help="Multiply-adds, or measured milliseconds.")
]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="A,B", help="Modules that an exit may follow."),
]
Exit = Annotated[
    str, typer.Option("--exit", metavar="EXIT", help="The kind of the exits, as in `offramp cut`.")
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of training.")]
Paths = Annotated[
    int, typer.Option("--paths", metavar="N", min=1, help="Networks that are drawn for a step.")
]
Rate = Annotated[float, typer.Option("--rate", metavar="R", help="Of SGD at the first step.")]
Population = Annotated[
    int, typer.Option("--population", metavar="N", min=1, help="Networks of a generation.")
]
Generations = Annotated[
    int, typer.Option("--generations", metavar="N", min=1, help="Generations of the evolution.")
]
Folder = Annotated[
    str | None,
    typer.Option(
        "--folder", metavar="FOLDER", help="Keep the supernet and the judged networks here."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from --folder; with another budget, unit or task nothing is trained again.",
    ),
]
Head = Annotated[
    str | None,
    typer.Option("--head", metavar="MODULE", help="The linear layer that gives the logits."),
]


def search(
    model: Model,
    data: DataSpec,
    choice: Choices,
    development: Development,
    output: OutputFolder,
    budget: Budget = None,
    limit: Limit = None,
    unit: Unit = "macs",
    task: Searched = None,
    other_task: Tasks = None,
    at: At = None,
    exit_: Exit = "linear",
    gate: GateName = "margin",
    weights: Weights = None,
    preprocess: Preprocess = "auto",
    head: Head = None,
    steps: Steps = 2000,
    paths: Paths = 2,
    batch_size: BatchSize = 128,
    rate: Rate = 0.02,
    augment: Augmented = None,
    population: Population = 50,
    generations: Generations = 20,
    seed: Seed = 0,
    folder: Folder = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    r"""Find the best network within a budget among many that share weights (one-shot search).

    The networks differ in their layers at the places of --choice and in their exits. All are
    trained at once on DATA, and an evolution finds the most accurate one on --development. This
    network is written: train it further with `offramp fit`. Ctrl-C leaves everything in --folder,
    from which --resume goes on. See docs/how-to/search-for-a-cheaper-network.md.

    Example:
      offramp search offramp:resnet20 'cifar10/train:data' --weights r20.safetensors \
        --choice 'layer*.*=dense,ghost?ratio=2,narrow?by=2,skip' --at layer1,layer2 \
        --development 'cifar10:data[0:1000]' --unit ms --budget 0.5 --augment crop_flip \
        --folder search/ -o found/
      offramp fit found/ 'cifar10/train:data' --recipe joint -o trained/
    """
    from offramp.building.saving import FOLDER, save
    from offramp.designing.searching import TASK
    from offramp.designing.searching import search as found_by

    # 1. Check everything that will be written, before anything is read or trained.
    writable(output, folder=True)
    FOLDER.require_own(Path(output))
    require_apart(output, [weights, folder])
    if folder is not None:
        require_apart(folder, [output], way_out="Name another folder")

    # 2. Read the options.
    choices = {key: words(text) or [] for key, text in pairs(choice, "--choice").items()}
    module, before, spec = model_of(model, weights, preprocess)
    others = pairs(other_task, "--other-task")
    if TASK in others:
        raise InvalidArgument(f"--other-task must have another name than {TASK!r}, that of DATA")
    by_task: Mapping[str, object] = {TASK: data, **others}

    # 3. Train and search. After Ctrl-C both can go on from the folder.
    try:
        result = found_by(
            module,
            choices,
            by_task,
            development=development,
            budget=budget,
            limit=limit,
            unit=unit,
            task=task,
            at=words(at) or (),
            exit=exit_,
            head=head,
            preprocess=before,
            spec=spec,
            steps=steps,
            paths=paths,
            batch_size=batch_size,
            rate=rate,
            augment=augment,
            population=population,
            generations=generations,
            seed=seed,
            folder=folder,
            resume=resume,
        )
    except KeyboardInterrupt as problem:
        if folder:
            where = f"go on with --folder {folder} --resume"
        else:
            where = "nothing was written; with --folder it goes on"
        note(f"offramp: interrupted; {where}")
        raise typer.Exit(130) from problem

    # 4. Write the best network, and print the Pareto front.
    network = result.network(gate=gate)
    save(network, output)
    body: dict[str, Any] = {
        "output": output,
        "spec": network.members[0].spec,
        "fingerprint": network.fingerprint(),
        **result.to_json(),
    }
    heads = (f"{unit} a row", "of dense", "accuracy", "network")
    answer(
        body,
        as_json,
        str(result),
        "The Pareto front of the judged networks, on the development rows:",
        table(*heads, rows=result.rows()),
        f"Network, to be trained further with `offramp fit`: {output}",
    )
