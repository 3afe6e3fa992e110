"""Moves on a table of cuts: one gate at all its cuts, two gates at all pairs, descent, hull.

Every curve is a cumulative sum along an order that was sorted once. Legend: N rows, G gates, E
exits, K cuts of the gate that moves. `value_EN` is the value of a row at each exit (loss, cost, or
loss + lam * cost).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import combinations, count

import numpy as np

from offramp.calibration.threshold_table import Bools, Floats, GateCuts, Ints, ThresholdTable

# If at most this many rows leave between two cuts of the first gate, the curve is corrected row by
# row.
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
    """For each gate the value of every row if it goes on there."""
    tail_N = value_EN[-1]
    from_last = []
    for g in reversed(range(len(table.cuts))):
        from_last.append(tail_N)
        if cut_G[g]:
            tail_N = np.where(table.cuts[g].column_N <= cut_G[g], value_EN[g], tail_N)
    return from_last[::-1]


def line(cuts: GateCuts, gain_N: Floats) -> Floats:
    """The summed gains of the rows that leave, at every cut of one gate."""
    sum_M = np.cumsum(gain_N[cuts.order_M])
    curve_K = np.zeros(len(cuts))
    if len(sum_M) == len(cuts) - 1:  # a cut after every row
        curve_K[1:] = sum_M
    else:
        curve_K[1:] = sum_M[cuts.counts_K[1:] - 1]
    return curve_K


def descend(
    table: ThresholdTable, value_EN: Floats, cut_G: Ints, rounds: int = 12
) -> tuple[Ints, float]:
    """Coordinate descent on the summed value, gates last to first and back, until no gate moves.

    Args:
        table: the chain.
        value_EN: the value of every row at every exit.
        cut_G: the plan to start from.
        rounds: how many times, at most.

    Returns:
        The plan and its summed value.
    """
    cut_G = cut_G.copy()
    for _ in range(rounds):
        # From the last gate back: with the later gates fixed, take the best cut of this one.
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
        # And forward again: now the rows that arrive at a gate have changed.
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
    """Each gate moved alone.

    Args:
        table: the chain.
        cut_G: the plan; the other gates stay at its cuts.
        one_EN: values to sum over the rows, by exit.
        two_EN: other values to sum.

    Yields:
        The gate and both sums at all its cuts.
    """
    reach = alive(table, cut_G)
    one_tail = tails(table, one_EN, cut_G)
    two_tail = tails(table, two_EN, cut_G)
    one_now = worth(table, one_EN, cut_G)
    two_now = worth(table, two_EN, cut_G)
    for g in table.gates:
        # curves of gains, shifted so that they have the sum of the plan at its present cut
        one_K = line(table.cuts[g], (one_EN[g] - one_tail[g]) * reach[g])
        two_K = line(table.cuts[g], (two_EN[g] - two_tail[g]) * reach[g])
        yield g, one_K + (one_now - one_K[cut_G[g]]), two_K + (two_now - two_K[cut_G[g]])


def grid(
    table: ThresholdTable,
    cut_G: Ints,
    gates: tuple[int, int],
    steps_S: Ints,
    one_EN: Floats,
    two_EN: Floats,
) -> Iterator[tuple[int, Floats, Floats]]:
    """Two gates moved together.

    The curve over the second gate is summed once and then corrected: a row that now leaves at the
    first gate no longer gains from its own cut of the second gate on.

    Args:
        table: the chain.
        cut_G: the plan; the other gates stay at its cuts.
        gates: the two gates.
        steps_S: cuts of the first gate, ascending.
        one_EN: values to sum over the rows, by exit.
        two_EN: other values to sum.

    Yields:
        The cut of the first gate and both sums at all cuts of the second. The arrays are used
        again: copy them to store them.
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
    """The index of the smallest goal under `below` among those that hold the limit."""
    if not goal_K.min() < below:
        return None
    fits_K = (goal_K < below) & (held_K <= limit)
    if not fits_K.any():
        return None
    return int(np.where(fits_K, goal_K, np.inf).argmin())


