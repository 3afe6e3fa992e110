"""A chain over its sets of open exits, and the archive of the best plans seen at every cost.

Closing an exit changes the price of the later ones, so a chain is a table per open set: all sets up
to three gates, beyond that those that a greedy closing and opening ends in. Where closing changes
no price (cut 0 says the same) one table is enough. Legend: N rows, G gates, E exits, P plans, B
places along the cost axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from offramp.calibration.baselines import baselines
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

# three gates or more are tried out in full up to so many steps of all but the last
EXACT_STEPS = 4096
EVERY_SET = 3  # gates up to which every set of open exits is searched
SAMPLE = 2000  # rows that the greedy choice of open sets looks at
NODES = 24  # plans on the hull, over all open sets
SLOPES = 5  # prices of cost in loss at which open sets are chosen
CLOSINGS, CLOSED = 2, 12  # how often, and for how many plans, closing each exit in use is tried
SLOW_STEPS = 1000  # cuts of the first of two gates that the archive is shown


@dataclass(frozen=True)
class OpenSets:
    """The cuts and losses of a chain, and its price list by open exits."""

    cuts: tuple[GateCuts, ...]
    loss_EN: Floats
    cost: Callable[[Bools], Floats]  # open exits [E] -> [N, E]
    known: dict[bytes, ThresholdTable] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        scores_NG: Singles, losses_NE: Floats, cost: Callable[[Bools], Floats], gap: float
    ) -> OpenSets:
        """Sort every gate once."""
        cuts = tuple(cuts_of(np.ascontiguousarray(score_N), gap) for score_N in scores_NG.T)
        return OpenSets(cuts, np.ascontiguousarray(losses_NE.T, np.float64), cost)

    def table(self, open_G: Bools) -> ThresholdTable:
        """The chain with only these exits open."""
        key = open_G.tobytes()
        if key not in self.known:
            rows = self.loss_EN.shape[1]
            cuts = tuple(self.cuts[g] if open_G[g] else shut(rows) for g in range(len(self.cuts)))
            cost_EN = np.ascontiguousarray(self.cost(np.append(open_G, True)).T)
            self.known[key] = ThresholdTable(cuts, self.loss_EN, cost_EN)
        return self.known[key]

    def whole(self) -> ThresholdTable:
        """The chain with every exit open."""
        return self.table(np.ones(len(self.cuts), bool))

    @cached_property
    def fixed(self) -> bool:
        """Whether closing exits changes no price: each exit, and the last, cost the same alone as
        among all.
        """
        whole_EN = self.whole().cost_EN
        return all(
            np.array_equal(self.table(only_G).cost_EN[[g, -1]], whole_EN[[g, -1]])
            for g, only_G in enumerate(np.eye(len(self.cuts), dtype=bool))
        )

    def tidy(self, cuts_PG: Ints) -> Ints:
        """The same plans with every exit closed at which nobody leaves."""
        exits_PN = self.whole().exits(cuts_PG)
        used_PG = [(exits_PN == g).any(1) for g in range(len(self.cuts))]
        return np.where(np.stack(used_PG, 1), cuts_PG, 0) if used_PG else cuts_PG


def tables(open_sets: OpenSets, sample: OpenSets) -> list[ThresholdTable]:
    """The chain under each set of open exits that is worth a search."""
    gates = len(open_sets.cuts)
    if open_sets.fixed:
        return [open_sets.whole()]
    if gates <= EVERY_SET:
        return [
            open_sets.table(np.array(open_G)) for open_G in product((True, False), repeat=gates)
        ]
    loss_P, cost_P = sample.whole().totals(np.stack(hull(sample.whole(), NODES)))
    kept = undominated(loss_P, cost_P)
    slopes = -np.diff(loss_P[kept]) / np.diff(cost_P[kept])
    sets = {np.ones(gates, bool).tobytes(), np.zeros(gates, bool).tobytes()}
    for lam in np.quantile(slopes, np.linspace(0.0, 1.0, SLOPES)) if len(slopes) else ():
        for start_G in (np.ones(gates, bool), np.zeros(gates, bool)):
            sets.add(_toggled(sample, start_G, lam).tobytes())
    return [open_sets.table(np.frombuffer(key, bool)) for key in sorted(sets, reverse=True)]


def _toggled(open_sets: OpenSets, open_G: Bools, lam: float) -> Bools:
    """Close or open the exit that lowers loss + lam * cost most, while one does."""

    def solved(open_G: Bools, cut_G: Ints) -> tuple[Ints, float]:
        table = open_sets.table(open_G)
        cut_G, value = descend(
            table, table.loss_EN + lam * table.cost_EN, np.where(open_G, cut_G, 0), 2
        )
        return cut_G, value

    cut_G, value = solved(open_G, open_sets.whole().never)
    while True:
        others = [open_G ^ (np.arange(len(open_G)) == g) for g in range(len(open_G))]
        found = [(other_G, *solved(other_G, cut_G)) for other_G in others]
        best = min(found, key=lambda trial: trial[2])
        if not best[2] < value - 1e-12 * abs(value):
            return open_G
        open_G, cut_G, value = best


def exact_steps(table: ThresholdTable) -> int:
    """How many steps of all gates but the last trying out every plan would take."""
    return int(np.prod([float(len(table.cuts[g])) for g in table.gates[:-1]]))


def every(
    table: ThresholdTable, one_EN: Floats, two_EN: Floats, slow: int | None = None
) -> Iterator[tuple[Ints, int, Floats, Floats]]:
    """Every plan of a table, a curve over one gate at a time: (cut numbers, that gate, both sums).

    `slow` thins the cuts of the gate before the last to so many.
    """
    if len(table.gates) < 2:
        for g, one_K, two_K in lines(table, table.never, one_EN, two_EN):
            yield table.never, g, one_K, two_K
        return
    *outer, g, h = table.gates
    steps_S = np.arange(len(table.cuts[g]))
    if slow is not None and slow < len(steps_S):
        steps_S = np.unique(np.linspace(0, len(steps_S) - 1, slow).astype(np.intp))
    for fixed in product(*(range(len(table.cuts[k])) for k in outer)):
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
        """Keep those that lose less than what stands in their place; `cuts` gives the plans asked
        for.
        """
        last = len(self.loss_B) - 1
        place_P = np.clip((cost_P - self.low) * self.scale, 0, last).astype(np.intp)
        better = np.flatnonzero(loss_P < self.loss_B[place_P])
        if len(better):
            better = better[np.lexsort((cost_P[better], loss_P[better]))]
            places, first = np.unique(place_P[better], return_index=True)
            chosen = better[first]
            self.loss_B[places], self.cost_B[places] = loss_P[chosen], cost_P[chosen]
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
        """What stands, cheapest first, without what is worse in both: summed loss, cost, cut
        numbers.
        """
        kept = undominated(self.loss_B, self.cost_B)
        return self.loss_B[kept], self.cost_B[kept], self.cuts_BG[kept]


def undominated(loss_P: Floats, cost_P: Floats) -> Ints:
    """The plans that no other one beats in loss without costing more, from cheap to dear."""
    order = np.lexsort((loss_P, cost_P))
    order = order[np.isfinite(loss_P[order])]
    before = np.append(np.inf, np.minimum.accumulate(loss_P[order])[:-1])
    return order[loss_P[order] < before]


def fill_archive(open_sets: OpenSets, over: list[ThresholdTable], places: int) -> Archive:
    """Show an archive the baselines, the hull and the lines through it; small tables in full."""
    curves = [curve for table in over for curve in baselines(table)]
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
    for _ in range(0 if open_sets.fixed or len(open_sets.cuts) <= EVERY_SET else CLOSINGS):
        _, _, cuts_PG = archive.plans()
        step = max(1, len(cuts_PG) // CLOSED)
        for cut_G in open_sets.tidy(cuts_PG[step // 2 :: step]):
            for used in np.flatnonzero(cut_G):
                less_G = np.where(np.arange(len(cut_G)) == used, 0, cut_G)
                archive.offer_lines(open_sets.table(less_G > 0), less_G)
    return archive


def small(table: ThresholdTable) -> bool:
    """Whether every plan of a table is tried."""
    return len(table.gates) <= 2 or exact_steps(table) <= EXACT_STEPS
