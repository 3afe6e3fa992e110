"""The possible thresholds of each gate (cuts), and a chain of exits priced for one set of open
exits.

Legend: N rows, G gates (= E-1), E exits, P plans, K cuts of a gate, M rows that can leave at a
gate. Inside the search a plan is a row of cut numbers: 0 is a closed exit, and k > 0 lets the k
groups of rows with the highest scores leave. Sums, not means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]

CROWD = 1e-3  # the share of the rows that may be within half a gap of a cut
# How far below the smallest score the cut is at which everyone leaves: relative to the score, at
# least absolute.
MARGIN = 1e-3


@dataclass(frozen=True)
class GateCuts:
    """The possible thresholds of one gate, from closed (+inf) down to "everyone leaves".

    Attributes:
        order_M: the rows that can leave at all, the highest score first.
        counts_K: how many rows leave at each cut; the first is 0.
        values_K: the thresholds; the first is +inf.
        column_N: the first cut at which each row leaves; K if there is none.
        lowest_K: the lowest score that leaves at each cut; the first is +inf.
    """

    order_M: Ints
    counts_K: Ints
    values_K: Singles
    column_N: NDArray[np.int32]
    lowest_K: Floats

    def __len__(self) -> int:
        return len(self.values_K)


def cuts_of(score_N: Singles, gap: float = 0.0) -> GateCuts:
    """Every cut between two distinct float32 scores at least `gap` apart, and one below them all.

    Where many rows crowd, few neighbours are so far apart. There a cut is also taken if at most one
    row in a thousand is within half a gap of it. Where scores saturate there are more rows, and no
    cut.

    Args:
        score_N: of every row.
        gap: the least distance of the two scores.

    Returns:
        The cuts.

    Example:
        >>> cuts_of(np.array([3, 1, 3, np.nan], np.float32)).values_K.tolist()
        [inf, 2.0, 0.9990000128746033]
    """
    able_M = np.flatnonzero(score_N > -np.inf)  # neither NaN nor -inf
    order_M = able_M[np.argsort(-score_N[able_M], kind="stable")]
    # a cut after each row: between its score and the next one
    upper_M = score_N[order_M].astype(np.float64)
    lower_M = np.append(upper_M[1:], -np.inf)[: len(upper_M)]
    values_M = _between(upper_M, lower_M, gap).astype(np.float32)
    # rounded to float32 it must still be strictly between
    fits_M = np.isfinite(values_M) & (values_M < upper_M) & (values_M > lower_M)
    with np.errstate(invalid="ignore"):  # inf - inf, where nothing fits anyway
        wide_M = upper_M - lower_M >= gap
    crowd = int(CROWD * len(score_N))
    if gap and crowd:
        rising_M = upper_M[::-1]
        # how many scores are within half a gap of each cut
        near_M = np.searchsorted(rising_M, values_M.astype(np.float64) + gap / 2, side="right")
        near_M -= np.searchsorted(rising_M, values_M.astype(np.float64) - gap / 2, side="left")
        wide_M |= near_M <= crowd
    fits_M &= wide_M
    chosen = np.flatnonzero(fits_M)
    counts_K = np.concatenate(([0], chosen + 1))
    column_N = np.full(len(score_N), len(counts_K), np.int32)
    column_N[order_M] = np.searchsorted(counts_K, np.arange(len(order_M)), side="right")
    return GateCuts(
        order_M=order_M,
        counts_K=counts_K,
        values_K=np.concatenate(([np.inf], values_M[chosen])).astype(np.float32),
        column_N=column_N,
        lowest_K=np.concatenate(([np.inf], upper_M[chosen])),
    )


def thinned(score_N: Singles, most: int) -> Singles:
    """Thresholds of a gate that are spread evenly over its distinct scores.

    Args:
        score_N: of every row.
        most: how many cuts, at most.

    Returns:
        [K] float32, from +inf down.

    Example:
        >>> thinned(np.array([3, 1, 3, np.nan], np.float32), 2).tolist()
        [inf, 2.0, 0.9990000128746033]
    """
    distinct = np.unique(score_N[score_N > -np.inf])[::-1]
    if not len(distinct):
        return np.full(1, np.inf, np.float32)
    index = np.unique(np.linspace(0, len(distinct) - 1, most).astype(np.intp))
    upper = distinct[index].astype(np.float64)
    lower = np.append(distinct[1:], np.float32(-np.inf))[index].astype(np.float64)
    values = _between(upper, lower, 0.0).astype(np.float32)
    fits = np.isfinite(values) & (values < upper) & (values > lower)
    return np.append(np.float32(np.inf), values[fits])


def _between(upper_M: Floats, lower_M: Floats, gap: float) -> Floats:
    """A number between two neighbours. If one is infinite, it keeps a margin to the other one."""
    finite_up = np.isfinite(upper_M)
    finite_low = np.isfinite(lower_M)
    up_M = np.where(finite_up, upper_M, 0.0)
    low_M = np.where(finite_low, lower_M, 0.0)
    above_M = low_M + np.maximum(gap, MARGIN * np.maximum(1.0, abs(low_M)))
    below_M = up_M - np.maximum(gap, MARGIN * np.maximum(1.0, abs(up_M)))
    between_M = np.where(finite_low, np.where(finite_up, 0.5 * (up_M + low_M), above_M), below_M)
    limit = float(np.finfo(np.float32).max)
    return np.where(abs(between_M) <= limit, between_M, np.inf)


def shut(rows: int) -> GateCuts:
    """The cuts of an exit that stays closed."""
    inf = np.full(1, np.inf)
    nothing = np.zeros(0, np.intp)
    return GateCuts(
        nothing, np.zeros(1, np.intp), inf.astype(np.float32), np.ones(rows, np.int32), inf
    )


@dataclass(frozen=True)
class ThresholdTable:
    """A chain with fixed prices.

    Attributes:
        cuts: by gate.
        loss_EN: the loss of every row at every exit.
        cost_EN: its cost there.
    """

    cuts: tuple[GateCuts, ...]
    loss_EN: Floats
    cost_EN: Floats

    @cached_property
    def gates(self) -> tuple[int, ...]:
        """The gates that have a cut besides closed."""
        sizes = np.array([len(cuts) for cuts in self.cuts])
        return tuple(np.flatnonzero(sizes > 1).tolist())

    @property
    def never(self) -> Ints:
        """The plan in which nobody leaves early."""
        return np.zeros(len(self.cuts), np.intp)

    @property
    def cheapest(self) -> Ints:
        """The plan in which everyone leaves as early as possible."""
        return np.array([len(cuts) - 1 for cuts in self.cuts], np.intp)

    def exits(self, cuts_PG: Ints) -> Ints:
        """Where every row leaves under every plan [P, N]."""
        exits_PN = np.full((len(cuts_PG), self.loss_EN.shape[1]), len(self.cuts), np.intp)
        for g in reversed(self.gates):
            np.copyto(exits_PN, g, where=self.cuts[g].column_N <= cuts_PG[:, g, None])
        return exits_PN

    def totals(self, cuts_PG: Ints) -> tuple[Floats, Floats]:
        """Summed loss and cost of each plan."""
        loss_P = np.empty(len(cuts_PG))
        cost_P = np.empty(len(cuts_PG))
        for part in chunks(len(cuts_PG), self.loss_EN.shape[1]):
            exits_PN = self.exits(cuts_PG[part])
            loss_P[part] = pick(self.loss_EN, exits_PN).sum(1)
            cost_P[part] = pick(self.cost_EN, exits_PN).sum(1)
        return loss_P, cost_P

    def thresholds(self, cuts_PG: Ints) -> Singles:
        """The thresholds [P, G] of cut numbers."""
        thresholds_PG = np.zeros(cuts_PG.shape, np.float32)
        for g, cuts in enumerate(self.cuts):
            thresholds_PG[:, g] = cuts.values_K[cuts_PG[:, g]]
        return thresholds_PG


def chunks(plans: int, rows: int) -> Iterator[slice]:
    """Slices of plans that fit into the cache, at least one plan each."""
    size = max(1, 100_000 // max(1, rows))
    for start in range(0, plans, size):
        yield slice(start, start + size)


def pick(values_EN: Floats, exits_PN: Ints) -> Floats:
    """The value [P, N] of each row at the exit where it leaves."""
    # values [E, N] as one line: exit e of row n is at e N + n
    rows = values_EN.shape[1]
    flat: Floats = values_EN.ravel()[exits_PN * rows + np.arange(rows)]
    return flat
