"""Which places pay, from arrays alone: the arithmetic of `at="auto"`. No torch.

Shapes: N labelled rows, of which every other one trains (T) and the rest are held out (H); F
features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOSS = 0.01
GAIN = 0.02
RIDGE = 0.1

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class CutCandidate:
    """A candidate: milliseconds per row up to it (`reach`) and of its exit (`head`), and who could
    leave, bool [H].
    """

    name: str
    reach: float
    head: float
    leaves: Array

    @property
    def share(self) -> float:
        """The part of the held-out rows that could leave here."""
        return float(self.leaves.mean())

    def break_even(self, full: float) -> float:
        """The share from which on this exit alone pays; infinite where nothing is left to save."""
        return self.head / (full - self.reach) if full > self.reach else float("inf")


def chosen(
    candidates: Sequence[CutCandidate], full: float, most: int | None = None
) -> list[CutCandidate]:
    """The places whose exits pay together, in the order of the model; places come in that order."""
    picked: list[CutCandidate] = []
    cost = full
    while most is None or len(picked) < most:
        tried = [
            _ordered([*picked, candidate], candidates)
            for candidate in candidates
            if candidate not in picked
        ]
        best = min(tried, key=lambda some: expected(some, full), default=picked)
        if not expected(best, full) <= cost - GAIN * full:
            break
        picked = best
        cost = expected(best, full)
    for candidate in list(picked):
        rest = [other for other in picked if other is not candidate]
        if expected(rest, full) <= expected(picked, full):
            picked = rest
    return picked


def expected(picked: Sequence[CutCandidate], full: float) -> float:
    """Mean milliseconds of a held-out row: it pays the exits on its way, and leaves at the first
    where it could.
    """
    if not picked:
        return full
    stays = np.ones(len(picked[0].leaves), dtype=bool)
    heads = 0.0
    total = 0.0
    for candidate in picked:
        heads += candidate.head
        total += float((stays & candidate.leaves).mean()) * (candidate.reach + heads)
        stays &= ~candidate.leaves
    return total + float(stays.mean()) * (full + heads)


def probed(features: Array, y: Array, classes: int) -> Array:
    """Scores [H, C] of the odd rows by ridge regression on the even ones: features [N, F], labels
    [N].
    """
    # here, because opening a network imports this file and never comes to this line
    from scipy import linalg

    train_model = features[::2].astype(np.float64)
    held = features[1::2].astype(np.float64)
    mean = train_model.mean(0)
    scale = train_model.std(0)
    # what never varies says nothing
    scale[scale < 1e-6 * max(1.0, float(scale.max(initial=0)))] = np.inf
    train_model = (train_model - mean) / scale
    held = (held - mean) / scale
    targets = np.eye(classes)[y[::2]]
    prior = targets.mean(0)
    # [T, T]: rows are fewer than features more often than not
    kernel = train_model @ train_model.T / train_model.shape[1]
    kernel[np.diag_indices_from(kernel)] += RIDGE
    weights = linalg.solve(kernel, targets - prior, assume_a="pos")
    found: Array = held @ (train_model.T @ weights) / train_model.shape[1] + prior
    return found


def leaving(scores: Array, y: Array, right: Array) -> Array:
    """Which of the held-out rows could leave, bool [H]; right: where the model itself answers as
    the labels say.
    """
    top = np.sort(scores, 1)
    margin = top[:, -1] - top[:, -2]
    order = np.argsort(-margin, kind="stable")
    lost = np.cumsum(right[order].astype(int) - (scores.argmax(1) == y)[order])
    # of rows that tie all leave or none
    last = np.append(margin[order][1:] < margin[order][:-1], True)
    fine = np.flatnonzero(last & (lost <= LOSS * np.arange(1, len(y) + 1)))
    kept = np.zeros(len(y), dtype=bool)
    if len(fine):
        kept[order[: fine[-1] + 1]] = True
    return kept


def _ordered(
    picked: Sequence[CutCandidate], candidates: Sequence[CutCandidate]
) -> list[CutCandidate]:
    return [candidate for candidate in candidates if candidate in picked]
