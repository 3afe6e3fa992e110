"""`offramp export`: write a network and its plan into a folder that runs elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.cli.options import (
    AsJson,
    Given,
    GivenGate,
    GivenPreprocess,
    NetworkFolder,
    OutputFolder,
    PlanFile,
    Threshold,
    network_of,
    plan_of,
    require_apart,
    writable,
)
from offramp.cli.printing import answer

OneFile = Annotated[
    bool,
    typer.Option("--one-file", help="All graphs as one: compaction inside, thresholds as inputs."),
]
Example = Annotated[
    str | None,
    typer.Option(
        "--example",
        metavar="DATA",
        help="Rows to try it on, if neither plan nor cut has seen any.",
    ),
]


def export(
    network: NetworkFolder,
    plan: PlanFile,
    output: OutputFolder,
    one_file: OneFile = False,
    example: Example = None,
    threshold: Threshold = None,
    model: Given = None,
    preprocess_of: GivenPreprocess = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    """Write a folder that answers without offramp and torch.

    The folder has a graph for each stage of the plan, the plan, a manifest and run.py, which needs
    NumPy and ONNX Runtime. Every graph is compared with the network first. A promise is exported
    if it was made with --engine onnxruntime.

    Example:
      offramp export network/ plan.json -o folder/
    """
    from offramp.data.rows import rows
    from offramp.deploy.exporting import FOLDER
    from offramp.deploy.exporting import export as exported

    # Check the output first, before anything is loaded.
    writable(output, folder=True)
    FOLDER.require_own(Path(output))
    require_apart(output, [network, plan])
    chosen = plan_of(plan, threshold)
    batch = None
    if example is not None:
        batch = next(rows(example).batches(4)).x
    folder = exported(
        network_of(network, model, preprocess_of, gate_of),
        chosen,
        output,
        example=batch,
        one_file=one_file,
    )
    body: dict[str, Any] = asdict(folder)
    del body["plan"]
    body["plan"] = str(folder.plan)  # in words, and last
    body["promised"] = folder.plan.promise is not None
    answer(body, as_json, str(folder))
