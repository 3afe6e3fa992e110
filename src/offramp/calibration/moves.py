"""Moves on a table of cuts: one gate at all its cuts, two gates at all pairs, descent, hull.

Every curve is a cumulative sum along an order that was sorted once. Legend: N rows, G gates, E
exits, K cuts of the gate that moves. `value_EN` is what a row is worth at each exit (loss, cost, or
loss + lam * cost).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import combinations, count

import numpy as np

from offramp.calibration.threshold_table import Bools, Floats, GateCuts, Ints, ThresholdTable

# rows that leave between two cuts of the slow gate, up to which the curve is mended row by row
FEW = 6


def alive(table: ThresholdTable, cut_G: Ints) -> list[Bools]:
    """For each gate the rows that reach it."""
    reach = []
    here_N = np.ones(table.loss_EN.shape[1], bool)
    for g, cuts in enumerate(table.cuts):
        reach.append(here_N)
        if cut_G[g]:
            here_N = here_N & (cuts.column_N > cut_G[g])
    return reach


def tails(table: ThresholdTable, value_EN: Floats, cut_G: Ints) -> list[Floats]:
    """For each gate what every row is worth if it goes on there."""
    tail_N = value_EN[-1]
    found = []
    for g in reversed(range(len(table.cuts))):
        found.append(tail_N)
        if cut_G[g]:
            tail_N = np.where(table.cuts[g].column_N <= cut_G[g], value_EN[g], tail_N)
    return found[::-1]


def line(cuts: GateCuts, gain_N: Floats) -> Floats:
    """The sum of the gains of those who leave, at every cut of one gate."""
    sum_M = np.cumsum(gain_N[cuts.order_M])
    curve_K = np.zeros(len(cuts))
    curve_K[1:] = sum_M if len(sum_M) == len(cuts) - 1 else sum_M[cuts.counts_K[1:] - 1]
    return curve_K


def descend(
    table: ThresholdTable, value_EN: Floats, cut_G: Ints, rounds: int = 12
) -> tuple[Ints, float]:
    """Coordinate descent on the summed value, gates last to first and back, until no gate moves."""
    cut_G = cut_G.copy()
    for _ in range(rounds):
        reach = alive(table, cut_G)
        tail_N = value_EN[-1]
        before_G = cut_G.copy()
        behind: dict[int, Floats] = {}
        for g in reversed(table.gates):
            behind[g] = tail_N
            cut_G[g] = line(table.cuts[g], (value_EN[g] - tail_N) * reach[g]).argmin()
            tail_N = np.where(table.cuts[g].column_N <= cut_G[g], value_EN[g], tail_N)
        if (cut_G == before_G).all():
            break
        here_N = np.ones(len(tail_N), bool)
        for g in table.gates[:-1]:
            cut_G[g] = line(table.cuts[g], (value_EN[g] - behind[g]) * here_N).argmin()
            here_N = here_N & (table.cuts[g].column_N > cut_G[g])
    return cut_G, worth(table, value_EN, cut_G)


def worth(table: ThresholdTable, value_EN: Floats, cut_G: Ints) -> float:
    """The summed value of one plan."""
    tail_N = value_EN[-1]
    for g in reversed(table.gates):
        if cut_G[g]:
            tail_N = np.where(table.cuts[g].column_N <= cut_G[g], value_EN[g], tail_N)
    return float(tail_N.sum())


def lines(
    table: ThresholdTable, cut_G: Ints, one_EN: Floats, two_EN: Floats
) -> Iterator[tuple[int, Floats, Floats]]:
    """Each gate moved alone: both sums at all its cuts."""
    reach = alive(table, cut_G)
    values = (one_EN, two_EN)
    behind = [tails(table, value_EN, cut_G) for value_EN in values]
    now = [worth(table, value_EN, cut_G) for value_EN in values]
    for g in table.gates:
        one_K, two_K = (
            line(table.cuts[g], (value_EN[g] - tail[g]) * reach[g])
            for value_EN, tail in zip(values, behind, strict=True)
        )
        yield g, one_K + (now[0] - one_K[cut_G[g]]), two_K + (now[1] - two_K[cut_G[g]])


def grid(
    table: ThresholdTable,
    cut_G: Ints,
    gates: tuple[int, int],
    steps_S: Ints,
    one_EN: Floats,
    two_EN: Floats,
) -> Iterator[tuple[int, Floats, Floats]]:
    """Two gates moved together: for each step of the first, both sums at all cuts of the second.

    The curve is summed once and then mended: a row that now leaves at the first gate is taken out
    of it from its own place on. The arrays are used again; copy what you keep.
    """
    g, h = gates
    first = table.cuts[g]
    second = table.cuts[h]
    free_G = cut_G.copy()
    free_G[[g, h]] = 0
    reach = alive(table, free_G)
    column_N = second.column_N
    curves = []
    moves = []
    for value_EN in (one_EN, two_EN):
        tail = tails(table, value_EN, free_G)
        gain_N = (value_EN[h] - tail[h]) * reach[h]
        curves.append(line(second, gain_N) + worth(table, value_EN, free_G))
        moves.append((value_EN[g] - tail[g], gain_N))
    begin = 0
    for step in steps_S:
        end = int(first.counts_K[step])
        row_R = first.order_M[begin:end]
        row_R = row_R[reach[g][row_R]]
        begin = end
        for curve_K, (leave_N, gain_N) in zip(curves, moves, strict=True):
            if len(row_R) > FEW:
                lost = np.bincount(column_N[row_R], gain_N[row_R], len(second) + 1)[: len(second)]
                curve_K += leave_N[row_R].sum() - np.cumsum(lost)
                continue
            for n in row_R.tolist():
                curve_K += leave_N[n]
                curve_K[column_N[n] :] -= gain_N[n]
        yield int(step), curves[0], curves[1]


def lowest(goal_K: Floats, held_K: Floats, limit: float, below: float) -> int | None:
    """The place of the smallest goal under `below` among those that hold the limit."""
    if not goal_K.min() < below:
        return None
    fit_K = (goal_K < below) & (held_K <= limit)
    return int(np.where(fit_K, goal_K, np.inf).argmin()) if fit_K.any() else None


def settle(
    table: ThresholdTable,
    cut_G: Ints,
    goal_EN: Floats,
    held_EN: Floats,
    limit: float,
    *,
    width: int = 0,
) -> tuple[Ints, float]:
    """Local search under a limit: the best move of one gate, and where none helps (and width > 0)
    of two.
    """
    held = worth(table, held_EN, cut_G)
    goal = worth(table, goal_EN, cut_G) if held <= limit else np.inf
    least = 1e-12 * float(abs(goal_EN).max()) * goal_EN.shape[1]
    while True:
        best: tuple[float, dict[int, int]] = (goal, {})
        for g, goal_K, held_K in lines(table, cut_G, goal_EN, held_EN):
            k = lowest(goal_K, held_K, limit, best[0] - least)
            best = best if k is None else (float(goal_K[k]), {g: k})
        if not best[1] and width:
            best = _two(table, cut_G, goal_EN, held_EN, limit, width=width, goal=goal, least=least)
        if not best[1] and goal == np.inf and held < np.inf:
            held, (cut_G, _) = np.inf, descend(table, held_EN, cut_G)
            if worth(table, held_EN, cut_G) <= limit:
                goal = worth(table, goal_EN, cut_G)
            else:
                goal = np.inf
            continue
        if not best[1]:
            return cut_G, goal
        cut_G = cut_G.copy()
        goal = best[0]
        cut_G[list(best[1])] = list(best[1].values())


def _two(
    table: ThresholdTable,
    cut_G: Ints,
    goal_EN: Floats,
    held_EN: Floats,
    limit: float,
    *,
    width: int,
    goal: float,
    least: float,
) -> tuple[float, dict[int, int]]:
    """The first pair of gates that helps, moved to its best place; {} if none does."""
    for g, h in combinations(table.gates, 2):
        best: tuple[float, dict[int, int]] = (goal, {})
        steps_S = near(len(table.cuts[g]), int(cut_G[g]), width)
        for step, goal_K, held_K in grid(table, cut_G, (g, h), steps_S, goal_EN, held_EN):
            k = lowest(goal_K, held_K, limit, best[0] - least)
            best = best if k is None else (float(goal_K[k]), {g: step, h: k})
        if best[1]:
            return best
    return goal, {}


def near(size: int, here: int, width: int) -> Ints:
    """At most about `width` cut numbers: some everywhere, more of them close to `here`; all if they
    are few.
    """
    if size <= width:
        return np.arange(size)
    wide = np.linspace(0, size - 1, width // 2)
    close = np.geomspace(1, size / 8, width // 4)
    steps = np.rint(np.concatenate((wide, here + close, here - close, [here]))).astype(np.intp)
    return np.unique(np.clip(steps, 0, size - 1))


def hull(table: ThresholdTable, nodes: int) -> list[Ints]:
    """Plans on the lower hull of (cost, loss): the widest gap first, each solved from both its
    ends.
    """
    tiny = 1e-9 * spread(table.loss_EN) / spread(table.cost_EN)
    top, _ = descend(table, table.loss_EN + tiny * table.cost_EN, table.never)
    low, _ = descend(table, table.cost_EN + 1e-18 / tiny * table.loss_EN, table.cheapest)
    found = [low, top]
    heap: list[tuple[float, int, Ints, Ints, float, float]] = []
    number = count()

    def push(cheap: Ints, dear: Ints) -> None:
        loss_2, cost_2 = table.totals(np.stack((cheap, dear)))
        rise = cost_2[1] - cost_2[0]
        fall = loss_2[0] - loss_2[1]
        if rise > 0 and fall > 0:
            at = loss_2[1] + fall / rise * cost_2[1]
            heapq.heappush(heap, (-rise * fall, next(number), cheap, dear, fall / rise, at))

    push(low, top)
    while heap and len(found) < nodes:
        _, _, cheap, dear, lam, at = heapq.heappop(heap)
        value_EN = table.loss_EN + lam * table.cost_EN
        cut_G, value = min(
            (descend(table, value_EN, end) for end in (cheap, dear)), key=lambda pair: pair[1]
        )
        if value < at - 1e-9 * abs(at):
            found.append(cut_G)
            push(cheap, cut_G)
            push(cut_G, dear)
    return found


def spread(value_EN: Floats) -> float:
    """The range of the values, 1 if they are all alike."""
    return float(np.ptp(value_EN)) or 1.0
