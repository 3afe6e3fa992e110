"""`offramp record`: run a network on rows, and write a trace."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from offramp._support.arguments import words
from offramp.cli.options import (
    AsJson,
    BatchSize,
    DataSpec,
    EngineName,
    Given,
    GivenGate,
    GivenPreprocess,
    NetworkFolder,
    network_of,
    writable,
)
from offramp.cli.printing import answer, main_process, table
from offramp.errors import InvalidArgument

Output = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="The .npz file to write.")
]
Keep = Annotated[
    str,
    typer.Option(
        "--keep", metavar="logits|answers", help="answers leaves the logits out: a smaller file."
    ),
]
KeepProbeRows = Annotated[
    bool,
    typer.Option(
        "--keep-probe-rows",
        help="Put up to 16 of the rows into the file, to compare networks on them.",
    ),
]
Settings = Annotated[
    str | None,
    typer.Option(
        "--settings",
        metavar="A,B",
        help="Of a network with more than sixteen paths: thresholds that all of its gates share, "
        "from the largest down, such as 1,0.5,0.",
    ),
]
Timed = Annotated[
    bool,
    typer.Option(
        "--timed/--no-timed",
        help="Measure milliseconds beside multiply-adds (MACs).",
        show_default=False,
    ),
]


def record(
    network: NetworkFolder,
    data: DataSpec,
    output: Output,
    batch_size: BatchSize = 64,
    keep: Keep = "logits",
    timed: Timed = True,
    keep_probe_rows: KeepProbeRows = False,
    engine: EngineName = "torch",
    settings: Settings = None,
    model: Given = None,
    preprocess_of: GivenPreprocess = None,
    gate_of: GivenGate = None,
    as_json: AsJson = False,
) -> None:
    """Run every exit on every row and write down the results.

    A trace has the scores, answers and costs that `calibrate` needs. Milliseconds are measured
    during the run, so let nothing else run. Use rows that trained none of the models.
    In a network with forks every path is recorded, if there are at most sixteen. Otherwise it is
    recorded at settings of one threshold, and a plan is one of these settings.

    Example:
      offramp record network/ 'cifar10:data[1000:5000]' -o trace.npz
    """
    from offramp._support.files import document_mark
    from offramp.plans.evaluation import exits_alone
    from offramp.runtime.recording import record as recorded

    writable(output, kinds={".npz": (document_mark("trace"), "trace")})
    net = network_of(network, model, preprocess_of, gate_of)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "keep": keep,
        "keep_probe_rows": keep_probe_rows,
    }
    if settings is not None:
        options["settings"] = _numbers(settings)
    trace = recorded(net, data, timed=timed, engine=engine, **options)
    # Of several processes only one writes.
    if main_process():
        trace.save(output)
    exits = [exit_.to_json() for exit_ in exits_alone(trace)]
    body = {
        "trace": output,
        "rows": len(trace),
        "data": trace.header.data,
        "labelled": trace.labels is not None,
        "network": trace.header.origin.network,
        "exits": exits,
    }
    drawn = table("exit", "accuracy", "MACs alone", "ms per row alone, batch 64", rows=_rows(exits))
    answer(body, as_json, f"{trace}: {output}", drawn)


def _numbers(settings: str) -> list[float]:
    """The settings of a dial as they were typed. Raises InvalidArgument."""
    values = []
    for word in words(settings) or ():
        try:
            values.append(float(word))
        except ValueError as problem:
            raise InvalidArgument(
                f"--settings must be numbers, such as 1,0.5,0, got {settings}"
            ) from problem
    return values


def _rows(exits: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table of the exits, a row each."""
    rows: list[tuple[str, ...]] = []
    for exit_ in exits:
        accuracy = _cell(exit_["accuracy"], ".2%")
        macs = _cell(exit_["macs"], ",.0f")
        milliseconds = _cell(exit_["ms_64"], ".4f")
        rows.append((exit_["exit"], accuracy, macs, milliseconds))
    return rows


def _cell(value: float | None, form: str) -> str:
    """A figure, or a dash if it is not known."""
    if value is None:
        return "-"
    return format(value, form)
