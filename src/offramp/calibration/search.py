"""Search: the thresholds of a chain that cost least at a loss, or lose least at a cost, and all
between.

Exact for one and two gates, and where the plans are few enough to be tried; beyond that the hull of
the Lagrangian, lines through it, and a local search at the asked level, never worse than one shared
threshold, one quantile path or MSDNet's p^k. Legend: N rows, G gates (= E-1), E exits, P plans.
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

FINE = 4  # places kept along the cost axis for every frontier point asked for
ROUNDING = 1e-12  # a limit counts as held up to this share of its scale
TIE = 1e-9  # plans nearer than this share of the scale are decided by the other sum
WIDTH = 128  # cuts of the first gate that a move of two gates looks at
SEARCH_ROWS = 10_000  # rows that the search looks at; plans are priced, and refined, on all of them
FINE_POWERS = np.geomspace(0.05, 4.0, 120)  # p of p^k at one level, where MSDNet solves for p


@dataclass(frozen=True)
class SearchProblem:
    """What the search sees of a chain: float32 scores, losses of any sign, and prices.

    cost_to(open_E) is the mean cost of leaving at each exit, [E] or [N, E], when only those exits
    are open; the last one always is. Closing an exit may make later exits cheaper, and must not
    make any dearer. band: how near to a threshold a score is on either side of it.
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
                f"scores are {self.scores_NG.dtype} {self.scores_NG.shape}; expected float32 "
                f"[rows, exits - 1] = {(rows, exits - 1)} with at least one row"
            )
        if not np.isfinite(self.losses_NE).all():
            bad = np.flatnonzero(~np.isfinite(self.losses_NE).all(1))
            raise BadData(
                f"the loss of row {bad[0]} and {len(bad) - 1} others is not finite; leave them out"
            )

    def cost(self, open_E: Bools) -> Floats:
        """Prices as [N, E] (a view), nothing at the closed exits."""
        rows, exits = self.losses_NE.shape
        cost = np.asarray(self.cost_to(open_E.copy()), np.float64)
        if cost.shape not in ((exits,), (rows, exits)) or not np.isfinite(cost[..., open_E]).all():
            raise BadData(
                f"cost_to gave {cost.shape}; expected finite numbers [{exits}] or [{rows}, {exits}]"
            )
        return np.broadcast_to(np.where(open_E, cost, 0.0), (rows, exits))


@dataclass(frozen=True)
class Frontier:
    """Plans from the cheapest to the dearest, each with less loss than the one before."""

    thresholds_PG: Singles
    loss_P: Floats
    cost_P: Floats

    def __len__(self) -> int:
        return len(self.loss_P)


@dataclass(frozen=True)
class PlanPoint:
    """One plan: its thresholds, mean loss and mean cost on the rows of the search."""

    thresholds_G: Singles
    loss: float
    cost: float


