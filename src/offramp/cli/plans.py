"""`offramp calibrate` and `offramp check`: make a plan from a trace, and test its promise on other
rows. Without torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp._support.arguments import percentage
from offramp.cli.options import (
    AsJson,
    DropSeen,
    PlanFile,
    Repeats,
    RiskName,
    RowRange,
    Threshold,
    TraceFile,
    plan_of,
    risk_of,
    trace_of,
    writable,
)
from offramp.cli.printing import answer, note, table
from offramp.errors import InvalidArgument

if TYPE_CHECKING:
    from offramp.plans.plan import Plan

SomeTrace = Annotated[
    str | None, typer.Argument(metavar="TRACE", help="File written by `offramp record`.")
]
PlanOutput = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="The .json to write; without it, only print."
    ),
]
AtMost = Annotated[
    float | None,
    typer.Option("--at-most", metavar="LEVEL", help="Promise that the risk is <= LEVEL."),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="Best plan at this share of the plain network's cost; no promise.",
    ),
]
Confidence = Annotated[
    float, typer.Option("--confidence", metavar="P", help="It fails with at most 1 minus this.")
]
Reference = Annotated[
    str,
    typer.Option(
        "--reference",
        metavar="EXIT",
        help="What the risk compares with: last, backbone, or an exit.",
    ),
]
Unit = Annotated[
    str | None,
    typer.Option(
        "--unit",
        metavar="macs|ms",
        help="The cost to save; by default MACs where they are known, else ms.",
    ),
]
Batch = Annotated[
    int,
    typer.Option("--batch", metavar="N", min=1, help="The batch size that milliseconds are for."),
]
BoundName = Annotated[
    str | None,
    typer.Option(
        "--bound",
        metavar="BOUND",
        help="binomial, betting or hoeffding_bentkus; by default what fits.",
    ),
]
Testing = Annotated[
    str,
    typer.Option(
        "--testing",
        metavar="path|pareto",
        help="One shared threshold, or candidates searched apart.",
    ),
]
Search = Annotated[
    str | None,
    typer.Option(
        "--search", metavar="TRACE", help="Search these rows (Pareto), certify on all of TRACE."
    ),
]
MaxExit = Annotated[
    str | None,
    typer.Option(
        "--max-exit", metavar="EXIT", help="Answer here whatever arrives: caps the worst case."
    ),
]
HowMany = Annotated[
    float | None,
    typer.Option(
        "--how-many",
        metavar="LEVEL",
        help="Print how many rows a promise at this level needs; no TRACE.",
    ),
]
Level = Annotated[
    float | None,
    typer.Option(
        "--at-most", metavar="LEVEL", help="The level to check; by default the promised one."
    ),
]
CheckConfidence = Annotated[
    float | None,
    typer.Option(
        "--confidence", metavar="P", help="Of the interval; by default the promise's, or 0.95."
    ),
]
SameRows = Annotated[
    bool,
    typer.Option("--same-rows", help="Allow rows that the plan was made from; they prove nothing."),
]


def calibrate(
    trace: SomeTrace = None,
    output: PlanOutput = None,
    risk: RiskName = None,
    at_most: AtMost = None,
    confidence: Confidence = 0.95,
    budget: Budget = None,
    reference: Reference = "last",
    unit: Unit = None,
    batch: Batch = 64,
    bound: BoundName = None,
    testing: Testing = "path",
    search: Search = None,
    max_exit: MaxExit = None,
    rows: RowRange = None,
    repeats: Repeats = None,
    drop_seen: DropSeen = False,
    how_many: HowMany = None,
    as_json: AsJson = False,
) -> None:
    """Choose the cheapest plan that keeps a promise, or the best within a budget.

    Rows must be independent draws: rows that repeat are refused until you say what they are.
    Exit code 2 when no plan keeps the promise on these rows; the message names the smallest level
    in sight.

    Example:
      offramp calibrate trace.npz --risk accuracy_gap --at-most 0.005 -o plan.json
      offramp calibrate --how-many 0.01
    """
    # 1. --how-many is about rows that do not exist yet, so it takes no trace.
    if how_many is not None:
        _how_many(how_many, confidence, trace, at_most, budget, as_json)
        return
    if trace is None:
        raise InvalidArgument(
            "TRACE must be a file written by offramp record, got none. Without one use --how-many "
            "LEVEL"
        )
    if (at_most is None) == (budget is None):
        raise InvalidArgument("exactly one of --at-most LEVEL and --budget SHARE must be given")
    from offramp._support.files import document_mark
    from offramp.calibration.calibrating import calibrate as calibrated

    # 2. Read the trace, and calibrate on it.
    writable(output, kinds={".json": (document_mark("plan"), "plan")})
    recorded = trace_of(trace, rows)
    search_trace = None
    if search is not None:
        search_trace = trace_of(search, None)
    with _flags_named():
        plan = calibrated(
            recorded,
            risk=risk_of(risk),
            at_most=at_most,
            confidence=confidence,
            budget=budget,
            reference=reference,
            unit=unit,
            batch=batch,
            bound=bound,
            testing=testing,
            search=search_trace,
            max_exit=max_exit,
            repeats=repeats,
            drop_seen=drop_seen,
        )

    # 3. Note the rows that did not count, and write the plan.
    if drop_seen:
        count = 0
        training_rows = recorded.columns.get("learned")
        if training_rows is not None:
            count = int(training_rows.sum())
        note(f"{count:,} rows that trained the network were left out")
    _save(plan, output)
    answer({"output": output, **_body(plan)}, as_json, str(plan))


def check(
    plan: PlanFile,
    trace: TraceFile,
    risk: RiskName = None,
    at_most: Level = None,
    confidence: CheckConfidence = None,
    rows: RowRange = None,
    repeats: Repeats = None,
    drop_seen: DropSeen = False,
    same_rows: SameRows = False,
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """Does the promise hold on my rows?

    Measures a plan on a trace of rows that it was not made from, with an interval for the risk.
    Exit code 0 when it holds or these rows cannot tell, 1 when it is broken, 2 for bad input.

    Example:
      offramp check plan.json test.npz
    """
    from offramp.calibration.checking import check as checked
    from offramp.calibration.checking import told

    with _flags_named():
        result = checked(
            plan_of(plan, threshold),
            trace_of(trace, rows),
            risk=risk_of(risk),
            at_most=at_most,
            confidence=confidence,
            repeats=repeats,
            drop_seen=drop_seen,
            same_rows=same_rows,
        )
    # Rows that were left out, or that are no independent draws, weaken the result.
    if drop_seen or result.dropped:
        note(f"{result.dropped:,} rows that had a part in the network or the plan were left out")
    if result.repeated:
        treatment = "count as independent draws"
        if repeats == "once":
            treatment = "were left out"
        note(f"{result.repeated:,} rows have the content of others and {treatment}")
    answer(told(result), as_json, str(result.evaluation), result.sentence)
    # Scripts can test for a broken promise by the exit code.
    if result.word == "broken":
        raise typer.Exit(1)


@contextlib.contextmanager
def _flags_named() -> Iterator[None]:
    """Replace Python's arguments by the flags of the command line in the text of errors."""
    try:
        yield
    except InvalidArgument as problem:
        # `drop_seen=True` and `repeats='once'` are arguments of Python.
        text = str(problem).replace("drop_seen=True", "--drop-seen")
        for word in ("once", "independent"):
            text = text.replace(f"repeats='{word}'", f"--repeats {word}")
        problem.args = (text,)
        raise


