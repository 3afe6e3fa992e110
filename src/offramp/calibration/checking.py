"""Whether the promise of a plan holds on other rows. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offramp._support.arguments import percentage, require, require_flag, require_kind
from offramp.calibration.rows import Selected, independent_rows
from offramp.errors import InvalidArgument
from offramp.guarantees.risks import Risk, find_risk
from offramp.plans.evaluation import Evaluation, Measured
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        word: "holds" (the interval is at or below the level), "broken" (above it), "undecided"
            (around it), or "no promise".
        sentence: the same in a sentence.
        level: the checked level; None where there is none.
        evaluation: all figures.
        dropped: how many rows were left out because the network or the plan was made from them.
        repeated: how many rows have the content of another one. They are left out under
            repeats="once", and counted otherwise.
    """

    word: str
    sentence: str
    level: float | None
    evaluation: Evaluation
    dropped: int = 0
    repeated: int = 0

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Verdict: {self}>"

    def __str__(self) -> str:
        return f"{self.evaluation}\n{self.sentence}"


def check(
    plan: Plan,
    trace: Trace,
    *,
    risk: str | Risk | None = None,
    at_most: float | None = None,
    confidence: float | None = None,
    repeats: str | None = None,
    drop_seen: bool = False,
    same_rows: bool = False,
) -> Verdict:
    """Measure a plan on rows that it was not made from, and compare the risk with a level.

    Args:
        plan: with a promise, or any other one if `at_most` is given.
        trace: rows of the same network, drawn independently.
        risk: by default that of the promise.
        at_most: the level; by default that of the promise, which is for the promised risk only.
        confidence: of the interval; by default that of the promise, or 0.95.
        repeats: how to count rows of equal content, as in `calibrate`. Under "once" rows that the
            plan was made from were counted already, and are left out.
        drop_seen: leave out rows that the network or the plan was made from, instead of refusing
            them.
        same_rows: allow these rows. They prove nothing.

    Returns:
        The verdict with all figures.

    Raises:
        OverlappingRows: rows repeat or were used before, and no argument allows it.
        InvalidArgument: an argument is not allowed, or no row is left.
        Mismatch: the plan belongs to another network, engine or precision.
    """
    require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
    require_kind("the trace", trace, Trace, "from record or Trace.load")
    drop_seen = require_flag("drop_seen", drop_seen)
    same_rows = require_flag("same_rows", same_rows)
    promise = plan.promise
    trace.check(plan)
    if confidence is None:
        confidence = 0.95
        if promise is not None:
            confidence = promise.confidence
    level = at_most
    if promise is not None and at_most is None:
        level = promise.at_most
        if risk is not None:
            checked = find_risk(risk)
            if checked.name != promise.risk:
                raise InvalidArgument(
                    f"at_most must be given if another risk is checked than the promised one: the "
                    f"level {promise.at_most:.12g} is of {promise.risk}, not of {checked.name}"
                )
    selected = _rows(plan, trace, repeats, drop_seen, same_rows)
    # repeats were handled when the rows were selected: all that are left count
    evaluation = selected.trace.evaluate(
        plan, risk=risk, confidence=confidence, repeats=None if same_rows else "independent"
    )
    if at_most is not None:
        # without a risk, the one that was measured by default
        checked = find_risk(risk if risk is not None else evaluation.risk.risk)
        level = require(
            f"at_most (a level of {checked.name})", at_most, low=checked.low, below=checked.high
        )
    word, sentence = verdict(evaluation.risk, level)
    return Verdict(word, sentence, level, evaluation, selected.dropped, selected.repeated)


def _rows(
    plan: Plan, trace: Trace, repeats: str | None, drop_seen: bool, same_rows: bool
) -> Selected:
    """The rows that count."""
    if same_rows:
        return Selected(trace, 0, 0)
    return independent_rows(
        trace, repeats=repeats, drop_seen=drop_seen, what="test", seen=plan.rows
    )


def verdict(risk: Measured, level: float | None) -> tuple[str, str]:
    """Compare an interval with a level.

    Args:
        risk: measured on rows.
        level: or None if there is no promise.

    Returns:
        A word and a sentence: the interval is below the level, above it, or around it.
    """
    if level is None:
        return (
            "no promise",
            "The plan carries no promise that these rows could break; --at-most names a level.",
        )
    interval = f"{percentage(risk.confidence)} interval {risk.low:.4f} to {risk.high:.4f}"
    measured = f"{risk.risk} is {risk.value:.4f} ({interval})"
    if risk.low > level:
        return "broken", f"BROKEN: {measured}, all of it above the level {level:.12g}."
    if risk.high <= level:
        return "holds", f"It holds: {measured}, all of it at or below the level {level:.12g}."
    side = "below" if risk.value <= level else "above"
    return (
        "undecided",
        f"These rows cannot tell: {measured}, {side} the level {level:.12g}, but the interval "
        f"holds both.",
    )


def told(verdict_: Verdict) -> dict[str, Any]:
    """A verdict as plain data."""
    body = {"verdict": verdict_.word, "sentence": verdict_.sentence, "level": verdict_.level}
    rows = {"dropped": verdict_.dropped, "repeated": verdict_.repeated}
    return {**body, **verdict_.evaluation.to_json(), **rows}
