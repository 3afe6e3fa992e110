"""`offramp report`: write one HTML page about a plan on a trace. Without torch."""

from __future__ import annotations

from typing import Annotated

import typer

from offramp._support.arguments import pairs
from offramp.cli.options import (
    AsJson,
    PlanFile,
    RowRange,
    Threshold,
    TraceFile,
    plan_of,
    trace_of,
    writable,
)
from offramp.cli.printing import answer

Output = Annotated[
    str, typer.Option("--output", "-o", metavar="FILE", help="The .html file to write.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="The rows that were recorded, for a gallery of real inputs."
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--other", metavar="NAME=PLAN", help="Another plan of this network to mark on the frontier."
    ),
]
Title = Annotated[
    str | None, typer.Option("--title", metavar="TEXT", help="The title of the page.")
]


def report(
    trace: TraceFile,
    plan: PlanFile,
    output: Output = "report.html",
    data: Data = None,
    title: Title = None,
    other: Others = None,
    rows: RowRange = None,
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page.

    It shows what the plan saves, what it risks, and which inputs leave where.

    Example:
      offramp report test.npz plan.json --data 'cifar10:data[5000:10000]' -o report.html
    """
    from offramp.reporting.frame import MARK
    from offramp.reporting.page import report as written

    writable(output, kinds=dict.fromkeys((".html", ".htm"), (MARK, "page")))
    others = {name: plan_of(path, None) for name, path in pairs(other, "--other").items()}
    chosen = plan_of(plan, threshold)
    page = written(trace_of(trace, rows), chosen, output, data=data, others=others, title=title)
    answer({"report": page}, as_json, str(page))
