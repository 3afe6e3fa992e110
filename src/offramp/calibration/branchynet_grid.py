"""BranchyNet's own choice of thresholds, to compare with: try a whole grid and keep the front.

Teerapittayanon et al., 2016, arXiv 1709.01686, and the authors' code. They screen on the test set,
one row at a time, and pick the knee of the front by hand. Here it is done on the rows of the trace
that is given, which therefore must not be test rows: what a plan shows on the rows that chose it is
too good. Legend: N rows, G gates, P plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from offramp._support.find import unknown
from offramp.calibration.candidates import problem_of
from offramp.calibration.search import evaluate
from offramp.calibration.threshold_table import Bools, Singles, cuts_of
from offramp.errors import InvalidArgument
from offramp.guarantees.risks import find_risk
from offramp.plans.plan import FLOAT32_MAX, Plan, choose
from offramp.plans.pricing import check_unit
from offramp.plans.trace import Trace

# entropies in nats; ten classes have at most ln 10 = 2.3, so that at 3, 5 and 10 everyone leaves
GRIDS = {
    "lenet": (
        1e-4,
        5e-4,
        1e-3,
        5e-3,
        0.01,
        0.025,
        0.05,
        0.075,
        0.1,
        0.25,
        0.5,
        0.75,
        1.0,
        2.0,
        3.0,
        5.0,
        10.0,
    ),
    "alexnet": (1e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 0.75, 1.0, 5.0, 10.0),
}
TOLERANCE = 1e-4  # of accuracy, by which a dearer plan may fall behind and is kept
MOST_PLANS = 1_000_000
ROUNDING = 1e-12
ZERO = 1e-5  # what the entropy of a sure softmax may be above or below it in float32

Grid = str | Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class GridPlan:
    """One plan of BranchyNet's grid, with its accuracy and mean cost per row on the rows that
    screen.
    """

    thresholds: Mapping[str, float]
    accuracy: float
    cost: float

    @property
    def plan(self) -> Plan:
        """The plan; it was set by hand, has no promise, and says so."""
        return Plan.by_hand(self.thresholds)


def grid_plans(
    trace: Trace,
    *,
    grid: Grid | None = None,
    shares: Sequence[float] | None = None,
    unit: str | None = None,
    batch: int = 1,
) -> tuple[GridPlan, ...]:
    """Every combination of a grid over all gates, and the plan that never leaves, cheapest first.

    Of equal cost the most accurate comes first. The plan that never leaves is always among those
    whose costs are
    compared: where exits cost more than they save, it is the cheapest.

    grid: "lenet" (the paper's for LeNet and ResNet) or "alexnet", both for the gate `neg_entropy`;
    or values of any gate's own score, the same for all gates or by gate. A row leaves where its
    score is greater than the value, which is the paper's `entropy < T`; +inf closes an exit.
    shares: the percentile mode instead: of the rows that arrive at a gate so large a part leaves
    (rows with equal scores stay together; 0 closes an exit). The paper sorts by its run time:
    unit="ms" and batch=1 on a trace with timings. It charges no branch; here all that runs is
    charged. Its smallest entropies lie within the float band of sure rows: `trace.evaluate` tells
    how many. Raises InvalidArgument (no labels, a grid that does not suit the scores, too many
    plans), UnknownName.
    """
    if (grid is None) == (shares is None):
        raise InvalidArgument(
            f"got grid={grid!r} and shares={shares!r}, expected exactly one of them; give a grid, "
            f"or shares"
        )
    if not trace.header.trained:
        raise InvalidArgument(
            "an exit of this network was never trained; train it and record again"
        )
    unit = trace.unit(unit)
    check_unit(unit, batch)
    gates = trace.topology.gates
    problem = problem_of(trace, find_risk("error"), unit=unit, batch=batch)
    if shares is not None:
        thresholds_PG = _by_shares(problem.scores_NG, _checked_shares(shares, len(gates)))
    else:
        values = _values(grid if grid is not None else (), gates, problem.scores_NG)
        _check_size([len(each) for each in values])
        columns = zip(values, problem.scores_NG.T, strict=True)
        thresholds_PG = _product(
            [[above(value, score_N) for value in each] for each, score_N in columns]
        )
    if not (thresholds_PG == np.inf).all(axis=1).any():
        never = np.full((1, len(gates)), np.inf, np.float32)
        thresholds_PG = np.concatenate([thresholds_PG, never])
    error_P, cost_P = evaluate(problem, thresholds_PG)
    return tuple(
        GridPlan(
            dict(zip(gates, map(float, thresholds_PG[p]), strict=True)),
            1 - float(error_P[p]),
            float(cost_P[p]),
        )
        for p in np.lexsort((error_P, cost_P))
    )


def front(points: Sequence[GridPlan], tolerance: float = TOLERANCE) -> tuple[GridPlan, ...]:
    """The authors' front: from cheap to dear, a point is kept if it is better than the last kept
    one minus `tolerance`.

    Each may be a little worse than the one before it. Where the knee is they leave to the eye.
    """
    kept = list[GridPlan]()
    # stable: equal costs stay as they came
    for point in sorted(points, key=lambda point: point.cost):
        if not kept or kept[-1].accuracy - point.accuracy < tolerance - ROUNDING:
            kept.append(point)
    return tuple(kept)


def kept_shares(trace: Trace, keep: float | Sequence[float]) -> Plan:
    """The thresholds by which BranchyNet's code keeps a share of the training rows for later exits.

    In the authors' code (`percentTrainKeeps`): at every exit all rows are sorted by entropy, those
    that left before included, and the threshold is the entropy of the row behind which the share
    `keep` remains. There a list of shares counts rows of the last batch, which is taken for a slip:
    here every share is of all rows.

    Args:
        trace: recorded with the gate `neg_entropy`, or with any other whose score falls with doubt.
        keep: above 0 and at most 1; one share for all gates, or one for each.

    Returns:
        A plan by hand. Some more rows than the share go on where rows have equal scores.

    Raises:
        InvalidArgument: a share that is none, or not one for each gate.
    """
    gates = trace.topology.gates
    if isinstance(keep, (int, float)):
        shares = [float(keep)] * len(gates)
    else:
        shares = [float(each) for each in keep]
    if len(shares) != len(gates) or not all(0 < share <= 1 for share in shares):
        raise InvalidArgument(
            f"keep must be a share above 0 and at most 1, one or {len(gates)} of them, got {keep!r}"
        )
    thresholds: dict[str, float] = {}
    for gate, share, score_N in zip(gates, shares, trace.scores.T, strict=True):
        leave = int(len(score_N) - share * len(score_N))
        sure_first = np.sort(score_N)[::-1]
        thresholds[gate] = float(above(float(sure_first[leave]), score_N))
    return Plan.by_hand(thresholds)


def above(value: float, score_N: Singles) -> np.float32:
    """The threshold at which `choose` lets those rows leave whose score is greater than `value`,
    exactly.

    It is the next float32 number above the value; where a row scores just that, the one below,
    which decides the same unless another row scores that one: then nothing lies strictly between
    the two.

    >>> float(above(-0.5, np.float32([-0.5, -0.25])))
    -0.4999999701976776
    """
    if value == math.inf:
        return np.float32(math.inf)
    nearest = np.float32(value)
    if float(nearest) > value:
        upper = nearest
    else:
        upper = np.nextafter(nearest, np.float32(math.inf))
    lower = np.nextafter(upper, np.float32(-math.inf))
    return np.float32(lower if (score_N == upper).any() and not (score_N == lower).any() else upper)


def _values(grid: Grid, gates: Sequence[str], scores_NG: Singles) -> list[Sequence[float]]:
    """What a score must be greater than, for each gate."""
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise unknown(grid, GRIDS, "grid")
        if scores_NG.size and (highest := float(np.nanmax(scores_NG, initial=-math.inf))) > ZERO:
            raise InvalidArgument(
                f"a score is {highest:g}, expected minus an entropy for the grid {grid!r}; record "
                f"with the gate "
                "neg_entropy, or give a grid of this gate's own scores"
            )
        return [[-entropy for entropy in GRIDS[grid]]] * len(gates)
    if isinstance(grid, Mapping):
        each = dict(grid)
    else:
        each = dict.fromkeys(gates, tuple(grid))
    if set(each) != set(gates):
        raise InvalidArgument(
            f"the grid is given for {list(each)}, expected one for each gate of {list(gates)}"
        )
    for gate, values in each.items():
        if not len(values) or not all(
            abs(value) < FLOAT32_MAX or value == math.inf for value in values
        ):
            raise InvalidArgument(
                f"the grid of {gate!r} is {list(values)}, expected float32 numbers (inf closes "
                f"the exit)"
            )
    return [each[gate] for gate in gates]


def _checked_shares(shares: Sequence[float], gates: int) -> Sequence[float]:
    if not len(shares) or not all(0 <= share <= 1 for share in shares):
        raise InvalidArgument(
            f"the shares are {list(shares)}, expected parts of the rows, from 0 to 1"
        )
    _check_size([len(shares)] * gates)
    return shares


def _check_size(sizes: Sequence[int]) -> None:
    if math.prod(sizes) > MOST_PLANS:
        raise InvalidArgument(
            f"the grid has {math.prod(sizes):,} plans over {len(sizes)} gates, expected at most "
            f"{MOST_PLANS:,}; thin it"
        )


def _product(columns: Sequence[Sequence[np.float32]]) -> Singles:
    """Every combination [P, G] of one value per gate."""
    if not columns:
        return np.zeros((1, 0), np.float32)
    mesh = np.meshgrid(*(np.array(column, np.float32) for column in columns), indexing="ij")
    return np.stack([axis.ravel() for axis in mesh], axis=1)


def _by_shares(scores_NG: Singles, shares: Sequence[float]) -> Singles:
    """Thresholds [P, G] at which so large a part of the rows that arrive at each gate leaves."""
    plans: list[tuple[list[np.float32], Bools]] = [([], np.ones(len(scores_NG), bool))]
    for score_N in scores_NG.T:
        longer = list[tuple[list[np.float32], Bools]]()
        for before, going_N in plans:
            cuts = cuts_of(np.ascontiguousarray(score_N[going_N]))
            arriving = int(going_N.sum())
            for share in shares:
                most = math.floor(share * arriving + 1e-9)
                t = cuts.values_K[np.searchsorted(cuts.counts_K, most, side="right") - 1]
                stays_N = choose(score_N[:, None], np.array([t])) == 1
                longer.append(([*before, t], going_N & stays_N))
        plans = longer
    return np.array([thresholds for thresholds, _ in plans], np.float32).reshape(
        len(plans), scores_NG.shape[1]
    )
