"""Candidate plans with thresholds of their own for each gate, found on search rows.

Shapes: P plans, N rows, G gates, E exits (G = E - 1).
"""

from __future__ import annotations

from collections.abc import Collection
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
    """What the search sees of a trace: scores, losses and prices up to `max_exit`."""
    if max_exit is None:
        width = len(trace.topology.exits)
    else:
        width = trace.topology.exit_index(max_exit) + 1
    gates = trace.topology.exits[: width - 1]
    prices = trace.prices

    def cost_to(open_E: Array) -> Array:
        names: Collection[str] = [
            gate for gate, is_open in zip(gates, open_E[:-1], strict=True) if is_open
        ]
        return prices.to_exit(names, max_exit, unit=unit, batch=batch)

    losses = losses_up_to(trace, risk, reference, width)
    return SearchProblem(trace.scores[:, : width - 1], losses, cost_to, trace.header.origin.band)


def losses_up_to(trace: Trace, risk: Risk, reference: str, width: int) -> Array:
    """Losses [N, width] of the first exits, stored as int8 where they are -1, 0 or 1 only: exact,
    and small.

    Of our own risks, whose loss of a row depends on that row alone, a block of rows is computed at
    a time.
    """
    if risk.values is None or not set(risk.values) <= {-1.0, 0.0, 1.0}:
        return trace.losses(risk, reference)[:, :width]
    if risk not in NAMED:
        return trace.losses(risk, reference)[:, :width].astype(np.int8)
    losses = np.empty((len(trace), width), np.int8)
    for start in range(0, len(trace), BLOCK):
        block = slice(start, start + BLOCK)
        losses[block] = trace[block].losses(risk, reference)[:, :width]
    return losses


def trade_offs(problem: SearchProblem, points: int) -> Array:
    """Thresholds [P, G] of the best trade-offs on search rows, those that let nothing leave left
    out.

    Of a signed risk also those for its absolute value: a plan that changes few answers has a small
    p-value long before a plan whose gains and losses cancel.
    """
    problems = [problem]
    if problem.losses_NE.min() < 0:
        problems.append(replace(problem, losses_NE=np.abs(problem.losses_NE)))
    found = [frontier(one, points=points, gap=2 * problem.band).thresholds_PG for one in problems]
    thresholds: Array = np.unique(np.concatenate(found), axis=0)
    return np.asarray(thresholds[np.isfinite(thresholds).any(axis=1)])


def in_order(p_P: Array, cost_P: Array) -> Array:
    """Numbers of the candidates worth a test, safest first: each cheaper than all that have a
    smaller p-value.
    """
    order = np.lexsort((cost_P, p_P))
    cheapest = np.minimum.accumulate(np.concatenate([[np.inf], cost_P[order][:-1]]))
    kept: Array = order[cost_P[order] < cheapest]
    return kept
