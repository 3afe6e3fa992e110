"""Whether the promise of a plan holds on other rows. No torch."""

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
    """What rows say about a level.

    Attributes:
        word: "holds" (the interval lies at or below the level), "broken" (above it), "undecided"
            (around it), or "no promise".
        sentence: the same in a sentence.
        level: that was checked; None where there is none.
        evaluation: everything that was measured.
        dropped: rows that were left out because they had a part in the network or the plan.
        repeated: rows that have the content of another one: left out under repeats="once", else
            counted.
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
        plan: with a promise, or any other one if `at_most` names a level.
        trace: rows of the same network, drawn independently.
        risk: by default the promise's.
        at_most: the level; by default the promised one, which counts for the promised risk alone.
        confidence: of the interval; by default the promise's, or 0.95.
        repeats: what rows of equal content are, as in `calibrate`. Under "once" rows that the plan
            was made from have counted already, and are left out.
        drop_seen: leave out rows that trained the network or made the plan, instead of refusing
            them.
        same_rows: take such rows all the same; they prove nothing.

    Raises:
        OverlappingRows: rows repeat, or had a part in the network or the plan, and nothing was said
            about it.
        InvalidArgument: an argument is not what it must be, or no row is left.
        Mismatch: the plan belongs to another network, engine or precision.
    """
    require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
    require_kind("the trace", trace, Trace, "from record or Trace.load")
    drop_seen = require_flag("drop_seen", drop_seen)
    same_rows = require_flag("same_rows", same_rows)
    promise = plan.promise
    trace.check(plan)
    if confidence is None:
        confidence = promise.confidence if promise else 0.95
    level = promise.at_most if promise and at_most is None else at_most
    if promise is not None and at_most is None and risk is not None:
        asked = find_risk(risk)
        if asked.name != promise.risk:
            raise InvalidArgument(
                f"at_most must be given where another risk is checked than the promised one: the "
                f"level "
                f"{promise.at_most:.12g} is of {promise.risk}, not of {asked.name}"
            )
    selected = _rows(plan, trace, repeats, drop_seen, same_rows)
    found = selected.trace.evaluate(
        plan, risk=risk, confidence=confidence, repeats=None if same_rows else "independent"
    )
    if level is not None and at_most is not None:
        asked = find_risk(risk if risk is not None else found.risk.risk)
        level = require(
            f"at_most (a level of {asked.name})", at_most, low=asked.low, below=asked.high
        )
    word, sentence = verdict(found.risk, level)
    return Verdict(word, sentence, level, found, selected.dropped, selected.repeated)


def _rows(
    plan: Plan, trace: Trace, repeats: str | None, drop_seen: bool, same_rows: bool
) -> Selected:
    if same_rows:
        return Selected(trace, 0, 0)
    return independent_rows(
        trace, repeats=repeats, drop_seen=drop_seen, what="test", seen=plan.rows
    )


def verdict(risk: Measured, level: float | None) -> tuple[str, str]:
    """A word and a sentence: the interval lies below the level, above it, or around it."""
    if level is None:
        return (
            "no promise",
            "The plan carries no promise that these rows could break; --at-most names a level.",
        )
    sure = f"{percentage(risk.confidence)} interval"
    said = f"{risk.risk} is {risk.value:.4f} ({sure} {risk.low:.4f} to {risk.high:.4f})"
    if risk.low > level:
        return "broken", f"BROKEN: {said}, all of it above the level {level:.12g}."
    if risk.high <= level:
        return "holds", f"It holds: {said}, all of it at or below the level {level:.12g}."
    side = "below" if risk.value <= level else "above"
    return (
        "undecided",
        f"These rows cannot tell: {said}, {side} the level {level:.12g}, but the interval holds "
        f"both.",
    )


def told(verdict_: Verdict) -> dict[str, Any]:
    """A verdict as plain data."""
    body = {"verdict": verdict_.word, "sentence": verdict_.sentence, "level": verdict_.level}
    rows = {"dropped": verdict_.dropped, "repeated": verdict_.repeated}
    return {**body, **verdict_.evaluation.to_json(), **rows}
