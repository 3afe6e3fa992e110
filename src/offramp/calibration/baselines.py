"""Baselines: families of plans along one dial. The dial is one shared threshold, one quantile path,
or MSDNet's p^k.

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
    """Plans along a dial.

    Attributes:
        name: of the family.
        loss_D: the summed loss at each position.
        cost_D: the summed cost at each position.
        cuts: gives the cut numbers [S, G] of positions [S].
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
    """Price every position of a dial t, where gate g is at its last cut whose key is >= t.

    Going down the dial, a row moves to ever earlier exits. Exit g is one of its stops if no earlier
    exit takes the row at the same position. A stop changes the sums by the difference between its
    exit and the exit of the row's stop before.
    """
    rows = table.loss_EN.shape[1]
    at = [np.zeros(0)]
    loss = [np.zeros(0)]
    cost = [np.zeros(0)]
    # For each open gate: the position of the dial at which it takes each row, and the first
    # position at which any earlier gate does.
    keys_GN = []
    earlier_GN = []
    earlier_N = np.full(rows, -np.inf)
    for g in table.gates:
        key_N = np.append(keys[g], -np.inf)[table.cuts[g].column_N]
        keys_GN.append(key_N)
        earlier_GN.append(earlier_N)
        earlier_N = np.maximum(earlier_N, key_N)
    # From the last gate back: the stops of a row come in the order in which the dial reaches them.
    now = np.full(rows, len(table.cuts))  # the exit of each row
    for index in reversed(range(len(table.gates))):
        g = table.gates[index]
        key_N = keys_GN[index]
        n = np.flatnonzero(key_N > earlier_GN[index])
        at.append(key_N[n])
        loss.append(table.loss_EN[g, n] - table.loss_EN[now[n], n])
        cost.append(table.cost_EN[g, n] - table.cost_EN[now[n], n])
        now[n] = g
    # Sort all stops by position. The sums after the last stop at a position are its price.
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

    Gate by gate, the threshold is the score of the floor(N q_k)-th most confident row that has not
    left yet, and every row at or above it leaves. We differ where too few rows are left: the exit
    is closed, and does not get the threshold 1e8. The threshold also steps down to the next cut
    between two scores.

    Args:
        table: the chain.
        powers: values of p.

    Returns:
        A plan for each p.
    """
    rows = table.loss_EN.shape[1]
    gates = table.gates
    shares_PE = np.asarray(powers)[:, None] ** np.arange(1, len(gates) + 2)
    wanted_PE = np.floor(rows * shares_PE / shares_PE.sum(1, keepdims=True))
    cuts_PG = np.zeros((len(powers), len(table.cuts)), np.intp)
    left_PN = np.ones((len(powers), rows), bool)
    for k, g in enumerate(gates):
        cuts = table.cuts[g]
        for p in range(len(powers)):
            # how many of the rows that are left have at least the score of each row, best first
            gone_M = np.cumsum(left_PN[p, cuts.order_M])
            index = int(np.searchsorted(gone_M, wanted_PE[p, k]))
            if wanted_PE[p, k] > 0 and index < len(gone_M):
                cuts_PG[p, g] = min(int(cuts.column_N[cuts.order_M[index]]), len(cuts) - 1)
        left_PN &= cuts.column_N[None] > cuts_PG[:, g, None]
    loss_P, cost_P = table.totals(cuts_PG)
    return DialCurve("p^k", loss_P, cost_P, lambda chosen: cuts_PG[chosen])
