"""From a trace to a plan: by a promise (certified), or by a budget (the best on its rows, without a
promise).
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
from offramp.calibration.dial import costs_of_settings, plan_at
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
SEARCH_SHARE = 0.4  # the share of the rows that Pareto testing searches, if there are no others
ROUNDING = 1e-9  # the share of a budget by which the sum of costs may exceed it
POINTS = 100  # trade-offs to price where milliseconds of a plan depend on how many rows leave

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
        risk: "disagreement" (default; does not need labels), "accuracy_gap", "error", or a Risk.
        at_most: the level of the promise, in the unit of the risk (0.01 is one answer in a
            hundred).
        confidence: of the promise, above 0 and below 1.
        budget: a share of the plain network's cost, instead of `at_most`. The plan has no promise.
        reference: the exit that the risk compares with: "last", "backbone", or a name.
        unit: of the cost to save, "macs" or "ms". By default MACs where they are known of every
            member, otherwise milliseconds.
        batch: the batch size that milliseconds are for.
        bound: "binomial", "betting" or "hoeffding_bentkus"; by default the one that fits the risk.
        testing: "path" walks one shared threshold down a grid that was fixed beforehand, over all
            rows (valid: see guarantees.testing.fixed_sequence). "pareto" (Laufer-Goldshtein et al.,
            2023, arXiv 2210.07913) searches candidates on some rows and tests them on the others.
        search: a trace of rows to search on. Then all rows of `trace` are tested, by "pareto".
        max_exit: an exit that answers every row that arrives there.
        repeats: how to count rows of equal content. None refuses them. "independent": each was
            drawn on its own, and all count. "once": one of each counts, a promise about distinct
            rows. Rows of equal number are the same row, and always refused.
        drop_seen: leave out rows that trained the network, instead of refusing them.

    Returns:
        A plan. Its promise states on how many rows it was tested, and how repeats were counted. The
        order in which a betting bound reads the rows is derived from their contents
        (`draws.order_of`).

    Raises:
        NoSafePlan: no plan keeps the promise on these rows.
        OutOfBudget: no plan is as cheap as the budget on these rows.
        OverlappingRows: rows repeat, trained the network, or are both searched and tested.
        InvalidArgument: both or neither of at_most and budget are given, or an argument is not
            allowed.
        UnknownName: there is no risk, bound or exit of this name.
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
    if trace.header.settings and (testing != "path" or search is not None or max_exit is not None):
        raise InvalidArgument(
            "settings of one dial are tested along the dial; leave out testing, search and max_exit"
        )
    if budget is not None:
        share = require("budget", budget, above=0)
        # no promise: repeats do no harm
        rows, _ = unseen_rows(trace, drop_seen=drop_seen, what="calibration")
        warn_of_order(trace, unit, batch)
        return _by_budget(rows, risk, share, reference, unit, batch, max_exit)
    promised = find_risk(risk or "disagreement")
    level = require(
        f"at_most (a level of {promised.name})", at_most, low=promised.low, below=promised.high
    )
    confidence = require_confidence(confidence)
    if testing not in TESTING:
        raise InvalidArgument(f"testing must be one of {', '.join(TESTING)}, got {testing!r}")
    if search is not None:
        testing = "pareto"
    test = Certifier(
        promised, level, confidence, find_bound(bound, promised), reference, unit, batch, max_exit
    )
    selected = independent_rows(trace, repeats=repeats, drop_seen=drop_seen, what="calibration")
    warn_of_order(trace, unit, batch)
    return _by_promise(selected, test, repeats, testing, search)


def _by_promise(
    selected: Selected, test: Certifier, repeats: str | None, testing: str, search: Trace | None
) -> Plan:
    """The cheapest of the plans that pass the test, with the promise that it keeps."""
    trace = selected.trace
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
        repeated=selected.repeated,
        dropped=selected.dropped,
    )
    seen = trace.seen
    if search is not None:
        seen = seen.and_also(search.seen)
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
    if not risk:
        risk = "error" if trace.labels is not None else "disagreement"
    measured = find_risk(risk)
    plain = trace.price(Plan.never_leave(trace.topology), unit, batch, reference).plain
    dearest = dearest_share(trace, unit, batch, reference)
    if budget > dearest:
        meant = ""
        if budget <= 100:
            meant = f" ({budget:g} % is {budget / 100:g})"
        raise InvalidArgument(
            f"budget must be a share of the plain network's cost and at most {dearest:.4g}, the "
            f"cost of all exits together, got {budget:g}{meant}"
        )
    if not trace.topology.is_chain:
        return _by_budget_of_routes(
            trace, measured, budget, plain, reference, unit, batch, max_exit
        )
    problem = problem_of(trace, measured, reference, unit, batch, max_exit)
    plan = None
    with contextlib.suppress(OutOfBudget):
        plan = _plan(trace, best(problem, budget * plain).thresholds_G, max_exit)
    # The search shares the cost of a call between `batch` rows. If some rows leave, fewer arrive
    # and share it, so the plan costs more milliseconds than the search assumed. Then the trade-offs
    # are priced one by one.
    limit = budget * plain * (1 + ROUNDING)
    if plan is not None and trace.price(plan, unit, batch, reference).mean > limit:
        plan = None
        # each loses less than the one before
        for thresholds_G in frontier(problem, points=POINTS).thresholds_PG:
            other = _plan(trace, thresholds_G, max_exit)
            if trace.price(other, unit, batch, reference).mean <= limit:
                plan = other
    if plan is None:
        # the cheapest plan: everyone leaves at one gate, or nobody leaves
        costs = [trace.price(Plan.by_hand({}, max_exit=max_exit), unit, batch, reference).mean]
        for gate in trace.topology.gates:
            everyone = Plan.by_hand({gate: -math.inf}, max_exit=max_exit)
            costs.append(trace.price(everyone, unit, batch, reference).mean)
        raise _out_of_budget(budget, min(costs) / plain, unit)
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
    candidates = trade_offs_of_routes(
        trace,
        losses_NL,
        unit=unit,
        batch=batch,
        max_exit=max_exit,
        gap=gap,
        budgets=(budget * plain,),
    )
    within = np.flatnonzero(candidates.cost_P <= budget * plain * (1 + ROUNDING))
    if not len(within):
        raise _out_of_budget(budget, float(candidates.cost_P.min()) / plain, unit)
    # each loses less than all cheaper ones
    plan = _plan(trace, candidates.thresholds_PG[within[-1]], max_exit)
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
            f"budget must be at least {cost_S.min() / plain:.4g} of the plain network's {unit}, "
            f"the cost of the cheapest recorded setting on these rows, got {budget:g}. Or record "
            f"more settings."
        )
    number = int(np.argmin(np.where(within, loss_S, np.inf)))
    plan = plan_at(trace.topology, trace.header.settings[number])
    plan = replace(plan, topology=trace.topology, origin=trace.header.origin)
    return replace(plan, price=trace.price(plan, unit, batch, reference), rows=trace.seen)


def dearest_share(
    trace: Trace, unit: str = "macs", batch: int = 64, reference: str = "last"
) -> float:
    """The share of the plain network's cost above which a budget forbids nothing.

    It is the cost of a row that passes every exit, or 1 if that is less.

    Args:
        trace: recorded outputs.
        unit: "macs" or "ms".
        batch: the batch size that milliseconds are for.
        reference: the plain network.

    Returns:
        The share; +inf where it is not known.
    """
    if trace.header.settings:
        return math.inf
    all_open = {gate: (0.0,) * trace.topology.routes(gate) for gate in trace.topology.gates}
    price = trace.price(Plan.by_hand(all_open), unit, batch, reference)
    if not price.plain > 0:
        return math.inf
    return max(1.0, price.worst / price.plain)


def _out_of_budget(budget: float, least: float, unit: str) -> OutOfBudget:
    """The error for a budget below the cheapest plan."""
    return OutOfBudget(
        f"budget must be at least {least:.4g} of the plain network's {unit}, the cost of the "
        f"cheapest plan on these rows, got {budget:g}"
    )


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
    """Raise Mismatch for search rows of another network, engine or precision."""
    tested_on = trace.header.origin.key
    searched_on = search.header.origin.key
    if trace.topology != search.topology or tested_on != searched_on:
        raise Mismatch(
            f"the search rows are of network {' on '.join(searched_on)}, the others of "
            f"{' on '.join(tested_on)}; record both with the same network, engine and precision"
        )


def _plan(trace: Trace, thresholds_G: Array, max_exit: str | None) -> Plan:
    """A plan for the network of a trace, without a promise."""
    return Plan(
        thresholds=thresholds_of(trace.topology, thresholds_G),
        max_exit=max_exit,
        topology=trace.topology,
        origin=trace.header.origin,
    )


def _no_plan(test: Certifier, trace: Trace, tested: Tested) -> NoSafePlan:
    """The error where no plan keeps the promise, with the level that would be possible."""
    level = test.smallest_level(trace, tested)
    in_sight = "no level is in sight"
    if level is not None:
        in_sight = f"the smallest level in sight is {level:.4g}"
    too_few = ""
    if 0 < test.at_most < 1:
        needed = rows_needed(test.at_most, test.confidence)
        if needed > len(trace):
            too_few = f" (even without a single loss it takes {needed:,} rows)"
    return NoSafePlan(
        f"no plan that lets rows leave keeps {test.risk.name} <= {test.at_most:.12g} with "
        f"{percentage(test.confidence)} confidence on {len(trace):,} rows{too_few}; {in_sight}: "
        f"certify that on fresh rows, or give more rows",
        smallest_level=level,
        never=_plan(trace, np.zeros(0), None),
    )
