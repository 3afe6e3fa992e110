"""The chain under each set of open exits, and the archive of the best plans at every cost.

Closing an exit changes the price of the later ones, so the search needs a table per set of open
exits. Up to three gates it uses all sets. With more gates it uses those in which a greedy closing
and opening of exits ends. Where closing an exit changes no price (cut 0 closes it as well), one
table is enough. Legend: N rows, G gates, E exits, P plans, B places along the cost axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from offramp.calibration.baselines import DialCurve, baselines
from offramp.calibration.moves import descend, grid, hull, lines
from offramp.calibration.threshold_table import (
    Bools,
    Floats,
    GateCuts,
    Ints,
    Singles,
    ThresholdTable,
    cuts_of,
    shut,
)

# With three gates or more, every plan is tried if all gates but the last have at most this many
# combinations of cuts.
EXACT_STEPS = 4096
EVERY_SET = 3  # up to this many gates, every set of open exits is searched
SAMPLE = 2000  # rows that the greedy choice of open sets looks at
NODES = 24  # plans on the hull, over all open sets
SLOPES = 5  # prices of cost in loss at which open sets are chosen
CLOSINGS = 2  # how often closing each exit in use is tried
CLOSED = 12  # for how many plans it is tried
SLOW_STEPS = 1000  # cuts of the first of two gates that the archive is shown


@dataclass(frozen=True)
class OpenSets:
    """The cuts and losses of a chain, and its prices under each set of open exits.

    Attributes:
        cuts: by gate.
        loss_EN: the loss of every exit's answer for every row.
        cost: gives the cost [N, E] of leaving at each exit, from the open exits [E].
        known: the tables made so far.
    """

    cuts: tuple[GateCuts, ...]
    loss_EN: Floats
    cost: Callable[[Bools], Floats]  # open exits [E] -> [N, E]
    known: dict[bytes, ThresholdTable] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        scores_NG: Singles, losses_NE: Floats, cost: Callable[[Bools], Floats], gap: float
    ) -> OpenSets:
        """Sort the scores of every gate once."""
        cuts = [cuts_of(np.ascontiguousarray(score_N), gap) for score_N in scores_NG.T]
        loss_EN = np.ascontiguousarray(losses_NE.T, np.float64)  # [N, E] -> [E, N]
        return OpenSets(tuple(cuts), loss_EN, cost)

    def table(self, open_G: Bools) -> ThresholdTable:
        """The chain with only these exits open."""
        key = open_G.tobytes()
        if key not in self.known:
            rows = self.loss_EN.shape[1]
            cuts = list(self.cuts)
            for g in np.flatnonzero(~open_G):
                cuts[g] = shut(rows)
            open_E = np.append(open_G, True)  # the last exit is always open
            cost_EN = np.ascontiguousarray(self.cost(open_E).T)  # [N, E] -> [E, N]
            self.known[key] = ThresholdTable(tuple(cuts), self.loss_EN, cost_EN)
        return self.known[key]

    def whole(self) -> ThresholdTable:
        """The chain with every exit open."""
        return self.table(np.ones(len(self.cuts), bool))

    @cached_property
    def fixed(self) -> bool:
        """Whether closing exits changes no price.

        Then each exit, and the last one, cost the same alone as with all exits open.
        """
        all_open_EN = self.whole().cost_EN
        for g, only_G in enumerate(np.eye(len(self.cuts), dtype=bool)):
            alone_EN = self.table(only_G).cost_EN
            if not np.array_equal(alone_EN[[g, -1]], all_open_EN[[g, -1]]):
                return False
        return True

    def tidy(self, cuts_PG: Ints) -> Ints:
        """The same plans with every exit closed at which nobody leaves."""
        if not self.cuts:
            return cuts_PG
        exits_PN = self.whole().exits(cuts_PG)
        used_PG = [(exits_PN == g).any(1) for g in range(len(self.cuts))]
        return np.where(np.stack(used_PG, 1), cuts_PG, 0)


def tables(open_sets: OpenSets, sample: OpenSets) -> list[ThresholdTable]:
    """The chain under each set of open exits that is worth a search.

    Args:
        open_sets: of all rows.
        sample: of some rows, for the greedy choice.

    Returns:
        A table for each set.
    """
    gates = len(open_sets.cuts)
    if open_sets.fixed:
        return [open_sets.whole()]
    if gates <= EVERY_SET:
        every_set = product((True, False), repeat=gates)
        return [open_sets.table(np.array(open_G)) for open_G in every_set]
    # The best set depends on what a unit of cost is worth in loss (the slope of the trade-off).
    # Take slopes from the best trade-offs with all exits open, and for each slope improve the set
    # of all exits and the empty set greedily.
    loss_P, cost_P = sample.whole().totals(np.stack(hull(sample.whole(), NODES)))
    best = undominated(loss_P, cost_P)
    slopes = -np.diff(loss_P[best]) / np.diff(cost_P[best])
    if len(slopes):
        slopes = np.quantile(slopes, np.linspace(0.0, 1.0, SLOPES))
    all_open_G = np.ones(gates, bool)
    none_open_G = np.zeros(gates, bool)
    sets = {all_open_G.tobytes(), none_open_G.tobytes()}
    for slope in slopes:
        for start_G in (all_open_G, none_open_G):
            sets.add(_toggled(sample, start_G, slope).tobytes())
    return [open_sets.table(np.frombuffer(key, bool)) for key in sorted(sets, reverse=True)]


def _toggled(open_sets: OpenSets, open_G: Bools, slope: float) -> Bools:
    """Close or open the exit that lowers loss + slope * cost most, until none does."""
    cut_G, value = _descended(open_sets, open_G, open_sets.whole().never, slope)
    while True:
        # the best of all sets that differ in one exit; the first of equals
        best_value = np.inf
        best_G = open_G
        best_cut_G = cut_G
        for g in range(len(open_G)):
            other_G = open_G.copy()
            other_G[g] = not open_G[g]
            other_cut_G, other_value = _descended(open_sets, other_G, cut_G, slope)
            if other_value < best_value:
                best_value = other_value
                best_G = other_G
                best_cut_G = other_cut_G
        if not best_value < value - 1e-12 * abs(value):
            return open_G
        open_G = best_G
        cut_G = best_cut_G
        value = best_value


def _descended(open_sets: OpenSets, open_G: Bools, cut_G: Ints, slope: float) -> tuple[Ints, float]:
    """The plan of least loss + slope * cost near `cut_G` under a set of open exits, and its sum."""
    table = open_sets.table(open_G)
    start_G = np.where(open_G, cut_G, 0)
    return descend(table, table.loss_EN + slope * table.cost_EN, start_G, 2)


def exact_steps(table: ThresholdTable) -> int:
    """The number of combinations of cuts of all open gates but the last."""
    return int(np.prod([float(len(table.cuts[g])) for g in table.gates[:-1]]))


def every(
    table: ThresholdTable, one_EN: Floats, two_EN: Floats, slow: int | None = None
) -> Iterator[tuple[Ints, int, Floats, Floats]]:
    """Every plan of a table, a line of plans at a time: one gate moves along all its cuts.

    Args:
        table: the chain.
        one_EN: values to sum over the rows, by exit.
        two_EN: other values to sum.
        slow: thins the cuts of the gate before the last to this many.

    Yields:
        The cut numbers [G], the gate that moves, and both sums at each of its cuts.
    """
    if len(table.gates) < 2:
        for g, one_K, two_K in lines(table, table.never, one_EN, two_EN):
            yield table.never, g, one_K, two_K
        return
    # The last gate h moves along the line, the one before it (g) from line to line, and all
    # others run through every combination around both.
    *outer, g, h = table.gates
    steps_S = np.arange(len(table.cuts[g]))
    if slow is not None and slow < len(steps_S):
        steps_S = np.unique(np.linspace(0, len(steps_S) - 1, slow).astype(np.intp))
    outer_cuts = [range(len(table.cuts[k])) for k in outer]
    for fixed in product(*outer_cuts):
        cut_G = table.never
        cut_G[outer] = fixed
        for step, one_K, two_K in grid(table, cut_G, (g, h), steps_S, one_EN, two_EN):
            cut_G[g] = step
            yield cut_G, h, one_K, two_K


class Archive:
    """The plan of least loss seen at each place along the cost axis."""

    def __init__(self, low: float, high: float, places: int, gates: int) -> None:
        self.low = low
        self.scale = (places - 1) / (high - low) if high > low else 0.0
        self.loss_B = np.full(places, np.inf)
        self.cost_B = np.full(places, np.inf)
        self.cuts_BG = np.zeros((places, gates), np.intp)

    def offer(self, loss_P: Floats, cost_P: Floats, cuts: Callable[[Ints], Ints]) -> None:
        """Store the plans that lose less than the plan at their place along the cost axis.

        Args:
            loss_P: summed losses.
            cost_P: summed costs.
            cuts: gives the cut numbers [S, G] of plans [S], called for those that are stored.
        """
        last = len(self.loss_B) - 1
        place_P = np.clip((cost_P - self.low) * self.scale, 0, last).astype(np.intp)
        better = np.flatnonzero(loss_P < self.loss_B[place_P])
        if len(better):
            # sorted by loss, then cost: `unique` gives the first, the best, of each place
            better = better[np.lexsort((cost_P[better], loss_P[better]))]
            places, first = np.unique(place_P[better], return_index=True)
            chosen = better[first]
            self.loss_B[places] = loss_P[chosen]
            self.cost_B[places] = cost_P[chosen]
            self.cuts_BG[places] = cuts(chosen)

    def offer_line(self, cut_G: Ints, g: int, loss_K: Floats, cost_K: Floats) -> None:
        """Offer one gate moved along all its cuts."""

        def cuts(chosen: Ints) -> Ints:
            plans = np.repeat(cut_G[None], len(chosen), 0)
            plans[:, g] = chosen
            return plans

        self.offer(loss_K, cost_K, cuts)

    def offer_lines(self, table: ThresholdTable, cut_G: Ints) -> None:
        """Offer every gate moved alone."""
        for g, loss_K, cost_K in lines(table, cut_G, table.loss_EN, table.cost_EN):
            self.offer_line(cut_G, g, loss_K, cost_K)

    def plans(self) -> tuple[Floats, Floats, Ints]:
        """The best plans, cheapest first: their summed loss [P], cost [P] and cut numbers [P,
        G].
        """
        best = undominated(self.loss_B, self.cost_B)
        return self.loss_B[best], self.cost_B[best], self.cuts_BG[best]


def undominated(loss_P: Floats, cost_P: Floats) -> Ints:
    """The plans that lose less than every plan of at most their cost, cheapest first."""
    order = np.lexsort((loss_P, cost_P))
    order = order[np.isfinite(loss_P[order])]
    # the least loss of all cheaper plans
    before = np.append(np.inf, np.minimum.accumulate(loss_P[order])[:-1])
    return order[loss_P[order] < before]


def fill_archive(open_sets: OpenSets, over: list[ThresholdTable], places: int) -> Archive:
    """Show an archive the baselines, the hull and the lines through it; small tables in full.

    Args:
        open_sets: of all rows.
        over: the tables to search.
        places: the number of places along the cost axis.

    Returns:
        The archive.
    """
    curves = list[DialCurve]()
    for table in over:
        curves.extend(baselines(table))
    cost = np.concatenate([curve.cost_D for curve in curves])
    archive = Archive(cost.min(), cost.max(), places, len(open_sets.cuts))
    for curve in curves:
        archive.offer(curve.loss_D, curve.cost_D, curve.cuts)
    for table in over:
        if small(table):
            for cut_G, g, loss_K, cost_K in every(table, table.loss_EN, table.cost_EN, SLOW_STEPS):
                archive.offer_line(cut_G, g, loss_K, cost_K)
            continue
        for cut_G in hull(table, max(8, NODES // len(over))):
            archive.offer_lines(table, cut_G)
    if not open_sets.fixed and len(open_sets.cuts) > EVERY_SET:
        for _ in range(CLOSINGS):
            _offer_closings(archive, open_sets)
    return archive


def _offer_closings(archive: Archive, open_sets: OpenSets) -> None:
    """Take some plans of the archive, close each of their exits in turn, and search around that."""
    _, _, cuts_PG = archive.plans()
    step = max(1, len(cuts_PG) // CLOSED)
    for cut_G in open_sets.tidy(cuts_PG[step // 2 :: step]):
        for used in np.flatnonzero(cut_G):
            fewer_G = cut_G.copy()
            fewer_G[used] = 0
            archive.offer_lines(open_sets.table(fewer_G > 0), fewer_G)


def small(table: ThresholdTable) -> bool:
    """Whether every plan of a table is tried."""
    return len(table.gates) <= 2 or exact_steps(table) <= EXACT_STEPS