def settle(
    table: ThresholdTable,
    cut_G: Ints,
    goal_EN: Floats,
    held_EN: Floats,
    limit: float,
    *,
    width: int = 0,
) -> tuple[Ints, float]:
    """Local search under a limit: the best move of one gate, or of two gates if none helps.

    Args:
        table: the chain.
        cut_G: the plan to start from.
        goal_EN: the values whose sum becomes small.
        held_EN: the values whose sum stays within the limit.
        limit: of the held sum.
        width: how many cuts of the first of two gates are tried; 0 moves one gate only.

    Returns:
        The plan and its goal, +inf if it does not hold the limit.
    """
    goal = np.inf
    if worth(table, held_EN, cut_G) <= limit:
        goal = worth(table, goal_EN, cut_G)
    has_descended = False
    least = 1e-12 * float(abs(goal_EN).max()) * goal_EN.shape[1]  # a smaller gain is rounding
    while True:
        # the new cut of each gate that moves
        moves: dict[int, int] = {}
        moved_goal = goal
        for g, goal_K, held_K in lines(table, cut_G, goal_EN, held_EN):
            k = lowest(goal_K, held_K, limit, moved_goal - least)
            if k is not None:
                moved_goal = float(goal_K[k])
                moves = {g: k}
        if not moves and width:
            moved_goal, moves = _two(
                table, cut_G, goal_EN, held_EN, limit, width=width, goal=goal, least=least
            )
        if moves:
            cut_G = cut_G.copy()
            goal = moved_goal
            for g, k in moves.items():
                cut_G[g] = k
            continue
        if goal < np.inf or has_descended:
            return cut_G, goal
        # No plan so far holds the limit, and no move leads to one: make the held sum small, once.
        has_descended = True
        cut_G, _ = descend(table, held_EN, cut_G)
        if worth(table, held_EN, cut_G) <= limit:
            goal = worth(table, goal_EN, cut_G)


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
    """The first pair of gates that helps, moved to its best cuts; {} if none does."""
    for g, h in combinations(table.gates, 2):
        moves: dict[int, int] = {}
        moved_goal = goal
        steps_S = near(len(table.cuts[g]), int(cut_G[g]), width)
        for step, goal_K, held_K in grid(table, cut_G, (g, h), steps_S, goal_EN, held_EN):
            k = lowest(goal_K, held_K, limit, moved_goal - least)
            if k is not None:
                moved_goal = float(goal_K[k])
                moves = {g: step, h: k}
        if moves:
            return moved_goal, moves
    return goal, {}


def near(size: int, here: int, width: int) -> Ints:
    """About `width` cut numbers: some everywhere, more of them close to `here`. All if there are
    few.
    """
    if size <= width:
        return np.arange(size)
    wide = np.linspace(0, size - 1, width // 2)
    close = np.geomspace(1, size / 8, width // 4)
    steps = np.rint(np.concatenate((wide, here + close, here - close, [here]))).astype(np.intp)
    return np.unique(np.clip(steps, 0, size - 1))


def hull(table: ThresholdTable, nodes: int) -> list[Ints]:
    """Plans on the lower hull of (cost, loss).

    The hull is refined between two plans at a time. The slope of the line between them is a price
    of cost in loss. The plan of least loss + price * cost, found by descent from both ends, is
    either below the line (a new point of the hull, with two new gaps) or on it. The widest gap
    comes first.

    Args:
        table: the chain.
        nodes: how many plans, at most.

    Returns:
        Cut numbers.
    """
    tiny = 1e-9 * spread(table.loss_EN) / spread(table.cost_EN)
    top, _ = descend(table, table.loss_EN + tiny * table.cost_EN, table.never)
    low, _ = descend(table, table.cost_EN + 1e-18 / tiny * table.loss_EN, table.cheapest)
    plans = [low, top]
    heap: list[tuple[float, int, Ints, Ints, float, float]] = []
    number = count()

    def push(cheap: Ints, dear: Ints) -> None:
        loss_2, cost_2 = table.totals(np.stack((cheap, dear)))
        rise = cost_2[1] - cost_2[0]
        fall = loss_2[0] - loss_2[1]
        if rise > 0 and fall > 0:
            price = fall / rise
            on_line = loss_2[1] + price * cost_2[1]  # loss + price * cost, the same at both ends
            heapq.heappush(heap, (-rise * fall, next(number), cheap, dear, price, on_line))

    push(low, top)
    while heap and len(plans) < nodes:
        _, _, cheap, dear, price, on_line = heapq.heappop(heap)
        value_EN = table.loss_EN + price * table.cost_EN
        cut_G, value = descend(table, value_EN, cheap)
        from_dear_G, from_dear_value = descend(table, value_EN, dear)
        if from_dear_value < value:
            cut_G = from_dear_G
            value = from_dear_value
        if value < on_line - 1e-9 * abs(on_line):
            plans.append(cut_G)
            push(cheap, cut_G)
            push(cut_G, dear)
    return plans


def spread(value_EN: Floats) -> float:
    """The range of the values, 1 if they are all equal."""
    return float(np.ptp(value_EN)) or 1.0
