"""The arithmetic of `at="auto"`: choose the cuts where exits pay, from arrays, without torch.

Shapes: N labelled rows, of which every other one trains (T) and the others are held out (H); F
features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOSS = 0.01  # the share of leaving rows that may be lost
GAIN = 0.02  # the share of the plain model's time that a further exit must save
RIDGE = 0.1  # weight of the penalty

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class CutCandidate:
    """A place for an exit, with its measurements.

    Attributes:
        name: the module to cut after.
        reach: milliseconds per row up to the cut.
        head: milliseconds per row of the exit.
        leaves: whether each held-out row could leave here, bool [H].
    """

    name: str
    reach: float
    head: float
    leaves: Array

    @property
    def share(self) -> float:
        """The share of the held-out rows that could leave here."""
        return float(self.leaves.mean())

    def break_even(self, full: float) -> float:
        """The share of leaving rows above which this exit alone pays.

        Args:
            full: milliseconds per row of the plain model.

        Returns:
            The share; infinite if no time is left to save.
        """
        if full <= self.reach:
            return float("inf")
        return self.head / (full - self.reach)


def chosen(
    candidates: Sequence[CutCandidate], full: float, most: int | None = None
) -> list[CutCandidate]:
    """Choose the cuts whose exits pay together.

    The search is greedy. Add the best candidate as long as it saves enough time, then take out
    those that have become useless.

    Args:
        candidates: in the order of the model.
        full: milliseconds per row of the plain model.
        most: the largest number of cuts; None if there is no limit.

    Returns:
        The chosen candidates, in the order of the model.
    """
    picked: list[CutCandidate] = []
    cost = full
    while most is None or len(picked) < most:
        # Find the candidate that gives the lowest mean time together with those picked so far.
        best = picked
        best_cost = np.inf
        for candidate in candidates:
            if candidate in picked:
                continue
            trial = [other for other in candidates if other in picked or other is candidate]
            trial_cost = expected(trial, full)
            if trial_cost < best_cost:
                best = trial
                best_cost = trial_cost
        if not best_cost <= cost - GAIN * full:
            break
        picked = best
        cost = best_cost
    # A cut that was picked early may not pay any more next to the later ones.
    for candidate in list(picked):
        rest = [other for other in picked if other is not candidate]
        if expected(rest, full) <= expected(picked, full):
            picked = rest
    return picked


def expected(picked: Sequence[CutCandidate], full: float) -> float:
    """The mean milliseconds of a held-out row with some exits.

    A row pays for all exits on its way, and leaves at the first one where it can.

    Args:
        picked: the exits, in the order of the model.
        full: milliseconds per row of the plain model.
    """
    if not picked:
        return full
    stays = np.ones(len(picked[0].leaves), dtype=bool)  # [H], rows that have not left
    heads = 0.0  # of the exits so far
    total = 0.0
    for candidate in picked:
        heads += candidate.head
        leaving_share = float((stays & candidate.leaves).mean())
        total += leaving_share * (candidate.reach + heads)
        stays &= ~candidate.leaves
    return total + float(stays.mean()) * (full + heads)


def probed(features: Array, y: Array, classes: int) -> Array:
    """Score the held-out rows by ridge regression on the other ones.

    Args:
        features: [N, F]. Even rows train, odd rows are held out.
        y: labels [N].
        classes: number of classes C.

    Returns:
        Scores [H, C] of the odd rows.
    """
    # imported here, because opening a network imports this file and does not need it
    from scipy import linalg

    train = features[::2].astype(np.float64)  # [T, F]
    held_out = features[1::2].astype(np.float64)  # [H, F]
    mean = train.mean(0)
    scale = train.std(0)
    # a feature that does not vary is scaled to 0
    scale[scale < 1e-6 * max(1.0, float(scale.max(initial=0)))] = np.inf
    train = (train - mean) / scale
    held_out = (held_out - mean) / scale
    targets = np.eye(classes)[y[::2]]  # [T] -> [T, C]
    prior = targets.mean(0)
    # The dual form solves a system of [T, T] instead of [F, F]: there are usually fewer rows than
    # features.
    kernel = train @ train.T / train.shape[1]
    kernel[np.diag_indices_from(kernel)] += RIDGE
    weights = linalg.solve(kernel, targets - prior, assume_a="pos")  # [T, C]
    scores: Array = held_out @ (train.T @ weights) / train.shape[1] + prior
    return scores


def leaving(scores: Array, y: Array, right: Array) -> Array:
    """Find the held-out rows that could leave.

    Sort the rows by margin, and count the rows that are lost against the model along the way. The
    rows up to the last point where at most 1 % are lost could leave.

    Args:
        scores: of the exit [H, C].
        y: labels [H].
        right: whether the model itself answers each row right, bool [H].

    Returns:
        Whether each row could leave, bool [H].
    """
    top = np.sort(scores, 1)
    margin = top[:, -1] - top[:, -2]  # [H, C] -> [H]
    order = np.argsort(-margin, kind="stable")
    # rows that only the model answers right, minus rows that only the exit answers right
    lost = np.cumsum(right[order].astype(int) - (scores.argmax(1) == y)[order])
    # rows with equal margins leave together: only the last of them may be the end
    ends = np.append(margin[order][1:] < margin[order][:-1], True)
    allowed = np.flatnonzero(ends & (lost <= LOSS * np.arange(1, len(y) + 1)))
    leaves = np.zeros(len(y), dtype=bool)
    if len(allowed):
        leaves[order[: allowed[-1] + 1]] = True
    return leaves
