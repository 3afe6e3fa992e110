"""Candidate plans with thresholds of their own for each gate, found on search rows.

Shapes: P plans, N rows, G gates, E exits (G = E - 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from offramp.calibration.search import SearchProblem, frontier
from offramp.calibration.sweep import BLOCK
from offramp.guarantees.risks import NAMED, Risk
from offramp.plans.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]


def problem_of(
    trace: Trace,
    risk: Risk,
    reference: str = "last",
    unit: str = "macs",
    batch: int = 64,
    max_exit: str | None = None,
) -> SearchProblem:
    """The scores, losses and prices of a trace up to `max_exit`, for the search.

    Args:
        trace: of a chain.
        risk: how an answer is judged.
        reference: the exit that answers are compared with.
        unit: "macs" or "ms".
        batch: the batch size that milliseconds are for.
        max_exit: the last exit that the search uses; None for all.

    Returns:
        The problem.
    """
    if max_exit is None:
        width = len(trace.topology.exits)
    else:
        width = trace.topology.exit_index(max_exit) + 1
    gates = trace.topology.exits[: width - 1]
    prices = trace.prices

    def cost_to(open_E: Array) -> Array:
        names = [gates[g] for g in np.flatnonzero(open_E[:-1])]
        return prices.to_exit(names, max_exit, unit=unit, batch=batch)

    losses = losses_up_to(trace, risk, reference, width)
    return SearchProblem(trace.scores[:, : width - 1], losses, cost_to, trace.header.origin.band)


def losses_up_to(trace: Trace, risk: Risk, reference: str, width: int) -> Array:
    """Losses of the first exits.

    Losses of -1, 0 and 1 are stored as int8: exact, and small.

    Args:
        trace: recorded outputs.
        risk: how an answer is judged.
        reference: the exit that answers are compared with.
        width: how many exits.

    Returns:
        [N, width].
    """
    if risk.values is None or not set(risk.values) <= {-1.0, 0.0, 1.0}:
        return trace.losses(risk, reference)[:, :width]
    if risk not in NAMED:
        return trace.losses(risk, reference)[:, :width].astype(np.int8)
    # The loss of a row depends on this row only in our own risks, so a block of rows is computed at
    # a time.
    losses = np.empty((len(trace), width), np.int8)
    for start in range(0, len(trace), BLOCK):
        block = slice(start, start + BLOCK)
        losses[block] = trace[block].losses(risk, reference)[:, :width]
    return losses


def trade_offs(problem: SearchProblem, points: int) -> Array:
    """Thresholds of the best trade-offs on search rows.

    For a signed risk the trade-offs for its absolute value are added: a plan that changes few
    answers has a small p-value long before a plan whose gains and losses cancel.

    Args:
        problem: of the search rows.
        points: how many trade-offs.

    Returns:
        [P, G], without the plans at which nothing leaves.
    """
    gap = 2 * problem.band
    thresholds_PG = frontier(problem, points=points, gap=gap).thresholds_PG
    if problem.losses_NE.min() < 0:
        unsigned = replace(problem, losses_NE=np.abs(problem.losses_NE))
        more_PG = frontier(unsigned, points=points, gap=gap).thresholds_PG
        thresholds_PG = np.concatenate([thresholds_PG, more_PG])
    thresholds_PG = np.unique(thresholds_PG, axis=0)
    opens_P = np.isfinite(thresholds_PG).any(axis=1)
    return np.asarray(thresholds_PG[opens_P])


def in_order(p_P: Array, cost_P: Array) -> Array:
    """The candidates that are worth a test: each is cheaper than all with a smaller p-value.

    Args:
        p_P: p-values on search rows.
        cost_P: costs on search rows.

    Returns:
        Numbers of candidates, the safest first.
    """
    order = np.lexsort((cost_P, p_P))
    # the cheapest of all that come before
    cheapest = np.minimum.accumulate(np.concatenate([[np.inf], cost_P[order][:-1]]))
    worth_testing: Array = order[cost_P[order] < cheapest]
    return worth_testing
