"""From a trace to a plan: by promise (certified), or by budget (best on its rows, and it says so)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.arguments import percentage, require_number
from offramp.calibration.candidates import (
    distinct,
    in_order,
    off_scores,
    shared_path,
    spread,
    trade_offs,
    worst_losses,
)
from offramp.calibration.members import warn_of_order
from offramp.calibration.rows import Selected, independent_rows, searched_and_certified, unseen_rows
from offramp.calibration.search import Problem, best, evaluate
from offramp.draws import order_of, require_repeats
from offramp.errors import BadInput, Mismatch, NoSafePlan, OutOfBudget
from offramp.guarantees.bounds import Bound, find_bound, rows_needed, smallest_level
from offramp.guarantees.risks import Risk, find_risk
from offramp.guarantees.testing import fixed_sequence
from offramp.plan import Plan, Promise
from offramp.trace import Trace

TESTING = ("path", "pareto")
SEARCH_SHARE = 0.4  # of the rows, for Pareto testing without search rows of its own
POINTS = 100  # candidates of Pareto testing
CHUNK = 256  # plans tested at a time; fixed-sequence testing stops at the first that fails

Array = np.ndarray[Any, np.dtype[Any]]


def calibrate(
    trace: Trace,
    *,
    risk: str | Risk | None = None,
    at_most: float | None = None,
    confidence: float = 0.95,
    budget: float | None = None,
    against: str = "last",
    unit: str = "macs",
    batch: int = 64,
    bound: str | None = None,
    testing: str = "path",
    search: Trace | None = None,
    deepest: str | None = None,
    repeats: str | None = None,
    drop_seen: bool = False,
) -> Plan:
    """The cheapest plan with `risk <= at_most` at `confidence`, or the best one with mean cost <= `budget`.

    Args:
        trace: the rows that test the plan, as `record` gives them. They must be independent draws.
        risk: "disagreement" (default; needs no labels), "accuracy_gap", "error", or a Risk.
        at_most: the level of the promise, in the unit of the risk (0.01 is one answer in a hundred).
        confidence: of the promise, above 0 and below 1.
        budget: a share of the plain network's cost, instead of `at_most`; such a plan carries no promise.
        against: what the risk compares with: "last", "backbone", or an exit.
        unit: the cost to save, "macs" or "ms".
        batch: the batch size that milliseconds are for.
        bound: "binomial", "betting" or "hoeffding_bentkus"; by default the one that fits the risk.
        testing: "path" walks one shared threshold down a grid that was fixed beforehand, over all rows (valid: see
            guarantees.testing.fixed_sequence). "pareto" (Laufer-Goldshtein et al., 2023, arXiv 2210.07913) searches
            candidates on some rows and tests them on the others.
        search: a trace of rows to search on; then all rows of `trace` are tested, by "pareto".
        deepest: an exit that answers whatever arrives there.
        repeats: what rows of equal content are. None refuses them; "independent" says that each was drawn on its own,
            and all count; "once" counts one of each, a promise about distinct rows. Rows of equal number are the same
            row, and always refused.
        drop_seen: leave out rows that taught the network, instead of refusing them.

    Returns:
        A plan. Its promise says on how many rows it was tested, and what was decided about repeats. The order in which
        a betting bound meets the rows is derived from their contents (`draws.order_of`).

    Raises:
        NoSafePlan: no plan keeps the promise on these rows.
        OverlappingRows: rows repeat, taught the network, or are searched and tested.
        BadInput: two aims or none, or an argument that is not what it must be.
        UnknownName: a risk, bound or exit of that name does not exist.
    """
    if not isinstance(trace, Trace):
        raise BadInput(f"trace must be a Trace, got a {type(trace).__name__}; Trace.load reads one from a file")
    if (at_most is None) == (budget is None):
        got = "neither" if at_most is None else "both"
        raise BadInput(f"calibrate needs exactly one of at_most (a promise) and budget (no promise), got {got}")
    if not trace.header.taught:
        raise BadInput("an exit of this network was never taught; teach it and record again")
    require_repeats(repeats)
    if budget is not None:
        share = require_number("budget", budget, 0, math.inf)
        rows, _ = unseen_rows(trace, drop_seen=drop_seen, what="calibration")  # no promise: repeats do no harm
        warn_of_order(trace, unit, batch)
        return _by_budget(rows, risk, share, against, unit, batch, deepest)
    asked = find_risk(risk or "disagreement")
    level = require_number(f"at_most (a level of {asked.name})", at_most, asked.low, asked.high, includes_low=True)
    confidence = require_number("confidence", confidence, 0, 1)
    if testing not in TESTING:
        raise BadInput(f"testing is {testing!r}, expected one of {', '.join(TESTING)}")
    test = _Test(asked, level, confidence, find_bound(bound, asked), against, unit, batch, deepest)
    kept = independent_rows(trace, repeats=repeats, drop_seen=drop_seen, what="calibration")
    warn_of_order(trace, unit, batch)
    return _by_promise(kept, test, repeats, "pareto" if search is not None else testing, search)


@dataclass(frozen=True)
class _Test:
    """What is asked of a plan, and how it is tested."""

    risk: Risk
    at_most: float
    confidence: float
    bound: Bound
    against: str
    unit: str
    batch: int
    deepest: str | None

    @property
    def delta(self) -> float:
        """How likely the promise may fail."""
        return 1 - self.confidence

    def candidates(self, searched: Trace | None, certified: Trace) -> Array:
        """Thresholds [P, G] in the order of testing, the safest first."""
        if searched is None:
            scores = certified.scores[:, : _width(certified, self.deepest) - 1]
            return spread(distinct(shared_path(), scores, certified.header.origin.band), scores.shape[1])
        problem = problem_of(searched, self.risk, self.against, self.unit, self.batch, self.deepest)
        thresholds = trade_offs(problem, POINTS)
        p_P = self._p_values(problem, thresholds, order_of(searched.columns))
        ordered: Array = thresholds[in_order(p_P, evaluate(problem, thresholds)[1])]
        return ordered

    def passed(self, trace: Trace, thresholds_PG: Array) -> Array:
        """The leading candidates that are safe, as thresholds; that none of its rows leaves is no plan to speak of."""
        problem, thresholds_PG = self._problem(trace), self._sequence(trace, thresholds_PG)
        order, count = order_of(trace.columns), 0
        for start in range(0, len(thresholds_PG), CHUNK):
            chunk = thresholds_PG[start : start + CHUNK]
            safe = fixed_sequence(self._p_values(problem, chunk, order), self.delta)
            count += safe
            if safe < len(chunk):
                break
        safe_PG = thresholds_PG[:count]
        return safe_PG[off_scores(problem.scores_NG, safe_PG) & self._saves(trace, safe_PG)]

    def cheapest(self, trace: Trace, thresholds_PG: Array) -> Array:
        """Of safe plans the one with the smallest mean cost on these rows."""
        _, cost_P = evaluate(self._problem(trace), thresholds_PG)
        chosen: Array = thresholds_PG[int(np.argmin(cost_P))]
        return chosen

    def smallest(self, trace: Trace, thresholds_PG: Array) -> float | None:
        """The smallest level at which a plan would pass, and all before it; None where no plan saves anything."""
        thresholds_PG = self._sequence(trace, thresholds_PG)
        saves = self._saves(trace, thresholds_PG)
        if not saves.any():
            return None
        problem, order = self._problem(trace), order_of(trace.columns)
        some = np.union1d(np.argmax(saves), np.linspace(0, len(saves) - 1, 33).astype(int))
        losses = worst_losses(problem.scores_NG, problem.losses_NE, thresholds_PG[some], problem.band)
        limits = {"low": self.risk.low, "high": self.risk.high}
        levels = [smallest_level(row, self.bound, self.delta, order=order, **limits) for row in losses]
        return float(np.maximum.accumulate(levels)[saves[some]].min())

    def _sequence(self, trace: Trace, thresholds_PG: Array) -> Array:
        """The candidates as they are tested: after the plan that never leaves, unless that one needs no test."""
        if self._never_is_safe(trace):
            return thresholds_PG
        return np.concatenate([np.full((1, thresholds_PG.shape[1]), np.inf, np.float32), thresholds_PG])

    def _problem(self, trace: Trace) -> Problem:
        return problem_of(trace, self.risk, self.against, self.unit, self.batch, self.deepest)

    def _p_values(self, problem: Problem, thresholds_PG: Array, order: Array) -> Array:
        losses = problem.losses_NE
        if set(self.risk.values or (math.nan,)) <= {-1.0, 0.0, 1.0}:
            losses = losses.astype(np.int8)  # exact, and an eighth of the memory
        return self.bound(
            worst_losses(problem.scores_NG, losses, thresholds_PG, problem.band),
            self.at_most,
            low=self.risk.low,
            high=self.risk.high,
            delta=self.delta,
            order=order,
        )

    def _saves(self, trace: Trace, thresholds_PG: Array) -> Array:
        """Which plans [P] spare these rows anything: all that end before the last exit, else those that some leave."""
        if self.deepest not in (None, trace.chain.exits[-1]):
            return np.ones(len(thresholds_PG), bool)
        return _leaves(self._problem(trace).scores_NG, thresholds_PG)

    def _never_is_safe(self, trace: Trace) -> bool:
        """Whether the loss of never leaving is 0 on every row by construction, so that it needs no test."""
        last = trace.chain.exits[-1] if self.deepest is None else self.deepest
        return self.risk.zero_at_reference and self.at_most >= 0 and trace.reference(self.against) == last


def problem_of(
    trace: Trace, risk: Risk, against: str = "last", unit: str = "macs", batch: int = 64, deepest: str | None = None
) -> Problem:
    """What the search sees of a trace: scores, losses and prices up to `deepest`."""
    width = _width(trace, deepest)
    gates, prices = trace.chain.exits[: width - 1], trace.prices

    def cost_to(open_E: Array) -> Array:
        names: Collection[str] = [gate for gate, is_open in zip(gates, open_E[:-1], strict=True) if is_open]
        return prices.to_exit(names, deepest, unit=unit, batch=batch)

    return Problem(
        trace.scores[:, : width - 1], trace.losses(risk, against)[:, :width], cost_to, trace.header.origin.band
    )


def _by_promise(kept: Selected, test: _Test, repeats: str | None, testing: str, search: Trace | None) -> Plan:
    """The cheapest of the plans that pass the test, with the promise that it keeps."""
    trace = kept.trace
    searched, certified = _rows(trace, testing, search, repeats)
    candidates = test.candidates(searched, certified)
    safe = test.passed(certified, candidates)
    if not len(safe):
        raise _no_plan(test, certified, candidates)
    plan = _plan(certified, test.cheapest(certified, safe), test.deepest)
    promise = Promise(
        risk=test.risk.name,
        at_most=test.at_most,
        confidence=test.confidence,
        against=certified.reference(test.against),
        bound=test.bound.__name__,
        testing=testing,
        rows=len(certified),
        searched=0 if searched is None else len(searched),
        covers=Plan.covers(plan.thresholds, test.deepest, plan.origin),
        repeats=repeats or "",
        repeated=kept.repeated,
        dropped=kept.dropped,
    )
    seen = trace.seen if search is None else trace.seen.and_also(search.seen)
    price = certified.price(plan, test.unit, test.batch, test.against)
    return replace(plan, promise=promise, price=price, rows=seen)


def _by_budget(
    trace: Trace, risk: str | Risk | None, budget: float, against: str, unit: str, batch: int, deepest: str | None
) -> Plan:
    asked = find_risk(risk or ("error" if trace.labels is not None else "disagreement"))
    problem = problem_of(trace, asked, against, unit, batch, deepest)
    plain = trace.price(Plan.never_leave(trace.chain), unit, batch, against).plain
    dearest = dearest_share(trace, unit, batch, against)
    if budget > dearest:
        raise BadInput(
            f"budget must be a share of the plain network's cost and at most {dearest:.4g}, the cost of all exits "
            f"together, got {budget:g}" + (f" ({budget:g} % is {budget / 100:g})" if budget <= 100 else "")
        )
    try:
        point = best(problem, budget * plain)
    except OutOfBudget:
        every = [Plan.by_hand({gate: -math.inf}, deepest=deepest) for gate in trace.chain.gates]
        least = min(trace.price(plan, unit, batch, against).mean / plain for plan in every)
        raise OutOfBudget(
            f"got a budget of {budget:g} of the plain network's {unit}, expected at least {least:.4g}, which the "
            "cheapest plan costs on these rows; ask for more"
        ) from None
    plan = _plan(trace, point.thresholds_G, deepest)
    return replace(plan, price=trace.price(plan, unit, batch, against), rows=trace.seen)


def dearest_share(trace: Trace, unit: str = "macs", batch: int = 64, against: str = "last") -> float:
    """The share of the plain network's cost above which a budget forbids nothing.

    It is what a row costs that meets every exit, or 1 where that is less.
    """
    price = trace.price(Plan.by_hand(dict.fromkeys(trace.chain.gates, 0.0)), unit, batch, against)
    return max(1.0, price.worst / price.plain) if price.plain > 0 else math.inf


def _rows(trace: Trace, testing: str, search: Trace | None, repeats: str | None) -> tuple[Trace | None, Trace]:
    """The rows that are searched (None for a path fixed beforehand) and those that are tested."""
    if testing == "path":
        return None, trace
    if search is not None:
        _require_same_network(trace, search)
    return searched_and_certified(trace, search, SEARCH_SHARE, repeats)


def _require_same_network(trace: Trace, search: Trace) -> None:
    mine, its = ((one.chain, one.header.origin.key) for one in (trace, search))
    if mine != its:
        raise Mismatch(
            f"the search rows are of network {' on '.join(its[1])}, the others of {' on '.join(mine[1])}; record both "
            "with the same network, engine and precision"
        )


def _plan(trace: Trace, thresholds_G: Array, deepest: str | None) -> Plan:
    closed = dict.fromkeys(trace.chain.gates, (math.inf,))
    opened = {gate: (float(t),) for gate, t in zip(trace.chain.gates, thresholds_G, strict=False)}
    return Plan(thresholds=closed | opened, deepest=deepest, chain=trace.chain, origin=trace.header.origin)


def _no_plan(test: _Test, trace: Trace, thresholds_PG: Array) -> NoSafePlan:
    level = test.smallest(trace, thresholds_PG)
    needed = rows_needed(test.at_most, test.confidence) if 0 < test.at_most < 1 else None
    sight = "no level is in sight" if level is None else f"the smallest level in sight is {level:.4g}"
    few = f" (even without a single loss it takes {needed:,} rows)" if needed and needed > len(trace) else ""
    sure = f"{percentage(test.confidence)} confidence"
    return NoSafePlan(
        f"no plan that lets rows leave keeps {test.risk.name} <= {test.at_most:.12g} with {sure} on "
        f"{len(trace):,} rows{few}; {sight}: certify that on fresh rows, or give more rows",
        smallest_level=level,
        never=_plan(trace, np.zeros(0), None),
    )


def _width(trace: Trace, deepest: str | None) -> int:
    return len(trace.chain.exits) if deepest is None else trace.chain.place(deepest) + 1


def _leaves(scores_NG: Array, thresholds_PG: Array) -> Array:
    """Which plans [P] let at least one of the rows leave."""
    tops = np.nanmax(np.where(np.isfinite(scores_NG), scores_NG, -np.inf), axis=0, initial=-np.inf)
    leaves: Array = (np.isfinite(thresholds_PG) & (thresholds_PG <= tops)).any(axis=1)
    return leaves
