"""BranchyNet's own choice of thresholds, for comparison: try a whole grid and keep the front.

Teerapittayanon et al., 2016, arXiv 1709.01686, and the authors' code. They screen on the test set,
one row at a time, and pick the knee of the front by hand. Here the rows of the trace are used. They
must not be test rows, because a plan looks too good on the rows that chose it. Legend: N rows,
G gates, P plans.
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

# Entropies in nats. Ten classes have at most ln 10 = 2.3, so at 3, 5 and 10 everyone leaves.
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
TOLERANCE = 1e-4  # a more expensive plan stays on the front if it loses less accuracy than this
MOST_PLANS = 1_000_000
ROUNDING = 1e-12
ZERO = 1e-5  # the rounding error of an entropy of 0 in float32

Grid = str | Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class GridPlan:
    """One plan of BranchyNet's grid.

    Attributes:
        thresholds: by gate.
        accuracy: on the rows that screen.
        cost: mean per row, on the same rows.
    """

    thresholds: Mapping[str, float]
    accuracy: float
    cost: float

    @property
    def plan(self) -> Plan:
        """The plan. It is set by hand and does not have a promise."""
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

    Among plans of equal cost the most accurate comes first. The plan that never leaves is always
    included: where exits cost more than they save, it is the cheapest.

    The paper sorts by its run time: use unit="ms" and batch=1 on a trace with timings. The paper
    does not charge branches, and here everything that runs is charged. The smallest entropies of
    its grid are within the float band of confident rows; `trace.evaluate` reports how many rows
    this concerns.

    Args:
        trace: recorded rows with labels.
        grid: "lenet" (the paper's for LeNet and ResNet) or "alexnet", both for the gate
            `neg_entropy`. Or values of any gate's own score, the same for all gates or by gate. A
            row leaves where its score is greater than the value, which is the paper's `entropy <
            T`. +inf closes an exit.
        shares: the percentile mode instead of a grid: this share of the rows that arrive at a gate
            leaves. Rows with equal scores stay together; 0 closes an exit.
        unit: of the costs, "macs" or "ms"; by default MACs if they are known.
        batch: the batch size that milliseconds are for.

    Returns:
        The plans with accuracy and cost.

    Raises:
        InvalidArgument: there are no labels, the grid does not suit the scores, or there are too
            many plans.
        UnknownName: there is no grid of this name.
    """
    if (grid is None) == (shares is None):
        raise InvalidArgument(
            f"exactly one of grid and shares must be given, got grid={grid!r} and shares={shares!r}"
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
        assert grid is not None
        values = _values(grid, gates, problem.scores_NG)
        _check_size([len(gate_values) for gate_values in values])
        columns = []
        for gate_values, score_N in zip(values, problem.scores_NG.T, strict=True):
            columns.append([above(value, score_N) for value in gate_values])
        thresholds_PG = _product(columns)
    has_never = (thresholds_PG == np.inf).all(axis=1).any()
    if not has_never:
        never = np.full((1, len(gates)), np.inf, np.float32)
        thresholds_PG = np.concatenate([thresholds_PG, never])
    error_P, cost_P = evaluate(problem, thresholds_PG)
    plans = list[GridPlan]()
    for p in np.lexsort((error_P, cost_P)):  # by cost, then by error
        thresholds = dict(zip(gates, map(float, thresholds_PG[p]), strict=True))
        plans.append(GridPlan(thresholds, 1 - float(error_P[p]), float(cost_P[p])))
    return tuple(plans)


def front(points: Sequence[GridPlan], tolerance: float = TOLERANCE) -> tuple[GridPlan, ...]:
    """The authors' front of accuracy and cost.

    From cheap to expensive, a point is kept if its accuracy is above that of the last kept one
    minus `tolerance`. So each may be a little worse than the one before it. The authors choose the
    knee of the front by eye.

    Args:
        points: plans with accuracy and cost.
        tolerance: of accuracy.

    Returns:
        The points on the front, cheapest first.
    """
    on_front = list[GridPlan]()
    # stable: points of equal cost stay in their order
    for point in sorted(points, key=lambda point: point.cost):
        if not on_front or on_front[-1].accuracy - point.accuracy < tolerance - ROUNDING:
            on_front.append(point)
    return tuple(on_front)


def kept_shares(trace: Trace, keep: float | Sequence[float]) -> Plan:
    """The thresholds by which BranchyNet's code keeps a share of the training rows for later exits.

    In the authors' code (`percentTrainKeeps`), all rows are sorted by entropy at every exit,
    including those that left before. The threshold is the entropy of the row after which the share
    `keep` remains. A list of shares counts rows of the last batch there, which we take for a
    mistake: here every share is of all rows.

    Args:
        trace: recorded with the gate `neg_entropy`, or with another one whose score falls with
            doubt.
        keep: above 0 and at most 1; one share for all gates, or one for each.

    Returns:
        A plan by hand. Where rows have equal scores, a few more rows than the share go on.

    Raises:
        InvalidArgument: a share is not between 0 and 1, or there is not one for each gate.
    """
    gates = trace.topology.gates
    if isinstance(keep, (int, float)):
        shares = [float(keep)] * len(gates)
    else:
        shares = list(map(float, keep))
    is_share = [0 < share <= 1 for share in shares]
    if len(shares) != len(gates) or not all(is_share):
        raise InvalidArgument(
            f"keep must be a share above 0 and at most 1, one or {len(gates)} of them, got {keep!r}"
        )
    thresholds: dict[str, float] = {}
    for gate, share, score_N in zip(gates, shares, trace.scores.T, strict=True):
        leave = int(len(score_N) - share * len(score_N))  # the number of rows that leave
        sure_first = np.sort(score_N)[::-1]
        thresholds[gate] = float(above(float(sure_first[leave]), score_N))
    return Plan.by_hand(thresholds)


def above(value: float, score_N: Singles) -> np.float32:
    """The threshold at which `choose` lets exactly those rows leave whose score is greater than a
    value.

    It is the next float32 number above the value. If a row scores exactly this number, the number
    below decides the same and is taken, unless another row scores that one: then nothing lies
    strictly between the two.

    Args:
        value: +inf closes the exit.
        score_N: the scores of the rows.

    Returns:
        The threshold.

    Example:
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
    if (score_N == upper).any() and not (score_N == lower).any():
        return np.float32(lower)
    return np.float32(upper)


def _values(grid: Grid, gates: Sequence[str], scores_NG: Singles) -> list[Sequence[float]]:
    """For each gate, the values that a score must exceed."""
    if isinstance(grid, str):
        return [_named_grid(grid, scores_NG)] * len(gates)
    if isinstance(grid, Mapping):
        by_gate = dict(grid)
    else:
        by_gate = dict.fromkeys(gates, tuple(grid))
    if set(by_gate) != set(gates):
        raise InvalidArgument(
            f"grid must have values for each gate of {list(gates)}, got {list(by_gate)}"
        )
    for gate, values in by_gate.items():
        is_threshold = [abs(value) < FLOAT32_MAX or value == math.inf for value in values]
        if not is_threshold or not all(is_threshold):
            raise InvalidArgument(
                f"the grid of {gate!r} must be float32 numbers (inf closes the exit), got "
                f"{list(values)}"
            )
    return [by_gate[gate] for gate in gates]


def _named_grid(name: str, scores_NG: Singles) -> Sequence[float]:
    """The values of one of the paper's grids. Its scores are minus an entropy, so never above 0."""
    if name not in GRIDS:
        raise unknown(name, GRIDS, "grid")
    if scores_NG.size:
        highest = float(np.nanmax(scores_NG, initial=-math.inf))
        if highest > ZERO:
            raise InvalidArgument(
                f"the scores for the grid {name!r} must be minus an entropy, got {highest:g}; "
                f"record with the gate neg_entropy, or give a grid of this gate's own scores"
            )
    return [-entropy for entropy in GRIDS[name]]


def _checked_shares(shares: Sequence[float], gates: int) -> Sequence[float]:
    """Shares from 0 to 1. Raises InvalidArgument for others, and for too many combinations."""
    is_share = [0 <= share <= 1 for share in shares]
    if not is_share or not all(is_share):
        raise InvalidArgument(f"shares must be shares of the rows, from 0 to 1, got {list(shares)}")
    _check_size([len(shares)] * gates)
    return shares


def _check_size(sizes: Sequence[int]) -> None:
    """Raise InvalidArgument for too many combinations."""
    plans = math.prod(sizes)
    if plans > MOST_PLANS:
        raise InvalidArgument(
            f"the grid must have at most {MOST_PLANS:,} plans, got {plans:,} plans over "
            f"{len(sizes)} gates"
        )


def _product(columns: Sequence[Sequence[np.float32]]) -> Singles:
    """Every combination [P, G] of one value per gate."""
    if not columns:
        return np.zeros((1, 0), np.float32)
    arrays = [np.array(column, np.float32) for column in columns]
    mesh = np.meshgrid(*arrays, indexing="ij")  # G arrays [K1, K2, ...]
    return np.stack([axis.ravel() for axis in mesh], axis=1)  # [P, G]


def _by_shares(scores_NG: Singles, shares: Sequence[float]) -> Singles:
    """Thresholds [P, G] at which these shares of the rows that arrive at each gate leave."""
    # A plan is known up to some gate: its thresholds so far, and which rows go on. Each gate makes
    # as many longer plans of it as there are shares.
    plans: list[tuple[list[np.float32], Bools]] = [([], np.ones(len(scores_NG), bool))]
    for score_N in scores_NG.T:
        longer = list[tuple[list[np.float32], Bools]]()
        for thresholds, going_N in plans:
            cuts = cuts_of(np.ascontiguousarray(score_N[going_N]))
            arriving = int(going_N.sum())
            for share in shares:
                most = math.floor(share * arriving + 1e-9)
                # the last cut at which at most this many rows leave
                cut = np.searchsorted(cuts.counts_K, most, side="right") - 1
                threshold = cuts.values_K[cut]
                stays_N = choose(score_N[:, None], np.array([threshold])) == 1
                longer.append(([*thresholds, threshold], going_N & stays_N))
        plans = longer
    rows = [thresholds for thresholds, _ in plans]
    return np.array(rows, np.float32).reshape(len(plans), scores_NG.shape[1])
