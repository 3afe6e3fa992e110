"""Baselines: families of plans that one dial turns: one shared threshold, one quantile path,
MSDNet's p^k.

The search starts from them and is never worse. The first two are exact: every useful position of
the dial is priced by one sort and one cumulative sum. Legend: N rows, G gates, E exits, D
positions, P values of p.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from offramp.calibration.threshold_table import Floats, Ints, ThresholdTable

POWERS: Floats = np.linspace(0.05, 1.95, 39)  # the sweep of MSDNet's code


@dataclass(frozen=True)
class DialCurve:
    """Plans along a dial: summed loss and cost of each, and the cut numbers of those one asks
    for.
    """

    name: str
    loss_D: Floats
    cost_D: Floats
    cuts: Callable[[Ints], Ints]  # positions [S] -> cut numbers [S, G]


def baselines(table: ThresholdTable, powers: Floats = POWERS) -> Iterator[DialCurve]:
    """The three families over the open gates of a table."""
    yield _dial(table, "shared threshold", [cuts.lowest_K for cuts in table.cuts])
    yield _dial(table, "quantile path", [-cuts.counts_K.astype(np.float64) for cuts in table.cuts])
    yield powers_of(table, powers)


def _dial(table: ThresholdTable, name: str, keys: list[Floats]) -> DialCurve:
    """Price every position of a dial t, where gate g stands at its last cut whose key is >= t.

    Going down the dial a row moves to ever earlier exits; exit g is one of its stops if no earlier
    exit takes it at the same position. A stop changes the sums by what the row then gains over its
    stop before.
    """
    rows = table.loss_EN.shape[1]
    at = [np.zeros(0)]
    loss = [np.zeros(0)]
    cost = [np.zeros(0)]
    keys_GN = [np.append(keys[g], -np.inf)[table.cuts[g].column_N] for g in table.gates]
    if keys_GN:
        reached_GN = [np.full(rows, -np.inf), *np.maximum.accumulate(keys_GN)]
    else:
        reached_GN = []
    now = np.full(rows, len(table.cuts))
    for g, key_N, before_N in reversed(list(zip(table.gates, keys_GN, reached_GN, strict=False))):
        n = np.flatnonzero(key_N > before_N)
        at.append(key_N[n])
        loss.append(table.loss_EN[g, n] - table.loss_EN[now[n], n])
        cost.append(table.cost_EN[g, n] - table.cost_EN[now[n], n])
        now[n] = g
    at_S = np.concatenate(at)
    order = np.argsort(-at_S, kind="stable")
    at_S = at_S[order]
    if len(at_S):
        last = np.flatnonzero(np.append(at_S[1:] < at_S[:-1], True))
    else:
        last = np.zeros(0, np.intp)
    loss_D = np.append(0.0, np.cumsum(np.concatenate(loss)[order])[last]) + table.loss_EN[-1].sum()
    cost_D = np.append(0.0, np.cumsum(np.concatenate(cost)[order])[last]) + table.cost_EN[-1].sum()
    dial_D = np.append(np.inf, at_S[last])

    def cuts(chosen: Ints) -> Ints:
        cuts = np.zeros((len(chosen), len(table.cuts)), np.intp)
        for g in table.gates:
            cuts[:, g] = np.searchsorted(-keys[g][1:], -dial_D[chosen], side="right")
        cuts[chosen == 0] = 0
        return cuts

    return DialCurve(name, loss_D, cost_D, cuts)


def powers_of(table: ThresholdTable, powers: Floats = POWERS) -> DialCurve:
    """MSDNet's thresholds (Huang et al., 2018, arXiv 1703.09844): exit k answers a share ~ p^k of
    the rows.

    Gate by gate the threshold is the score of the floor(N q_k)-th readiest row not yet gone, and
    every row at or above it goes. We differ where too few rows are left: the exit is closed, not
    given 1e8; and the threshold steps down to the next place between two scores.
    """
    rows = table.loss_EN.shape[1]
    gates = table.gates
    shares_PE = np.asarray(powers)[:, None] ** np.arange(1, len(gates) + 2)
    wanted_PE = np.floor(rows * shares_PE / shares_PE.sum(1, keepdims=True))
    found_PG = np.zeros((len(powers), len(table.cuts)), np.intp)
    left_PN = np.ones((len(powers), rows), bool)
    for k, g in enumerate(gates):
        cuts = table.cuts[g]
        for p in range(len(powers)):
            gone_M = np.cumsum(left_PN[p, cuts.order_M])
            index = int(np.searchsorted(gone_M, wanted_PE[p, k]))
            if wanted_PE[p, k] > 0 and index < len(gone_M):
                found_PG[p, g] = min(int(cuts.column_N[cuts.order_M[index]]), len(cuts) - 1)
        left_PN &= cuts.column_N[None] > found_PG[:, g, None]
    loss_P, cost_P = table.totals(found_PG)
    return DialCurve("p^k", loss_P, cost_P, lambda chosen: found_PG[chosen])
