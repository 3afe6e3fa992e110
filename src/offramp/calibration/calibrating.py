"""From a trace to a plan: by promise (certified), or by budget (best on its rows, and it says so)."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np

from offramp.calibration.candidates import problem_of as problem_of
from offramp.calibration.certifying import Certifier, Tested
from offramp.calibration.search import best, frontier
from offramp.errors import BadInput, Mismatch, NoSafePlan, OutOfBudget
from offramp.guarantees.bounds import find_bound, rows_needed
from offramp.guarantees.risks import Risk, find_risk
from offramp.guarantees.testing import split_from
from offramp.plan import Plan, Promise
from offramp.pricing import check_unit
from offramp.provenance import refuse_learned
from offramp.trace import Trace

TESTING = ("path", "pareto")
SEARCH_SHARE = 0.4  # of the rows, for Pareto testing without search rows of its own
ROUNDING = 1e-9  # share of a budget by which the sum of costs may exceed it
POINTS = 100  # trade-offs looked through where milliseconds of a plan depend on how many rows leave

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
) -> Plan:
    """The cheapest plan with `risk <= at_most` at `confidence`, or the best one with mean cost <= `budget`.

    risk: disagreement (default; needs no labels), accuracy_gap, error, or a Risk; against: last, backbone, or an exit.
    budget: a fraction of the plain network's cost; such a plan carries no promise. unit, batch: MACs or ms at a batch.
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
    if not len(trace):
        raise BadInput("the trace must have at least one row, got none")
    check_unit(unit, batch)
    unit = trace.prices.unit_with_prices(unit, trace.chain.exits[-1])
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
    test = Certifier(asked, at_most, 1 - confidence, find_bound(bound, asked), against, unit, batch, deepest)
    return _by_promise(trace, test, confidence, "pareto" if search is not None else testing, search)


def _by_promise(trace: Trace, test: Certifier, confidence: float, testing: str, search: Trace | None) -> Plan:
    """The cheapest of the plans that pass the test, with the promise that it keeps."""
    searched, certified = _rows(trace, testing, search)
    tested = test.tested(searched, certified)
    cheapest_G = tested.cheapest()
    if cheapest_G is None:
        raise _no_plan(test, certified, tested)
    plan = _plan(certified, cheapest_G, test.deepest)
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
    """The plan with the least mean loss on these rows whose mean cost keeps the budget."""
    asked = find_risk(risk or ("error" if trace.labels is not None else "disagreement"))
    plain = trace.price(Plan.never_leave(trace.chain), unit, batch, against).plain
    problem = problem_of(trace, asked, against, unit, batch, deepest)
    plan = None
    with contextlib.suppress(OutOfBudget):
        plan = _plan(trace, best(problem, budget * plain).thresholds_G, deepest)
    # The search shares a call among `batch` rows. Where some leave, fewer rows arrive and share it, and the plan
    # costs more milliseconds than the search has seen: then the trade-offs are priced one by one.
    limit = budget * plain * (1 + ROUNDING)
    if plan is not None and trace.price(plan, unit, batch, against).mean > limit:
        plan = None
        for thresholds_G in frontier(problem, points=POINTS).thresholds_PG:  # each loses less than the one before
            other = _plan(trace, thresholds_G, deepest)
            if trace.price(other, unit, batch, against).mean <= limit:
                plan = other
    if plan is None:
        every = [Plan.by_hand({gate: -math.inf}, deepest=deepest) for gate in trace.chain.gates]
        every.append(Plan.by_hand({}, deepest=deepest))
        least = min(trace.price(each, unit, batch, against).mean / plain for each in every)
        raise OutOfBudget(
            f"got a budget of {budget:g} of the plain network's {unit}, expected at least {least:.4g}, which the "
            "cheapest plan costs on these rows; ask for more"
        )
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


def _no_plan(test: Certifier, trace: Trace, tested: Tested) -> NoSafePlan:
    level = test.smallest_level(trace, tested)
    needed = rows_needed(test.at_most, 1 - test.delta) if 0 < test.at_most < 1 else None
    sight = "no level is in sight" if level is None else f"the smallest level in sight is {level:.4g}"
    few = f" (even without a single loss it takes {needed:,} rows)" if needed and needed > len(trace) else ""
    return NoSafePlan(
        f"no plan that lets rows leave keeps {test.risk.name} <= {test.at_most:g} with {1 - test.delta:.0%} confidence "
        f"on {len(trace):,} rows{few}; {sight}: certify that on fresh rows, or give more rows",
        smallest_level=level,
        never=_plan(trace, np.zeros(0), None),
    )