def exits_of(scores_NG: Singles, thresholds_PG: Singles) -> Ints:
    """Where every row leaves under every plan [P, N]: `plan.choose` at each gate in turn, for many
    plans.

    >>> exits_of(np.float32([[1, 2], [0, np.inf], [np.nan, 1]]), np.float32([[1, np.inf], [2, 2]]))
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
    """Mean loss [P] and mean cost [P]; an exit at +inf is neither run nor charged.

    Rows are taken in blocks, so that a million of them need no more memory than one block.
    """
    rows, exits = problem.losses_NE.shape
    if thresholds_PG.dtype != np.float32 or thresholds_PG.shape[1:] != (exits - 1,):
        raise InvalidArgument(
            f"thresholds are {thresholds_PG.dtype} {thresholds_PG.shape}; expected float32 [P, "
            f"{exits - 1}]"
        )
    loss_P = np.zeros(len(thresholds_PG))
    cost_P = np.zeros(len(thresholds_PG))
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
    """At most `points` plans, none worse than another in both loss and cost.

    The plan that never leaves is always among them, even where leaving early both costs and loses
    less. Cuts between scores nearer than `gap` are not used.
    """
    open_sets, over = _laid_out(_sampled(problem), gap)
    loss_B, cost_B, cuts_BG = fill_archive(open_sets, over, FINE * points).plans()
    chosen = _spaced(loss_B, cost_B, points - 1)
    plans_PG = np.concatenate((open_sets.tidy(cuts_BG[chosen]), over[0].never[None]))
    thresholds_PG = open_sets.whole().thresholds(plans_PG)
    loss_P, cost_P = evaluate(problem, thresholds_PG)
    kept = undominated(loss_P, cost_P)
    if not (thresholds_PG[kept] == np.inf).all(1).any():
        kept = np.append(kept, len(plans_PG) - 1)
        kept = kept[np.lexsort((loss_P[kept], cost_P[kept]))]
    return Frontier(thresholds_PG[kept], loss_P[kept], cost_P[kept])


def powers(problem: SearchProblem) -> Singles:
    """MSDNet's plans [P, G] on these rows: exit k answers a share ~ p^k, for a sweep of p
    (baselines.powers_of).
    """
    whole = OpenSets.of(problem.scores_NG, problem.losses_NE, problem.cost, 0.0).whole()
    return whole.thresholds(powers_of(whole).cuts(np.arange(len(POWERS))))


def _sampled(problem: SearchProblem) -> SearchProblem:
    """The problem on as many rows as the search looks at, always the same of so many; itself if it
    has no more.
    """
    rows = len(problem.losses_NE)
    if rows <= SEARCH_ROWS:
        return problem
    drawn = np.random.Generator(np.random.Philox(0)).random(rows)
    some = np.sort(np.argpartition(drawn, SEARCH_ROWS)[:SEARCH_ROWS])

    def cost_to(open_E: Bools) -> Floats:
        cost = np.asarray(problem.cost_to(open_E))
        return cost if cost.ndim == 1 else cost[some]

    return replace(
        problem,
        scores_NG=problem.scores_NG[some],
        losses_NE=problem.losses_NE[some],
        cost_to=cost_to,
    )


def _laid_out(problem: SearchProblem, gap: float) -> tuple[OpenSets, list[ThresholdTable]]:
    """The chain of a problem, and its tables under the open sets worth a search."""
    open_sets = OpenSets.of(problem.scores_NG, problem.losses_NE, problem.cost, gap)
    step = -(-len(problem.losses_NE) // SAMPLE)
    if step == 1 or len(open_sets.cuts) <= EVERY_SET or open_sets.fixed:
        return open_sets, tables(open_sets, open_sets)
    some = (problem.scores_NG[::step], problem.losses_NE[::step])
    return open_sets, tables(
        open_sets, OpenSets.of(*some, lambda open_E: problem.cost(open_E)[::step], gap)
    )


def _spaced(loss_P: Floats, cost_P: Floats, points: int) -> Ints:
    """Both ends and what stands evenly between them along the curve."""
    if len(loss_P) <= points:
        return np.arange(len(loss_P))
    way_P = np.append(
        0.0, np.cumsum(np.diff(cost_P) / np.ptp(cost_P) - np.diff(loss_P) / np.ptp(loss_P))
    )
    chosen = np.unique(
        np.searchsorted(way_P, np.linspace(0, way_P[-1], points)).clip(0, len(way_P) - 1)
    )
    spare = np.setdiff1d(np.arange(len(loss_P)), chosen)
    more = spare[np.linspace(0, len(spare) - 1, points - len(chosen)).astype(np.intp)]
    return np.union1d(chosen, more)


def cheapest(problem: SearchProblem, at_most: float, *, gap: float = 0.0) -> PlanPoint:
    """The plan of least mean cost whose mean loss is at most `at_most` (up to rounding)."""
    found = _solve(problem, gap, at_most, loss_held=True)
    if found is None:
        raise InvalidArgument(
            f"no plan found has a mean loss of at most {at_most:g} on these rows; ask for a "
            f"higher level"
        )
    return found


def best(problem: SearchProblem, budget: float, *, gap: float = 0.0) -> PlanPoint:
    """The plan of least mean loss whose mean cost is at most `budget` (up to rounding)."""
    found = _solve(problem, gap, budget, loss_held=False)
    if found is None:
        raise OutOfBudget(
            f"no plan found costs at most {budget:g} on these rows; ask for a larger budget"
        )
    return found


@dataclass(frozen=True)
class _Ask:
    """Which sum is made small and which is held; ties of the first go to the smaller second."""

    loss_held: bool
    limit: float  # on the sum
    tie: float

    @staticmethod
    def at(table: ThresholdTable, level: float, loss_held: bool) -> _Ask:
        goal_EN, held_EN = (
            (table.cost_EN, table.loss_EN) if loss_held else (table.loss_EN, table.cost_EN)
        )
        slack = ROUNDING * max(abs(level), float(abs(held_EN).max()))
        return _Ask(
            loss_held, (level + slack) * held_EN.shape[1], TIE * spread(goal_EN) / spread(held_EN)
        )

    def sums(self, loss: Floats, cost: Floats) -> tuple[Floats, Floats]:
        """(goal, held) of losses and costs of any shape."""
        goal, held = (cost, loss) if self.loss_held else (loss, cost)
        return goal + self.tie * held, held


def _solve(
    problem: SearchProblem, gap: float, level: float, *, loss_held: bool
) -> PlanPoint | None:
    """The plan of least goal that holds the level; None if no plan found holds it.

    Of many rows a sample is searched, and what it finds is refined on all of them.
    """
    sample = _sampled(problem)
    if sample is problem:
        return _solve_all(problem, gap, level, loss_held=loss_held)
    found = _solve_all(sample, gap, level, loss_held=loss_held)
    if found is not None:
        start_G = found.thresholds_G
    # perhaps all rows hold what the sample misses by a little: start from the end nearest to it
    else:
        ends_PG = frontier(sample, gap=gap).thresholds_PG
        start_G = ends_PG[-1 if loss_held else 0]
    every_E = np.ones(problem.losses_NE.shape[1], bool)
    some = OpenSets.of(sample.scores_NG, sample.losses_NE, sample.cost, gap).whole()
    tie = _Ask.at(some, level, loss_held).tie
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
    """Try out small tables; elsewhere settle from the baselines and from the archive around the
    level.
    """
    open_sets, over = _laid_out(problem, gap)
    ask = _Ask.at(open_sets.whole(), level, loss_held)
    found: list[tuple[float, Ints]] = []
    wide = [table for table in over if not small(table)]
    for table in over:
        if small(table):
            found.append(_tried(table, ask))
    if wide:
        found += _settled(open_sets, wide, ask)
    goal, cut_G = min(found, key=lambda pair: pair[0])
    if goal == np.inf:
        return None
    thresholds_PG = open_sets.whole().thresholds(open_sets.tidy(cut_G[None]))
    loss_P, cost_P = evaluate(problem, thresholds_PG)
    return PlanPoint(thresholds_PG[0], float(loss_P[0]), float(cost_P[0]))


def _tried(table: ThresholdTable, ask: _Ask) -> tuple[float, Ints]:
    """The best plan of a table by trying every one."""
    goal_EN, held_EN = ask.sums(table.loss_EN, table.cost_EN)
    goal = np.inf
    found_G = table.never
    if worth(table, held_EN, found_G) <= ask.limit:
        goal = worth(table, goal_EN, found_G)
    for cut_G, g, goal_K, held_K in every(table, goal_EN, held_EN):
        k = lowest(goal_K, held_K, ask.limit, goal)
        if k is not None:
            goal = float(goal_K[k])
            found_G = cut_G.copy()
            found_G[g] = k
    return goal, found_G


def _settled(
    open_sets: OpenSets, over: list[ThresholdTable], ask: _Ask
) -> list[tuple[float, Ints]]:
    """Local searches from the best of every family and from both sides of the level on the
    archive.
    """
    starts = []
    for table in over:
        for curve in baselines(table, FINE_POWERS):
            goal_D, held_D = ask.sums(curve.loss_D, curve.cost_D)
            d = lowest(goal_D, held_D, ask.limit, np.inf)
            if d is not None:
                starts.append(curve.cuts(np.array([d]))[0])
    many = max(4, min(24, 20_000 // len(open_sets.loss_EN[0])))
    loss_B, cost_B, cuts_BG = fill_archive(open_sets, over, FINE * 100).plans()
    goal_B, held_B = ask.sums(loss_B, cost_B)
    order = np.argsort(np.where(held_B <= ask.limit, goal_B, np.inf))
    starts += list(cuts_BG[order[:2]]) + list(cuts_BG[np.argsort(abs(held_B - ask.limit))[:many]])
    spare = np.random.Generator(np.random.Philox(0)).random((many, len(open_sets.cuts)))
    if many > 4:
        starts += list((spare * [len(cuts) for cuts in open_sets.cuts]).astype(np.intp))
    found = [_closed_in(open_sets, cut_G, ask, 0) for cut_G in np.unique(np.stack(starts), axis=0)]
    found.sort(key=lambda pair: pair[0])
    return [_closed_in(open_sets, cut_G, ask, WIDTH) for _, cut_G in found[: many // 2]]


def _closed_in(open_sets: OpenSets, cut_G: Ints, ask: _Ask, width: int) -> tuple[float, Ints]:
    """Settle with the exits in use open, then without each of them in turn, while that helps."""

    def settled(start_G: Ints, width: int) -> tuple[float, Ints]:
        table = open_sets.whole() if open_sets.fixed else open_sets.table(start_G > 0)
        sums = ask.sums(table.loss_EN, table.cost_EN)
        found_G, goal = settle(table, start_G, *sums, ask.limit, width=width)
        return goal, open_sets.tidy(found_G[None])[0]

    goal, cut_G = settled(open_sets.tidy(cut_G[None])[0], width)
    while not open_sets.fixed and cut_G.any():
        without = [np.where(np.arange(len(cut_G)) == g, 0, cut_G) for g in np.flatnonzero(cut_G)]
        other = min((settled(other_G, 0) for other_G in without), key=lambda pair: pair[0])
        if not other[0] < goal - TIE * abs(goal):
            break
        goal, cut_G = settled(other[1], width)
    return goal, cut_G
