"""All plans of a shared path evaluated in one pass over the rows, for millions of rows.

A plan of the path lets a row leave at the first gate whose score reaches the shared threshold t.
Walk down the path, from "nobody leaves" to "everyone leaves", and watch a single row. At one gate
it passes three points:

    near   the first plan at which its score is no more than the float band below t: it may leave
    leave  the first plan at which its score reaches t: it leaves, as `plan.choose` has it
    sure   the first plan at which its score is more than the band above t: it leaves in any batch

Between these points nothing changes for this row. So its worst loss along the whole path is a step
function with at most two steps a gate, and the sum over all rows is the running sum of all steps.
Three binary searches a gate and row replace the evaluation of thousands of plans.

Shapes: P plans (plan 0 never leaves, the path follows), N rows, G gates, E exits (G + 1), B groups
of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 16  # rows per pass: their arrays stay in the cache, and memory stays small


def band_edges(thresholds: Array, band: float) -> tuple[Array, Array]:
    """The smallest float32 scores that may leave, and that must leave, at each threshold.

    A score s may leave where s >= t - band and must leave where s > t + band, both computed as
    `abs(s - t) <= band` in float64. The edges are found by rounding and one step to either side, so
    comparing float32 scores with them gives exactly the same result as this formula.

    Args:
        thresholds: float32 [P].
        band: the float band.

    Returns:
        Two float32 arrays [P]: the smallest score that may leave, and the smallest that must leave.
        At t = +inf nobody leaves, and both are NaN.

    Example:
        >>> near, sure = band_edges(np.float32([1.0, np.inf]), 1e-4)
        >>> bool(near[0] < 1 < sure[0]), near[1]
        (True, np.float32(nan))
    """
    t = thresholds.astype(np.float64)
    up = np.float32(np.inf)
    down = np.float32(-np.inf)
    # Each edge is rounded to float32 first. If that number does not pass the test, the next one up
    # does; if even the next one down passes, that one is the smallest.
    # Beyond the largest float32 number the edges become infinite. The results of inf - inf are
    # replaced at the end.
    with np.errstate(over="ignore", invalid="ignore"):
        near = (t - band).astype(np.float32)
        below = np.nextafter(near, down)
        near = np.where(near - t >= -band, near, np.nextafter(near, up))
        near = np.where(below - t >= -band, below, near)
        sure = (t + band).astype(np.float32)
        below = np.nextafter(sure, down)
        sure = np.where(sure - t > band, sure, np.nextafter(sure, up))
        sure = np.where(below - t > band, below, sure)
    for edge in (near, sure):
        edge[thresholds == np.inf] = np.nan
        edge[thresholds == -np.inf] = -np.inf
    return near, sure


@dataclass(frozen=True)
class Steps:
    """The steps of the rows' worst losses along a path, sorted by plan.

    Attributes:
        plan: [S], the plan at which the loss changes.
        group: [S], the group of the row.
        change: [S], of its worst loss.
    """

    plan: Array
    group: Array
    change: Array


@dataclass(frozen=True)
class Sweep:
    """The sums of every plan of a path over the rows.

    Attributes:
        loss_P: the worst loss within the float band, summed over the rows.
        reach_PE: how many rows arrive at each exit.
        carried_PE: the weights of these rows at each exit, summed; None without weights.
        on_score_P: whether the threshold equals the score of some row at some gate.
        never_B: the summed losses of plan 0 by group; None without groups.
        steps: the steps of the losses from plan 0 on; None without groups.
    """

    loss_P: Array
    reach_PE: Array
    carried_PE: Array | None
    on_score_P: Array
    never_B: Array | None
    steps: Steps | None

    @property
    def leaving_P(self) -> Array:
        """How many rows leave before the last exit."""
        leaving: Array = self.reach_PE[:, 0] - self.reach_PE[:, -1]
        return leaving

    def group_sums(self, plans: int) -> Iterator[tuple[Array, Array]]:
        """Summed worst losses of every group, for the plans at which something changes.

        Plans 0 and 1 come first. A plan that is left out has the losses of the plan before it.

        Args:
            plans: how many plans to sum at a time, about.

        Yields:
            Plan numbers [C] and their sums [C, B].
        """
        assert self.never_B is not None
        assert self.steps is not None
        groups = len(self.never_B)
        now_B = self.never_B
        changed, first = np.unique(self.steps.plan, return_index=True)
        # Plan 0 may pass without a test. So plan 1 has sums of its own even if it changes nothing.
        leading = np.arange(2)[: len(self.loss_P)]
        if len(changed) and changed[0] == 1:
            leading = leading[:1]
        yield leading, np.repeat(now_B[None], len(leading), axis=0)
        ends = np.append(first, len(self.steps.plan))
        for start in range(0, len(changed), plans):
            plans_C = changed[start : start + plans].astype(np.intp)
            rows = slice(ends[start], ends[start + len(plans_C)])
            # Sum the steps into one cell per plan and group. The running sum over plans then starts
            # from the end of the last chunk.
            plan = np.searchsorted(plans_C, self.steps.plan[rows])
            cell = plan * groups + self.steps.group[rows]
            change = np.bincount(cell, self.steps.change[rows], len(plans_C) * groups)
            sums_CB = change.reshape(len(plans_C), groups)
            sums_CB[0] += now_B
            np.cumsum(sums_CB, axis=0, out=sums_CB)
            now_B = sums_CB[-1].copy()
            yield plans_C, sums_CB


def sweep(
    path_P: Array,
    scores_NG: Array,
    losses_NE: Array,
    band: float,
    *,
    weights: Sequence[Array | None] = (),
    groups: Array | None = None,
) -> Sweep:
    """Evaluate the plan that never leaves and every plan of a shared path.

    Args:
        path_P: float32 thresholds from high to low, without +inf.
        scores_NG: float32 scores.
        losses_NE: losses of any type. Sums are exact if they are multiples of a power of two.
        band: the float band.
        weights: for each exit a weight [N] of every row that arrives there (its cost), or None for
            no weights.
        groups: the group [N] of every row, from 0, if sums of losses by group are needed.

    Returns:
        The sums of P = len(path_P) + 1 plans. Plan 0 never leaves.
    """
    rows, gates = scores_NG.shape
    plans = len(path_P) + 1
    near_edges, sure_edges = band_edges(path_P, band)
    # Arrays by plan have one more place at the end, for changes that no plan of the path makes.
    change_P = np.zeros(plans + 1)
    gone_PE = np.zeros((plans + 1, gates + 1))
    weighed_PE = None
    if [weight for weight in weights if weight is not None]:
        weighed_PE = np.zeros((plans + 1, gates + 1))
    on_score_P = np.zeros(plans + 1, bool)
    pieces: list[Steps] = []
    # without a gate nobody leaves, and nothing changes along the path
    for start in range(0, rows if gates else 0, BLOCK):
        block = slice(start, start + BLOCK)
        scores = scores_NG[block]
        losses = losses_NE[block]
        leave_NG = _first_reached_at_gates(path_P, scores)
        _note_scores(on_score_P, path_P, scores, leave_NG)
        block_weights: list[Array | None] = []
        for weight in weights:
            block_weights.append(None if weight is None else weight[block])
        _note_leaving(gone_PE, weighed_PE, leave_NG, block_weights)
        # rows with the same loss at every exit have no step
        stepping = np.flatnonzero((losses != losses[:, :1]).any(1))
        near_NG = _first_reached_at_gates(near_edges, scores[stepping])
        sure_NG = _first_reached_at_gates(sure_edges, scores[stepping])
        plan, row, change = _steps(near_NG, sure_NG, losses[stepping], plans)
        change_P += np.bincount(plan, change, plans + 1)
        if groups is not None:
            pieces.append(Steps(_compact(plan, plans), groups[block][stepping][row], change))
    # the running sum of the changes, from the losses of plan 0 on
    loss_P = losses_NE[:, -1].sum(dtype=np.float64) + np.cumsum(change_P[:plans])
    reach_PE = rows - np.cumsum(gone_PE[:plans], axis=0)
    carried_PE = None
    if weighed_PE is not None:
        totals = [0.0 if weight is None else float(weight.sum()) for weight in weights]
        carried_PE = np.array(totals) - np.cumsum(weighed_PE[:plans], axis=0)
    never_B = None
    steps = None
    if groups is not None:
        never_B = np.bincount(groups, losses_NE[:, -1], int(groups.max()) + 1)
        steps = _in_order(pieces)
    return Sweep(loss_P, reach_PE, carried_PE, on_score_P[:plans], never_B, steps)


def _first_reached_at_gates(edges_P: Array, scores_NG: Array) -> Array:
    """`_first_reached` for the scores of every gate, [N, G]."""
    return np.stack([_first_reached(edges_P, score_N) for score_N in scores_NG.T], 1)


def _first_reached(edges_P: Array, score_N: Array) -> Array:
    """The first plan [N], from 1, whose edge the score reaches; len(edges) + 1 if none is."""
    # Edges fall along the path, so their negatives rise and a binary search finds the position. A
    # NaN score sorts behind everything and reaches nothing.
    index: Array = np.searchsorted(-edges_P, -score_N, side="left") + 1
    return index


def _note_scores(on_score_P: Array, path_P: Array, scores_NG: Array, leave_NG: Array) -> None:
    """Mark the plans whose threshold is a score."""
    reached = leave_NG <= len(path_P)
    plan = leave_NG[reached]
    on_score_P[plan[path_P[plan - 1] == scores_NG[reached]]] = True


def _note_leaving(
    gone_PE: Array, weighed_PE: Array | None, leave_NG: Array, weights: Sequence[Array | None]
) -> None:
    """Count, for every exit but the first, at which plan each row stops arriving there.

    A row stops arriving at an exit when any gate before it lets the row leave.
    """
    stops = np.full(len(leave_NG), len(gone_PE) - 1)
    for exit_ in range(1, gone_PE.shape[1]):
        stops = np.minimum(stops, leave_NG[:, exit_ - 1])
        gone_PE[:, exit_] += np.bincount(stops, minlength=len(gone_PE))
        if weighed_PE is None:
            continue
        weight = weights[exit_]
        if weight is not None:
            weighed_PE[:, exit_] += np.bincount(stops, weight, len(gone_PE))


def _steps(
    near_NG: Array, sure_NG: Array, losses_NE: Array, plans: int
) -> tuple[Array, Array, Array]:
    """The steps of the rows' worst losses: plan, row and change [S].

    Each row has K = 2 G points at which its worst loss may change. They are sorted, and the worst
    loss is computed at each. Where it differs from the point before, there is a step.
    """
    points_NK = np.sort(np.concatenate([near_NG, sure_NG], axis=1), axis=1)  # K = 2 G
    before_N = losses_NE[:, -1]
    plans_of_steps = []
    rows_of_steps = []
    changes = []
    for k in range(points_NK.shape[1]):
        plan_N = points_NK[:, k]
        # From the last exit back: at each gate the row surely goes on, surely leaves, or may do
        # either, and then the worse of both counts.
        worst_N = losses_NE[:, -1]
        for gate in reversed(range(near_NG.shape[1])):
            here_N = losses_NE[:, gate]
            undecided_N = np.where(plan_N >= near_NG[:, gate], np.maximum(here_N, worst_N), worst_N)
            worst_N = np.where(plan_N >= sure_NG[:, gate], here_N, undecided_N)
        change_N = worst_N - before_N
        row = np.flatnonzero((change_N != 0) & (plan_N < plans))
        plans_of_steps.append(plan_N[row])
        rows_of_steps.append(row)
        changes.append(change_N[row])
        before_N = worst_N
    return np.concatenate(plans_of_steps), np.concatenate(rows_of_steps), np.concatenate(changes)


def _compact(plan: Array, plans: int) -> Array:
    """Plan numbers in as few bytes as possible, because NumPy sorts short integers faster."""
    return plan.astype(np.uint16 if plans < 1 << 16 else np.uint32)


def _in_order(pieces: Sequence[Steps]) -> Steps:
    """All steps, sorted by plan."""
    if not pieces:
        return Steps(np.zeros(0, np.uint16), np.zeros(0, np.intp), np.zeros(0))
    plan = np.concatenate([piece.plan for piece in pieces])
    group = np.concatenate([piece.group for piece in pieces])
    change = np.concatenate([piece.change for piece in pieces])
    order = np.argsort(plan, kind="stable")
    return Steps(plan[order], group[order], change[order])