def _how_many(
    level: float,
    confidence: float,
    trace: str | None,
    at_most: float | None,
    budget: float | None,
    as_json: bool,
) -> None:
    """Print the numbers of rows that certify a level."""
    from offramp.guarantees.bounds import rows_by_observed

    if trace is not None or at_most is not None or budget is not None:
        raise InvalidArgument(
            "--how-many must be given alone, without TRACE, --at-most and --budget"
        )
    listed = []
    cells = []
    for observed, count in rows_by_observed(level, confidence).items():
        listed.append({"observed": observed, "rows": count})
        cells.append((f"{observed:.4g}", f"{count:,}"))
    body = {"level": level, "confidence": confidence, "rows": listed}
    head = (
        f"Rows that certify a 0/1 risk <= {level:.12g} with {percentage(confidence)} confidence "
        "(exact binomial bound)"
    )
    answer(body, as_json, head, table("observed risk", "rows", rows=cells))


def _save(plan: Plan, output: str | None) -> None:
    """Write the plan, or note that it is not written."""
    if output is None:
        note("not saved; -o plan.json writes it")
    else:
        plan.save(output)


def _body(plan: Plan) -> dict[str, Any]:
    """The main entries of a plan as plain data; its file has the rest."""
    saved = json.loads(plan.to_json())
    body: dict[str, Any] = {}
    for key in ("sentence", "thresholds", "deepest", "promise", "price"):
        body[key] = saved[key]
    body["rows"] = None
    if plan.rows is not None:
        body["rows"] = {"data": plan.rows.data, "count": int(plan.rows.digests.size)}
    return body
