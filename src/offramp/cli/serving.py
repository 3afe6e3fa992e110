"""`offramp run` and `offramp bench`: a network under a plan, on rows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import (
    AsJson,
    BatchSize,
    DataSpec,
    EngineName,
    Given,
    GivenFront,
    GivenGate,
    NetworkFolder,
    PlanFile,
    Threshold,
    network_of,
    plan_of,
    writable,
)
from offramp.cli.printing import answer, note, table

if TYPE_CHECKING:
    import numpy as np

    from offramp.data.rows import Rows
    from offramp.runtime.running import Runner

    Columns = dict[str, np.ndarray[Any, np.dtype[Any]]]

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FILE", help=".npz or .csv to write: row, answer, exit, why, flagged."),
]
Deadline = Annotated[
    float | None,
    typer.Option("--deadline-ms", metavar="MS", min=0, help="Start no segment that would end too late; no promise."),
]
Batches = Annotated[
    list[int] | None, typer.Option("--batch", metavar="N", min=1, help="Repeat it; by default 1 and 64.")
]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", min=5, help="Rounds; each times everything once.")]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="Of torch; by default its own choice.")
]

COLUMNS = ("row", "answer", "exit", "why", "flagged")


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
    front_of: GivenFront = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    """Answer rows under a plan.

    What is sure leaves early, and the rest of its batch goes on without it.

    Example:
      offramp run network/ plan.json 'cifar10:data[5000:10000]' -o answers.csv
    """
    from offramp._support.files import document_mark
    from offramp.data.rows import proposing, rows_for
    from offramp.runtime.session import open as opened

    table_mark = ",".join(COLUMNS[:3]).encode()
    writable(output, kinds={".npz": (document_mark("answers"), "answers"), ".csv": (table_mark, "table of answers")})
    chosen = plan_of(plan, threshold)
    net = network_of(network, model, front_of, gate_of)
    source = rows_for(net, data)
    with proposing(net.fronts.values()):
        some = None  # rows, where an engine compiles for them or a deadline needs times
        if deadline_ms is not None or (engine != "torch" and not source.one_pass):
            some = next(source.batches(batch_size)).x
        timed = None if deadline_ms is None else some
        runner = opened(net, chosen, engine=engine, time_on=timed, example=some)
        columns, seconds = _answers(runner, source, batch_size, deadline_ms)
    if output is not None:
        _write(output, columns, str(chosen))
    body = {"plan": str(chosen), "output": output, **_summary(runner, columns, seconds)}
    if late := body["why"].get("deadline"):
        note(f"{late:,} rows ran out of time; the plan's promise is not about answers under a deadline")
    if lost := body["why"].get("unavailable"):
        note(f"{lost:,} rows have an earlier exit's answer, because a member did not answer; no promise covers them")
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
    front_of: GivenFront = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    """Time a plan beside its bare parts and the plain network.

    Interleaved in one run, with the ratio of identical code beside it to show the noise; let nothing else
    run. At batch 1 there is a line for each exit at which one of the first 256 rows leaves.

    Example:
      offramp bench network/ plan.json 'cifar10:data[5000:10000]' --batch 1 --batch 64
    """
    import torch

    from offramp.data.rows import rows
    from offramp.runtime.benching import bench as timed

    if threads is not None:
        torch.set_num_threads(threads)
    sizes = tuple(batch or (1, 64))
    x = next(rows(data).batches(max(256, *sizes))).x
    net = network_of(network, model, front_of, gate_of)
    found = timed(net, plan_of(plan, threshold), x, batches=sizes, repeats=repeats, engine=engine)
    answer(found.to_json(), as_json, str(found))


def _answers(runner: Runner, source: Rows, size: int, deadline_ms: float | None) -> tuple[Columns, float]:
    """Columns over all rows, and the seconds that the network took for them."""
    import numpy as np

    from offramp._support.progress import track

    total = None if source.length is None else -(-source.length // size)
    chunks: list[Columns] = []
    seconds = 0.0
    for batch in track(source.batches(size), what="running", total=total, show=True):
        start = time.perf_counter()
        got = runner(batch.x, deadline_ms=deadline_ms)
        seconds += time.perf_counter() - start
        names = np.array(got.exits)
        chunk = {
            "row": batch.row,
            "answer": got.logits.argmax(1).cpu().numpy(),
            "exit": names[got.exit.cpu().numpy()],
            "why": np.array(got.reasons()),
            "flagged": got.flagged.cpu().numpy(),
        }
        chunks.append(chunk if batch.y is None else {**chunk, "label": batch.y})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}, seconds


def _summary(runner: Runner, columns: Columns, seconds: float) -> dict[str, Any]:
    count = len(columns["row"])
    label, why = columns.get("label"), columns["why"]
    return {
        "rows": count,
        "shares": {name: float((columns["exit"] == name).mean()) for name in runner.chain.exits},
        "why": {reason: int((why == reason).sum()) for reason in sorted(set(why.tolist()))},
        "flagged": int(columns["flagged"].sum()),
        "accuracy": None if label is None else float((columns["answer"] == label).mean()),
        "seconds": seconds,
        "rows_per_second": count / seconds,
    }


def _shown(body: dict[str, Any]) -> list[object]:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in body["why"].items())
    lines = [f"{body['rows']:,} rows at {body['rows_per_second']:,.0f} rows per second; why: {reasons}"]
    lines += [] if body["accuracy"] is None else [f"accuracy {body['accuracy']:.2%}"]
    lines += [f"{body['flagged']:,} rows flagged: a score or an answer was not finite"] if body["flagged"] else []
    lines += [f"written to {body['output']}"] if body["output"] else []
    return [table("leave at", "share", rows=[(n, f"{s:.1%}") for n, s in body["shares"].items()]), *lines]


def _write(output: str, columns: Columns, plan: str) -> None:
    from offramp._support.files import to_document, write_arrays, write_csv

    if Path(output).suffix == ".npz":
        told = {name: columns[name] for name in COLUMNS}
        write_arrays(output, to_document("answers", 1, {"plan": plan}), told)
        return
    rows = zip(*(columns[name].tolist() for name in COLUMNS), strict=True)
    write_csv(output, COLUMNS, rows, what="table of answers")
