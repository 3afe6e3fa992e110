"""Candidate plans in the order in which they are tested, and their losses with the float band counted against them.

Shapes: P plans, N rows, G gates, E exits (G = E - 1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from offramp.calibration.search import Problem, frontier
from offramp.plan import BAND

Array = np.ndarray[Any, np.dtype[Any]]

STEPS = 64  # grid points per factor of two
OFFSET = 0.37  # keeps round numbers, which scores like to be, off the grid


def shared_path() -> Array:
    """Thresholds [P], one shared by all gates, from the safest down: a grid that was fixed before any row was seen.

    1.1 % steps in either sign from 2^-14 to 2^14, and the same steps of 1 - t down to 2^-22: fine enough for margins,
    probabilities and entropies of any network, so that nothing has to be fitted to the rows that test it.
    """
    wide = 2.0 ** ((np.arange(-14 * STEPS, 14 * STEPS) + OFFSET) / STEPS)
    near_one = 1 - 2.0 ** (-(np.arange(22 * STEPS) + OFFSET) / STEPS)
    grid: Array = np.unique(np.concatenate([wide, -wide, near_one]).astype(np.float32))
    return grid[::-1]


def distinct(path_P: Array, scores_NG: Array, band: float = BAND) -> Array:
    """The points of a shared path that differ on these rows, the band included: the others repeat the same losses.

    Dropping a repetition drops no test: its p-value is that of the point which stays.
    """
    wide = scores_NG[np.isfinite(scores_NG)].astype(np.float64)
    edges = np.sort(np.concatenate([wide - band, wide, wide + band]))
    place = np.searchsorted(edges, path_P.astype(np.float64))
    first = np.ones(len(path_P), bool)
    first[1:] = place[1:] != place[:-1]
    kept: Array = path_P[first]
    return kept


def spread(path_P: Array, gates: int) -> Array:
    """[P, G]: the same threshold at every gate."""
    return np.repeat(path_P[:, None], gates, axis=1).astype(np.float32)


def trade_offs(problem: Problem, points: int) -> Array:
    """Thresholds [P, G] of the best trade-offs on search rows, those that let nothing leave left out.

    Of a signed risk also those for its absolute value: a plan that changes few answers has a small p-value long
    before a plan whose gains and losses cancel.
    """
    problems = [problem]
    if problem.losses_NE.min() < 0:
        problems.append(replace(problem, losses_NE=np.abs(problem.losses_NE)))
    found = [frontier(one, points=points, gap=2 * problem.band).thresholds_PG for one in problems]
    thresholds: Array = np.unique(np.concatenate(found), axis=0)
    return np.asarray(thresholds[np.isfinite(thresholds).any(axis=1)])


def in_order(p_P: Array, cost_P: Array) -> Array:
    """Numbers of the candidates worth a test, safest first: each cheaper than all that have a smaller p-value."""
    order = np.lexsort((cost_P, p_P))
    cheapest = np.minimum.accumulate(np.concatenate([[np.inf], cost_P[order][:-1]]))
    kept: Array = order[cost_P[order] < cheapest]
    return kept


def worst_losses(scores_NG: Array, losses_NE: Array, thresholds_PG: Array, band: float = BAND) -> Array:
    """Losses [P, N] of plans; a row within the band of a threshold counts with the worse of its outcomes."""
    worst = np.broadcast_to(losses_NE[:, -1], (len(thresholds_PG), len(losses_NE)))
    for gate in reversed(range(scores_NG.shape[1])):
        score, t = scores_NG[:, gate].astype(np.float64), thresholds_PG[:, [gate]].astype(np.float64)
        here = losses_NE[:, gate]
        leaves = (score >= t) & (t < np.inf)  # [P, N], as choose has it
        with np.errstate(invalid="ignore"):  # inf - inf is NaN: such a row is not near, it is decided
            either = np.abs(score - t) <= band
        worst = np.where(either, np.maximum(here, worst), np.where(leaves, here, worst))
    return worst


def off_scores(scores_NG: Array, thresholds_PG: Array) -> Array:
    """Which plans [P] have every finite threshold strictly between scores, equal to none."""
    free = np.ones(len(thresholds_PG), bool)
    for gate in range(scores_NG.shape[1]):
        free &= ~np.isin(thresholds_PG[:, gate], scores_NG[:, gate])
    return free
