"""From a trace to a plan: by promise (certified), or by budget (best on its rows, and it says
so).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy as np

from offramp._support.arguments import (
    percentage,
    require,
    require_confidence,
    require_count,
    require_flag,
    require_kind,
)
from offramp.calibration.candidates import problem_of as problem_of
from offramp.calibration.certifying import Certifier, Tested
from offramp.calibration.descending import trade_offs_of_routes
from offramp.calibration.dial import costs_of_settings
from offramp.calibration.members import warn_of_order
from offramp.calibration.routed import thresholds_of
from offramp.calibration.rows import Selected, independent_rows, searched_and_certified, unseen_rows
from offramp.calibration.search import best, frontier
from offramp.errors import InvalidArgument, Mismatch, NoSafePlan, OutOfBudget
from offramp.guarantees.bounds import find_bound, rows_needed
from offramp.guarantees.risks import Risk, find_risk
from offramp.plans.draws import require_repeats
from offramp.plans.plan import Plan, Promise
from offramp.plans.pricing import check_unit
from offramp.plans.trace import Trace

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
    reference: str = "last",
    unit: str | None = None,
    batch: int = 64,
    bound: str | None = None,
    testing: str = "path",
    search: Trace | None = None,
    max_exit: str | None = None,
    repeats: str | None = None,
    drop_seen: bool = False,
) -> Plan:
    """The cheapest plan with `risk <= at_most` at `confidence`, or the best one with mean cost <=
    `budget`.

    Args:
        trace: the rows that test the plan, as `record` gives them. They must be independent draws.
        risk: "disagreement" (default; needs no labels), "accuracy_gap", "error", or a Risk.
        at_most: the level of the promise, in the unit of the risk (0.01 is one answer in a
            hundred).
        confidence: of the promise, above 0 and below 1.
        budget: a share of the plain network's cost, instead of `at_most`; such a plan carries no
            promise.
        reference: what the risk compares with: "last", "backbone", or an exit.
        unit: the cost to save, "macs" or "ms"; by default MACs where they are known of every
            member, else milliseconds.
        batch: the batch size that milliseconds are for.
        bound: "binomial", "betting" or "hoeffding_bentkus"; by default the one that fits the risk.
        testing: "path" walks one shared threshold down a grid that was fixed beforehand, over all
            rows (valid: see guarantees.testing.fixed_sequence). "pareto" (Laufer-Goldshtein et al.,
            2023, arXiv 2210.07913) searches candidates on some rows and tests them on the others.
        search: a trace of rows to search on; then all rows of `trace` are tested, by "pareto".
        deepest: an exit that answers whatever arrives there.
        repeats: what rows of equal content are. None refuses them; "independent" says that each was
            drawn on its own, and all count; "once" counts one of each, a promise about distinct
            rows. Rows of equal number are the same row, and always refused.
        drop_seen: leave out rows that trained the network, instead of refusing them.

    Returns:
        A plan. Its promise says on how many rows it was tested, and what was decided about repeats.
        The order in which a betting bound meets the rows is derived from their contents
        (`draws.order_of`).

    Raises:
        NoSafePlan: no plan keeps the promise on these rows.
        OverlappingRows: rows repeat, trained the network, or are searched and tested.
        InvalidArgument: two aims or none, or an argument that is not what it must be.
        UnknownName: a risk, bound or exit of that name does not exist.
    """
    require_kind("the trace", trace, Trace, "from record or Trace.load")
    if search is not None:
        require_kind("search", search, Trace, "from record or Trace.load")
    drop_seen = require_flag("drop_seen", drop_seen)
    batch = require_count("batch", batch)
    if (at_most is None) == (budget is None):
        got = "neither" if at_most is None else "both"
        raise InvalidArgument(
            f"calibrate needs exactly one of at_most (a promise) and budget (no promise), got {got}"
        )
    if not trace.header.trained:
        raise InvalidArgument(
            "an exit of this network was never trained; train it and record again"
        )
    require_repeats(repeats)
    if not len(trace):
        raise InvalidArgument("the trace must have at least one row, got none")
    unit = trace.unit(unit)
    check_unit(unit, batch)
    trace.reference(reference)  # raises UnknownName
    if max_exit is not None:
        trace.topology.exit_index(max_exit)
    if budget is not None:
        share = require("budget", budget, above=0)
        # no promise: repeats do no harm
        rows, _ = unseen_rows(trace, drop_seen=drop_seen, what="calibration")
        warn_of_order(trace, unit, batch)
        return _by_budget(rows, risk, share, reference, unit, batch, max_exit)
    asked = find_risk(risk or "disagreement")
    level = require(f"at_most (a level of {asked.name})", at_most, low=asked.low, below=asked.high)
    confidence = require_confidence(confidence)
    if trace.header.settings and (testing != "path" or search is not None or max_exit is not None):
        raise InvalidArgument(
            "settings of one dial are tested along the dial; leave testing, search and deepest out"
        )
    if testing not in TESTING:
        raise InvalidArgument(f"testing is {testing!r}, expected one of {', '.join(TESTING)}")
    test = Certifier(
        asked, level, confidence, find_bound(bound, asked), reference, unit, batch, max_exit
    )
    kept = independent_rows(trace, repeats=repeats, drop_seen=drop_seen, what="calibration")
    warn_of_order(trace, unit, batch)
    return _by_promise(kept, test, repeats, "pareto" if search is not None else testing, search)


def _by_promise(
    kept: Selected, test: Certifier, repeats: str | None, testing: str, search: Trace | None
) -> Plan:
    """The cheapest of the plans that pass the test, with the promise that it keeps."""
    trace = kept.trace
    searched, certified = _rows(trace, testing, search, repeats)
    tested = test.tested(searched, certified)
    cheapest_G = tested.cheapest()
    if cheapest_G is None:
        raise _no_plan(test, certified, tested)
    plan = _plan(certified, cheapest_G, test.max_exit)
    promise = Promise(
        risk=test.risk.name,
        at_most=test.at_most,
        confidence=test.confidence,
        reference=certified.reference(test.reference),
        bound=test.bound.__name__,
        testing=testing,
        rows=len(certified),
        searched=0 if searched is None else len(searched),
        covers=Plan.covers(plan.thresholds, test.max_exit, plan.origin),
        repeats=repeats or "",
        repeated=kept.repeated,
        dropped=kept.dropped,
    )
    seen = trace.seen if search is None else trace.seen.and_also(search.seen)
    price = certified.price(plan, test.unit, test.batch, test.reference)
    return replace(plan, promise=promise, price=price, rows=seen)


def _by_budget(
    trace: Trace,
    risk: str | Risk | None,
    budget: float,
    reference: str,
    unit: str,
    batch: int,
    max_exit: str | None,
) -> Plan:
    """The plan with the least mean loss on these rows whose mean cost keeps the budget."""
    asked = find_risk(risk or ("error" if trace.labels is not None else "disagreement"))
    plain = trace.price(Plan.never_leave(trace.topology), unit, batch, reference).plain
    dearest = dearest_share(trace, unit, batch, reference)
    if budget > dearest:
        raise InvalidArgument(
            f"budget must be a share of the plain network's cost and at most {dearest:.4g}, the "
            f"cost of all exits "
            f"together, got {budget:g}"
            + (f" ({budget:g} % is {budget / 100:g})" if budget <= 100 else "")
        )
    if not trace.topology.is_chain:
        return _by_budget_of_routes(trace, asked, budget, plain, reference, unit, batch, max_exit)
    problem = problem_of(trace, asked, reference, unit, batch, max_exit)
    plan = None
    with contextlib.suppress(OutOfBudget):
        plan = _plan(trace, best(problem, budget * plain).thresholds_G, max_exit)
    # The search shares a call among `batch` rows. Where some leave, fewer rows arrive and share it,
    # and the plan costs more milliseconds than the search has seen: then the trade-offs are priced
    # one by one.
    limit = budget * plain * (1 + ROUNDING)
    if plan is not None and trace.price(plan, unit, batch, reference).mean > limit:
        plan = None
        # each loses less than the one before
        for thresholds_G in frontier(problem, points=POINTS).thresholds_PG:
            other = _plan(trace, thresholds_G, max_exit)
            if trace.price(other, unit, batch, reference).mean <= limit:
                plan = other
    if plan is None:
        every = [
            Plan.by_hand({gate: -math.inf}, max_exit=max_exit) for gate in trace.topology.gates
        ]
        every.append(Plan.by_hand({}, max_exit=max_exit))
        least = min(trace.price(each, unit, batch, reference).mean / plain for each in every)
        raise OutOfBudget(
            f"got a budget of {budget:g} of the plain network's {unit}, expected at least "
            f"{least:.4g}, which the "
            "cheapest plan costs on these rows; ask for more"
        )
    return replace(plan, price=trace.price(plan, unit, batch, reference), rows=trace.seen)


def _by_budget_of_routes(
    trace: Trace,
    risk: Risk,
    budget: float,
    plain: float,
    reference: str,
    unit: str,
    batch: int,
    max_exit: str | None,
) -> Plan:
    """`_by_budget` in a network with forks."""
    if trace.header.settings:
        return _by_budget_of_settings(trace, risk, budget, plain, reference, unit, batch)
    gap = 2 * trace.header.origin.band
    losses_NL = trace.losses(risk, reference)
    found = trade_offs_of_routes(
        trace,
        losses_NL,
        unit=unit,
        batch=batch,
        max_exit=max_exit,
        gap=gap,
        budgets=(budget * plain,),
    )
    within = np.flatnonzero(found.cost_P <= budget * plain * (1 + ROUNDING))
    if not len(within):
        least = float(found.cost_P.min()) / plain
        raise OutOfBudget(
            f"got a budget of {budget:g} of the plain network's {unit}, expected at least "
            f"{least:.4g}, which the "
            "cheapest plan costs on these rows; ask for more"
        )
    # each loses less than all cheaper ones
    plan = _plan(trace, found.thresholds_PG[within[-1]], max_exit)
    return replace(plan, price=trace.price(plan, unit, batch, reference), rows=trace.seen)


def _by_budget_of_settings(
    trace: Trace, risk: Risk, budget: float, plain: float, reference: str, unit: str, batch: int
) -> Plan:
    """`_by_budget` among the recorded settings of one dial."""
    cost_S = costs_of_settings(trace, unit, batch)
    loss_S = trace.losses(risk, reference).mean(0)
    within = cost_S <= budget * plain * (1 + ROUNDING)
    if not within.any():
        raise OutOfBudget(
            f"got a budget of {budget:g} of the plain network's {unit}, expected at least "
            f"{cost_S.min() / plain:.4g}, "
            "which the cheapest recorded setting costs on these rows; ask for more, or record "
            "more settings"
        )
    best_one = int(np.argmin(np.where(within, loss_S, np.inf)))
    width = sum(trace.topology.routes(gate) for gate in trace.topology.gates)
    plan = _plan(trace, np.full(width, trace.header.settings[best_one]), None)
    return replace(plan, price=trace.price(plan, unit, batch, reference), rows=trace.seen)


def dearest_share(
    trace: Trace, unit: str = "macs", batch: int = 64, reference: str = "last"
) -> float:
    """The share of the plain network's cost above which a budget forbids nothing.

    It is what a row costs that meets every exit, or 1 where that is less.
    """
    if trace.header.settings:
        return math.inf
    opened = {gate: (0.0,) * trace.topology.routes(gate) for gate in trace.topology.gates}
    price = trace.price(Plan.by_hand(opened), unit, batch, reference)
    return max(1.0, price.worst / price.plain) if price.plain > 0 else math.inf


def _rows(
    trace: Trace, testing: str, search: Trace | None, repeats: str | None
) -> tuple[Trace | None, Trace]:
    """The rows that are searched (None for a path fixed beforehand) and those that are tested."""
    if testing == "path":
        return None, trace
    if search is not None:
        _require_same_network(trace, search)
    return searched_and_certified(trace, search, SEARCH_SHARE, repeats)


def _require_same_network(trace: Trace, search: Trace) -> None:
    mine, its = ((one.topology, one.header.origin.key) for one in (trace, search))
    if mine != its:
        raise Mismatch(
            f"the search rows are of network {' on '.join(its[1])}, the others of "
            f"{' on '.join(mine[1])}; record both "
            "with the same network, engine and precision"
        )


def _plan(trace: Trace, thresholds_G: Array, max_exit: str | None) -> Plan:
    return Plan(
        thresholds=thresholds_of(trace.topology, thresholds_G),
        max_exit=max_exit,
        topology=trace.topology,
        origin=trace.header.origin,
    )


def _no_plan(test: Certifier, trace: Trace, tested: Tested) -> NoSafePlan:
    level = test.smallest_level(trace, tested)
    if 0 < test.at_most < 1:
        needed = rows_needed(test.at_most, test.confidence)
    else:
        needed = None
    if level is None:
        sight = "no level is in sight"
    else:
        sight = f"the smallest level in sight is {level:.4g}"
    if needed and needed > len(trace):
        few = f" (even without a single loss it takes {needed:,} rows)"
    else:
        few = ""
    sure = f"{percentage(test.confidence)} confidence"
    return NoSafePlan(
        f"no plan that lets rows leave keeps {test.risk.name} <= {test.at_most:.12g} with {sure} "
        f"on "
        f"{len(trace):,} rows{few}; {sight}: certify that on fresh rows, or give more rows",
        smallest_level=level,
        never=_plan(trace, np.zeros(0), None),
    )
