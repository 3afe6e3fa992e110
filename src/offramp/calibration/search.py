"""The search for thresholds of a chain: least cost at a loss, least loss at a cost, and the best
trade-offs between.

It is exact for one and two gates, and where the plans are few enough to try each of them. For more
gates it uses the hull of the Lagrangian, lines through it, and a local search at the requested
level. It is never worse than one shared threshold, one quantile path or MSDNet's p^k. Legend: N
rows, G gates (= E-1), E exits, P plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from offramp.calibration.archive import (
    EVERY_SET,
    SAMPLE,
    OpenSets,
    every,
    fill_archive,
    small,
    tables,
    undominated,
)
from offramp.calibration.baselines import POWERS, baselines, powers_of
from offramp.calibration.moves import lowest, settle, spread, worth
from offramp.calibration.refining import Refiner
from offramp.calibration.sweep import BLOCK
from offramp.calibration.threshold_table import (
    Bools,
    Floats,
    Ints,
    Singles,
    ThresholdTable,
    chunks,
    pick,
)
from offramp.errors import BadData, InvalidArgument, OutOfBudget
from offramp.plans.provenance import BAND

FINE = 4  # places along the cost axis for every requested point of the frontier
ROUNDING = 1e-12  # a limit counts as held up to this share of its scale
TIE = 1e-9  # between plans nearer than this share of the scale, the other sum decides
WIDTH = 128  # cuts of the first gate that are tried when two gates move
SEARCH_ROWS = 10_000  # rows of the search; plans are priced, and refined, on all rows
FINE_POWERS = np.geomspace(0.05, 4.0, 120)  # p of p^k at one level, where MSDNet solves for p


@dataclass(frozen=True)
class SearchProblem:
    """The scores, losses and prices of a chain, for the search.

    Attributes:
        scores_NG: float32.
        losses_NE: of any sign.
        cost_to: gives the mean cost of leaving at each exit, [E] or [N, E], when only some exits
            [E] are open. The last one always is. Closing an exit may make later exits cheaper, and
            must not make any more expensive.
        band: within this distance of a threshold a row may leave or go on.

    Raises:
        BadData: the arrays do not fit together, or a loss is not finite.
    """

    scores_NG: Singles
    losses_NE: Floats
    cost_to: Callable[[Bools], Floats]
    band: float = BAND

    def __post_init__(self) -> None:
        rows, exits = np.shape(self.losses_NE)
        if (
            self.scores_NG.dtype != np.float32
            or self.scores_NG.shape != (rows, exits - 1)
            or not rows
        ):
            raise BadData(
                f"scores must be float32 [rows, exits - 1] = {(rows, exits - 1)} with at least one "
                f"row, got {self.scores_NG.dtype} {self.scores_NG.shape}"
            )
        if not np.isfinite(self.losses_NE).all():
            bad = np.flatnonzero(~np.isfinite(self.losses_NE).all(1))
            raise BadData(
                f"the loss of row {bad[0]} and {len(bad) - 1} others is not finite; leave them out"
            )

    def cost(self, open_E: Bools) -> Floats:
        """Prices as [N, E] (a view), 0 at the closed exits."""
        rows, exits = self.losses_NE.shape
        cost = np.asarray(self.cost_to(open_E.copy()), np.float64)
        if cost.shape not in ((exits,), (rows, exits)) or not np.isfinite(cost[..., open_E]).all():
            raise BadData(
                f"cost_to must give finite numbers [{exits}] or [{rows}, {exits}], got {cost.shape}"
            )
        return np.broadcast_to(np.where(open_E, cost, 0.0), (rows, exits))


@dataclass(frozen=True)
class Frontier:
    """Plans from the cheapest to the most expensive, each with less loss than the one before.

    Attributes:
        thresholds_PG: float32.
        loss_P: mean losses.
        cost_P: mean costs.
    """

    thresholds_PG: Singles
    loss_P: Floats
    cost_P: Floats

    def __len__(self) -> int:
        return len(self.loss_P)


@dataclass(frozen=True)
class PlanPoint:
    """One plan.

    Attributes:
        thresholds_G: float32.
        loss: mean, on the rows of the search.
        cost: mean, on the rows of the search.
    """

    thresholds_G: Singles
    loss: float
    cost: float


def exits_of(scores_NG: Singles, thresholds_PG: Singles) -> Ints:
    """Where every row leaves under every plan: `plan.choose` at each gate in turn, for many plans.

    Args:
        scores_NG: float32.
        thresholds_PG: float32.

    Returns:
        Numbers of exits [P, N].

    Example:
        >>> scores = np.float32([[1, 2], [0, np.inf], [np.nan, 1]])
        >>> exits_of(scores, np.float32([[1, np.inf], [2, 2]]))
        array([[0, 2, 2],
               [1, 1, 2]])
    """
    rows, gates = scores_NG.shape
    exits_PN = np.full((len(thresholds_PG), rows), gates, np.intp)
    for g in reversed(range(gates)):
        bar_P1 = thresholds_PG[:, g, None]
        np.copyto(exits_PN, g, where=(scores_NG[:, g] >= bar_P1) & (bar_P1 < np.inf))
    return exits_PN


def evaluate(problem: SearchProblem, thresholds_PG: Singles) -> tuple[Floats, Floats]:
    """Price plans on all rows. An exit at +inf is neither run nor charged.

    Rows are taken in blocks, so a million of them need no more memory than one block.

    Args:
        problem: scores, losses and prices.
        thresholds_PG: float32.

    Returns:
        Mean loss [P] and mean cost [P].

    Raises:
        InvalidArgument: the thresholds have another shape or type.
    """
    rows, exits = problem.losses_NE.shape
    if thresholds_PG.dtype != np.float32 or thresholds_PG.shape[1:] != (exits - 1,):
        raise InvalidArgument(
            f"thresholds must be float32 [P, {exits - 1}], got {thresholds_PG.dtype} "
            f"{thresholds_PG.shape}"
        )
    loss_P = np.zeros(len(thresholds_PG))
    cost_P = np.zeros(len(thresholds_PG))
    # Plans with the same open exits have the same prices: work set by set.
    open_PE = np.append(thresholds_PG < np.inf, np.ones((len(thresholds_PG), 1), bool), axis=1)
    sets_SE, set_P = np.unique(open_PE, axis=0, return_inverse=True)
    for s, open_E in enumerate(sets_SE):
        plans = np.flatnonzero(set_P.ravel() == s)
        cost_NE = problem.cost(open_E)
        for start in range(0, rows, BLOCK):
            block = slice(start, start + BLOCK)
            scores_BG = problem.scores_NG[block]
            loss_EB = np.ascontiguousarray(problem.losses_NE[block].T)
            cost_EB = np.ascontiguousarray(cost_NE[block].T)
            for part in chunks(len(plans), len(scores_BG)):
                exits_PB = exits_of(scores_BG, thresholds_PG[plans[part]])
                loss_P[plans[part]] += pick(loss_EB, exits_PB).sum(1, dtype=np.float64)
                cost_P[plans[part]] += pick(cost_EB, exits_PB).sum(1)
    return loss_P / rows, cost_P / rows


def frontier(problem: SearchProblem, *, points: int = 100, gap: float = 0.0) -> Frontier:
    """The best trade-offs of loss and cost: no plan is worse than another one in both.

    The plan that never leaves is always included, even where leaving early both costs and loses
    less.

    Args:
        problem: scores, losses and prices.
        points: how many plans, at most.
        gap: cuts between scores nearer than this are not used.

    Returns:
        The plans, cheapest first.
    """
    open_sets, over = _laid_out(_sampled(problem), gap)
    loss_B, cost_B, cuts_BG = fill_archive(open_sets, over, FINE * points).plans()
    chosen = _spaced(loss_B, cost_B, points - 1)
    plans_PG = np.concatenate((open_sets.tidy(cuts_BG[chosen]), over[0].never[None]))
    thresholds_PG = open_sets.whole().thresholds(plans_PG)
    loss_P, cost_P = evaluate(problem, thresholds_PG)
    front = undominated(loss_P, cost_P)
    has_never = (thresholds_PG[front] == np.inf).all(1).any()
    if not has_never:
        front = np.append(front, len(plans_PG) - 1)
        front = front[np.lexsort((loss_P[front], cost_P[front]))]
    return Frontier(thresholds_PG[front], loss_P[front], cost_P[front])


def powers(problem: SearchProblem) -> Singles:
    """MSDNet's plans [P, G] on these rows: exit k answers a share ~ p^k, for a sweep of p (see
    `baselines.powers_of`).
    """
    whole = OpenSets.of(problem.scores_NG, problem.losses_NE, problem.cost, 0.0).whole()
    return whole.thresholds(powers_of(whole).cuts(np.arange(len(POWERS))))


def _sampled(problem: SearchProblem) -> SearchProblem:
    """The problem on at most SEARCH_ROWS rows. The draw depends only on the number of rows."""
    rows = len(problem.losses_NE)
    if rows <= SEARCH_ROWS:
        return problem
    drawn = np.random.Generator(np.random.Philox(0)).random(rows)
    sample = np.sort(np.argpartition(drawn, SEARCH_ROWS)[:SEARCH_ROWS])

    def cost_to(open_E: Bools) -> Floats:
        cost = np.asarray(problem.cost_to(open_E))
        if cost.ndim == 1:  # [E], the same for all rows
            return cost
        return cost[sample]

    return replace(
        problem,
        scores_NG=problem.scores_NG[sample],
        losses_NE=problem.losses_NE[sample],
        cost_to=cost_to,
    )


def _laid_out(problem: SearchProblem, gap: float) -> tuple[OpenSets, list[ThresholdTable]]:
    """The chain of a problem, and its tables under the open sets worth a search."""
    open_sets = OpenSets.of(problem.scores_NG, problem.losses_NE, problem.cost, gap)
    step = -(-len(problem.losses_NE) // SAMPLE)  # rounded up
    if step == 1 or len(open_sets.cuts) <= EVERY_SET or open_sets.fixed:
        return open_sets, tables(open_sets, open_sets)
    # the greedy choice of open sets looks at every step-th row
    sample = OpenSets.of(
        problem.scores_NG[::step],
        problem.losses_NE[::step],
        lambda open_E: problem.cost(open_E)[::step],
        gap,
    )
    return open_sets, tables(open_sets, sample)


def _spaced(loss_P: Floats, cost_P: Floats, points: int) -> Ints:
    """Plans that are evenly spread along the curve of (cost, loss), with both ends."""
    if len(loss_P) <= points:
        return np.arange(len(loss_P))
    # The way along the curve: steps of cost and loss, both as shares of their range.
    steps = np.diff(cost_P) / np.ptp(cost_P) - np.diff(loss_P) / np.ptp(loss_P)
    way_P = np.append(0.0, np.cumsum(steps))
    targets = np.linspace(0, way_P[-1], points)
    chosen = np.unique(np.searchsorted(way_P, targets).clip(0, len(way_P) - 1))
    # Several targets may have chosen the same plan: fill up with others.
    spare = np.setdiff1d(np.arange(len(loss_P)), chosen)
    more = spare[np.linspace(0, len(spare) - 1, points - len(chosen)).astype(np.intp)]
    return np.union1d(chosen, more)


def cheapest(problem: SearchProblem, at_most: float, *, gap: float = 0.0) -> PlanPoint:
    """The plan of least mean cost whose mean loss is at most `at_most` (up to rounding).

    Args:
        problem: scores, losses and prices.
        at_most: the level.
        gap: cuts between scores nearer than this are not used.

    Returns:
        The plan.

    Raises:
        InvalidArgument: no plan found holds the level.
    """
    point = _solve(problem, gap, at_most, loss_held=True)
    if point is None:
        raise InvalidArgument(
            f"no plan found has a mean loss of at most {at_most:g} on these rows; ask for a "
            f"higher level"
        )
    return point


def best(problem: SearchProblem, budget: float, *, gap: float = 0.0) -> PlanPoint:
    """The plan of least mean loss whose mean cost is at most `budget` (up to rounding).

    Args:
        problem: scores, losses and prices.
        budget: the mean cost.
        gap: cuts between scores nearer than this are not used.

    Returns:
        The plan.

    Raises:
        OutOfBudget: no plan found is so cheap.
    """
    point = _solve(problem, gap, budget, loss_held=False)
    if point is None:
        raise OutOfBudget(
            f"no plan found costs at most {budget:g} on these rows; ask for a larger budget"
        )
    return point


@dataclass(frozen=True)
class _Ask:
    """Which sum becomes small (the goal), and which stays within a limit (held).

    Attributes:
        loss_held: whether the loss is held. Otherwise the cost is.
        limit: of the held sum.
        tie: how much the held sum counts in the goal, so that it decides between equal goals.
    """

    loss_held: bool
    limit: float
    tie: float

    @staticmethod
    def at(table: ThresholdTable, level: float, loss_held: bool) -> _Ask:
        """The question at a level of the mean."""
        goal_EN = table.loss_EN
        held_EN = table.cost_EN
        if loss_held:
            goal_EN = table.cost_EN
            held_EN = table.loss_EN
        slack = ROUNDING * max(abs(level), float(abs(held_EN).max()))
        limit = (level + slack) * held_EN.shape[1]
        return _Ask(loss_held, limit, TIE * spread(goal_EN) / spread(held_EN))

    def sums(self, loss: Floats, cost: Floats) -> tuple[Floats, Floats]:
        """Goal and held values of losses and costs of any shape."""
        if self.loss_held:
            return cost + self.tie * loss, loss
        return loss + self.tie * cost, cost


def _solve(
    problem: SearchProblem, gap: float, level: float, *, loss_held: bool
) -> PlanPoint | None:
    """The plan of least goal that holds the level; None if no plan found holds it.

    With many rows a sample is searched, and the plan is refined on all rows.
    """
    sample = _sampled(problem)
    if sample is problem:
        return _solve_all(problem, gap, level, loss_held=loss_held)
    point = _solve_all(sample, gap, level, loss_held=loss_held)
    if point is not None:
        start_G = point.thresholds_G
    else:
        # No plan holds the level on the sample. Perhaps one does on all rows: start from the plan
        # with the least held sum.
        ends_PG = frontier(sample, gap=gap).thresholds_PG
        start_G = ends_PG[-1 if loss_held else 0]
    every_E = np.ones(problem.losses_NE.shape[1], bool)
    sample_table = OpenSets.of(sample.scores_NG, sample.losses_NE, sample.cost, gap).whole()
    tie = _Ask.at(sample_table, level, loss_held).tie
    held = problem.losses_NE if loss_held else np.asarray(problem.cost_to(every_E))
    slack = ROUNDING * max(abs(level), abs(float(held.min())), abs(float(held.max())))
    refiner = Refiner(
        problem.scores_NG, problem.losses_NE, problem.cost, loss_held=loss_held, tie=tie
    )
    better = refiner.refined(refiner.cuts_at(start_G), (level + slack) * len(problem.losses_NE))
    if better is None:
        return None
    thresholds_PG = refiner.thresholds(better.cut_G)[None]
    loss_P, cost_P = evaluate(problem, thresholds_PG)
    return PlanPoint(thresholds_PG[0], float(loss_P[0]), float(cost_P[0]))


def _solve_all(
    problem: SearchProblem, gap: float, level: float, *, loss_held: bool
) -> PlanPoint | None:
    """Try every plan of small tables, and search around the level in the others."""
    open_sets, over = _laid_out(problem, gap)
    ask = _Ask.at(open_sets.whole(), level, loss_held)
    plans: list[tuple[float, Ints]] = []  # goal and cuts
    wide = list[ThresholdTable]()
    for table in over:
        if small(table):
            plans.append(_tried(table, ask))
        else:
            wide.append(table)
    if wide:
        plans += _settled(open_sets, wide, ask)
    goal, cut_G = min(plans, key=lambda pair: pair[0])
    if goal == np.inf:
        return None
    thresholds_PG = open_sets.whole().thresholds(open_sets.tidy(cut_G[None]))
    loss_P, cost_P = evaluate(problem, thresholds_PG)
    return PlanPoint(thresholds_PG[0], float(loss_P[0]), float(cost_P[0]))


def _tried(table: ThresholdTable, ask: _Ask) -> tuple[float, Ints]:
    """The best plan of a table by trying every one."""
    goal_EN, held_EN = ask.sums(table.loss_EN, table.cost_EN)
    goal = np.inf
    best_G = table.never
    if worth(table, held_EN, best_G) <= ask.limit:
        goal = worth(table, goal_EN, best_G)
    for cut_G, g, goal_K, held_K in every(table, goal_EN, held_EN):
        k = lowest(goal_K, held_K, ask.limit, goal)
        if k is not None:
            goal = float(goal_K[k])
            best_G = cut_G.copy()
            best_G[g] = k
    return goal, best_G


def _settled(
    open_sets: OpenSets, over: list[ThresholdTable], ask: _Ask
) -> list[tuple[float, Ints]]:
    """Local searches from many plans near the level: their goals and cuts."""
    # Start from the best plan of every baseline, from the best plans of the archive and those on
    # both sides of the level, and from random ones.
    starts = []
    for table in over:
        for curve in baselines(table, FINE_POWERS):
            goal_D, held_D = ask.sums(curve.loss_D, curve.cost_D)
            d = lowest(goal_D, held_D, ask.limit, np.inf)
            if d is not None:
                starts.append(curve.cuts(np.array([d]))[0])
    many = max(4, min(24, 20_000 // len(open_sets.loss_EN[0])))  # fewer for many rows
    loss_B, cost_B, cuts_BG = fill_archive(open_sets, over, FINE * 100).plans()
    goal_B, held_B = ask.sums(loss_B, cost_B)
    by_goal = np.argsort(np.where(held_B <= ask.limit, goal_B, np.inf))
    by_distance = np.argsort(abs(held_B - ask.limit))
    starts += list(cuts_BG[by_goal[:2]])
    starts += list(cuts_BG[by_distance[:many]])
    if many > 4:
        random = np.random.Generator(np.random.Philox(0)).random((many, len(open_sets.cuts)))
        sizes = [len(cuts) for cuts in open_sets.cuts]
        starts += list((random * sizes).astype(np.intp))
    # A quick search from each, then a thorough one from the better half.
    plans = []
    for cut_G in np.unique(np.stack(starts), axis=0):
        plans.append(_closed_in(open_sets, cut_G, ask, 0))
    plans.sort(key=lambda pair: pair[0])
    return [_closed_in(open_sets, cut_G, ask, WIDTH) for _, cut_G in plans[: many // 2]]


def _closed_in(open_sets: OpenSets, cut_G: Ints, ask: _Ask, width: int) -> tuple[float, Ints]:
    """Settle with the exits in use open, then without each of them in turn, while that helps."""
    goal, cut_G = _settled_from(open_sets, open_sets.tidy(cut_G[None])[0], ask, width)
    while not open_sets.fixed and cut_G.any():
        # the best plan with one exit fewer; the first of equals
        other_goal = np.inf
        other_G = cut_G
        for g in np.flatnonzero(cut_G):
            without_G = cut_G.copy()
            without_G[g] = 0
            without_goal, settled_G = _settled_from(open_sets, without_G, ask, 0)
            if without_goal < other_goal:
                other_goal = without_goal
                other_G = settled_G
        if not other_goal < goal - TIE * abs(goal):
            break
        goal, cut_G = _settled_from(open_sets, other_G, ask, width)
    return goal, cut_G


def _settled_from(open_sets: OpenSets, start_G: Ints, ask: _Ask, width: int) -> tuple[float, Ints]:
    """A local search with the exits in use open: goal and cuts."""
    if open_sets.fixed:
        table = open_sets.whole()
    else:
        table = open_sets.table(start_G > 0)
    goal_EN, held_EN = ask.sums(table.loss_EN, table.cost_EN)
    settled_G, goal = settle(table, start_G, goal_EN, held_EN, ask.limit, width=width)
    return goal, open_sets.tidy(settled_G[None])[0]
