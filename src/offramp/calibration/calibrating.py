"""From a trace to a plan: by promise (certified), or by budget (best on its rows, and it says so)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from offramp.calibration.candidates import (
    distinct,
    in_order,
    off_scores,
    shared_path,
    spread,
    trade_offs,
    worst_losses,
)
from offramp.calibration.search import Problem, best, evaluate
from offramp.errors import BadInput, Mismatch, NoSafePlan, OutOfBudget
from offramp.guarantees.bounds import Bound, find_bound, rows_needed, smallest_level
from offramp.guarantees.risks import Risk, find_risk
from offramp.guarantees.testing import fixed_sequence, order_from, split_from
from offramp.plan import Plan, Promise
from offramp.provenance import refuse_learned
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
    unit: str | None = None,
    batch: int = 64,
    bound: str | None = None,
    testing: str = "path",
    search: Trace | None = None,
    deepest: str | None = None,
) -> Plan:
    """The cheapest plan with `risk <= at_most` at `confidence`, or the best one with mean cost <= `budget`.

    risk: disagreement (default; needs no labels), accuracy_gap, error, or a Risk; against: last, backbone, or an exit.
    budget: a fraction of the plain network's cost; such a plan carries no promise. unit, batch: MACs or ms at a batch;
    by default MACs where they are known of every member, else milliseconds.
    testing="path": one shared threshold, on a grid fixed beforehand, walked down from the safest over all rows (valid:
    see guarantees.testing.fixed_sequence). "pareto" (Laufer-Goldshtein et al., 2023, arXiv 2210.07913): candidates
    from rows that are searched, tested on the others; `search` gives a trace of such rows, and then all rows of
    `trace` are tested. The order of a betting bound is derived from the data's fingerprint.
    Raises NoSafePlan, BadInput (two aims or none, invalid risk and bound), OverlappingRows, UnknownName.
    """
    if (at_most is None) == (budget is None):
        raise BadInput(f"at_most is {at_most} and budget is {budget}; give exactly one of them")
    if not trace.header.taught:
        raise BadInput("an exit of this network was never taught; teach it and record again")
    refuse_learned(trace.columns, "calibration")
    unit = trace.unit(unit)
    if budget is not None:
        if not 0 < budget < math.inf:
            raise BadInput(f"got a budget of {budget}, expected a share of the plain network's cost above 0; give one")
        return _by_budget(trace, risk, budget, against, unit, batch, deepest)
    assert at_most is not None
    asked = find_risk(risk or "disagreement")
    if not (0 < confidence < 1 and math.isfinite(at_most)):
        raise BadInput(
            f"at_most is {at_most} and confidence {confidence}; expected numbers, confidence between 0 and 1"
        )
    if testing not in TESTING:
        raise BadInput(f"testing is {testing!r}, expected one of {', '.join(TESTING)}")
    test = _Test(asked, at_most, 1 - confidence, find_bound(bound, asked), against, unit, batch, deepest)
    return _by_promise(trace, test, confidence, "pareto" if search is not None else testing, search)


@dataclass(frozen=True)
class _Test:
    """What is asked of a plan, and how it is tested."""

    risk: Risk
    at_most: float
    delta: float
    bound: Bound
    against: str
    unit: str
    batch: int
    deepest: str | None

    def candidates(self, searched: Trace | None, certified: Trace) -> Array:
        """Thresholds [P, G] in the order of testing, the safest first."""
        if searched is None:
            scores = certified.scores[:, : _width(certified, self.deepest) - 1]
            return spread(distinct(shared_path(), scores, certified.header.origin.band), scores.shape[1])
        problem = problem_of(searched, self.risk, self.against, self.unit, self.batch, self.deepest)
        thresholds = trade_offs(problem, POINTS)
        p_P = self._p_values(problem, thresholds, searched.header.data_fingerprint)
        ordered: Array = thresholds[in_order(p_P, evaluate(problem, thresholds)[1])]
        return ordered

    def passed(self, trace: Trace, thresholds_PG: Array) -> Array:
        """The leading candidates that are safe, as thresholds; that none of its rows leaves is no plan to speak of."""
        problem, thresholds_PG = self._problem(trace), self._sequence(trace, thresholds_PG)
        count = 0
        for start in range(0, len(thresholds_PG), CHUNK):
            chunk = thresholds_PG[start : start + CHUNK]
            safe = fixed_sequence(self._p_values(problem, chunk, trace.header.data_fingerprint), self.delta)
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
        problem, order = self._problem(trace), order_from(trace.header.data_fingerprint, len(trace))
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

    def _p_values(self, problem: Problem, thresholds_PG: Array, fingerprint: str) -> Array:
        losses = problem.losses_NE
        if set(self.risk.values or (math.nan,)) <= {-1.0, 0.0, 1.0}:
            losses = losses.astype(np.int8)  # exact, and an eighth of the memory
        return self.bound(
            worst_losses(problem.scores_NG, losses, thresholds_PG, problem.band),
            self.at_most,
            low=self.risk.low,
            high=self.risk.high,
            delta=self.delta,
            order=order_from(fingerprint, len(losses)),
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


def _by_promise(trace: Trace, test: _Test, confidence: float, testing: str, search: Trace | None) -> Plan:
    """The cheapest of the plans that pass the test, with the promise that it keeps."""
    searched, certified = _rows(trace, testing, search)
    candidates = test.candidates(searched, certified)
    safe = test.passed(certified, candidates)
    if not len(safe):
        raise _no_plan(test, certified, candidates)
    plan = _plan(certified, test.cheapest(certified, safe), test.deepest)
    promise = Promise(
        risk=test.risk.name,
        at_most=test.at_most,
        confidence=confidence,
        against=certified.reference(test.against),
        bound=test.bound.__name__,
        testing=testing,
        rows=len(certified),
        searched=0 if searched is None else len(searched),
        covers=Plan.covers(plan.thresholds, test.deepest, plan.origin),
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


def _rows(trace: Trace, testing: str, search: Trace | None) -> tuple[Trace | None, Trace]:
    """The rows that are searched (None for a path fixed beforehand) and those that are tested."""
    if testing == "path":
        return None, trace
    if search is not None:
        _require_same_network(trace, search)
        search.seen.refuse_overlap(trace.columns["digest"], "calibration", trace.columns["row"])
        return search, trace
    searched, certified = split_from(trace.header.data_fingerprint, len(trace), SEARCH_SHARE)
    return trace[searched], trace[certified]


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
    needed = rows_needed(test.at_most, 1 - test.delta) if 0 < test.at_most < 1 else None
    sight = "no level is in sight" if level is None else f"the smallest level in sight is {level:.4g}"
    few = f" (even without a single loss it takes {needed:,} rows)" if needed and needed > len(trace) else ""
    return NoSafePlan(
        f"no plan that lets rows leave keeps {test.risk.name} <= {test.at_most:g} with {1 - test.delta:.0%} confidence "
        f"on {len(trace):,} rows{few}; {sight}: certify that on fresh rows, or give more rows",
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
