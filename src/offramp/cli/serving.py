"""`offramp run` and `offramp bench`: a network under a plan, on rows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from offramp.cli.options import (
    AsJson,
    BatchSize,
    DataSpec,
    EngineName,
    Given,
    GivenGate,
    GivenPreprocess,
    NetworkFolder,
    PlanFile,
    Threshold,
    network_of,
    plan_of,
    writable,
)
from offramp.cli.printing import answer, note, table

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help=".npz or .csv to write: row, answer, exit, why, flagged.",
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline-ms",
        metavar="MS",
        min=0,
        help="Start no segment that would end too late; no promise.",
    ),
]
Batches = Annotated[
    list[int] | None,
    typer.Option("--batch", metavar="N", min=1, help="Repeat it; by default 1 and 64."),
]
Repeats = Annotated[
    int, typer.Option("--repeats", metavar="N", min=5, help="Rounds; each times everything once.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help="Of torch; by default its own choice."),
]


def run(
    network: NetworkFolder,
    plan: PlanFile,
    data: DataSpec,
    output: Output = None,
    batch_size: BatchSize = 64,
    deadline_ms: Deadline = None,
    engine: EngineName = "torch",
    threshold: Threshold = None,
    model: Given = None,
    preprocess_of: GivenPreprocess = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    """Answer rows under a plan.

    What is sure leaves early, and the rest of its batch goes on without it.

    Example:
      offramp run network/ plan.json 'cifar10:data[5000:10000]' -o answers.csv
    """
    from offramp.runtime.answering import MARKS, answer_rows

    writable(output, kinds=MARKS)
    chosen = plan_of(plan, threshold)
    net = network_of(network, model, preprocess_of, gate_of)
    answers = answer_rows(
        net, chosen, data, batch_size=batch_size, deadline_ms=deadline_ms, engine=engine
    )
    if output is not None:
        answers.save(output)
    # Rows that did not follow the plan are outside of its promise.
    reasons = answers.reasons()
    late = reasons.get("deadline", 0)
    if late:
        note(f"{late:,} rows ran out of time; the plan's promise does not cover a deadline")
    lost = reasons.get("unavailable", 0)
    if lost:
        note(
            f"{lost:,} rows have an earlier exit's answer, because a member did not answer; the "
            "plan's promise does not cover them"
        )
    body = {"plan": str(chosen), "output": output, **answers.to_json()}
    answer(body, as_json, f"{chosen}", *_shown(body))


def bench(
    network: NetworkFolder,
    plan: PlanFile,
    data: DataSpec,
    batch: Batches = None,
    repeats: Repeats = 9,
    threads: Threads = None,
    engine: EngineName = "torch",
    threshold: Threshold = None,
    model: Given = None,
    preprocess_of: GivenPreprocess = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    """Time a plan beside its bare parts and the plain network.

    Interleaved in one run, with the ratio of identical code beside it to show the noise; let
    nothing else run. At batch 1 there is a line for each exit at which one of the first 256 rows
    leaves.

    Example:
      offramp bench network/ plan.json 'cifar10:data[5000:10000]' --batch 1 --batch 64
    """
    from offramp.data.rows import rows
    from offramp.runtime.benching import bench as timed

    # Enough rows to find one that leaves at each exit.
    sizes = tuple(batch or (1, 64))
    x = next(rows(data).batches(max(256, *sizes))).x
    net = network_of(network, model, preprocess_of, gate_of)
    chosen = plan_of(plan, threshold)
    report = timed(net, chosen, x, batches=sizes, repeats=repeats, threads=threads, engine=engine)
    answer(report.to_json(), as_json, str(report))


def _shown(body: dict[str, Any]) -> list[object]:
    """The result of `run` for people: a table of the exits, and lines of text."""
    cells = []
    for name, share in body["shares"].items():
        cells.append((name, f"{share:.1%}"))
    reasons = []
    for reason, count in body["why"].items():
        reasons.append(f"{count:,} {reason}")
    speed = f"{body['rows']:,} rows at {body['rows_per_second']:,.0f} rows per second"
    lines = [f"{speed}; why: {', '.join(reasons)}"]
    if body["accuracy"] is not None:
        lines.append(f"accuracy {body['accuracy']:.2%}")
    if body["flagged"]:
        lines.append(f"{body['flagged']:,} rows flagged: a score or an answer was not finite")
    if body["output"]:
        lines.append(f"written to {body['output']}")
    return [table("leave at", "share", rows=cells), *lines]
