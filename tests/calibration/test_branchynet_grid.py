"""BranchyNet's screening against a slow copy of the authors' procedure: entropies in nats, `e < T`,
row by row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.branchynet_grid import (
    GRIDS,
    GridPlan,
    above,
    front,
    grid_plans,
    kept_shares,
)
from offramp.errors import InvalidArgument, UnknownName
from offramp.plans.plan import choose
from offramp.plans.trace import Trace
from small import trace_of

MACS = (1.0, 2.0, 8.0)
HEADS = (0.5, 0.25)


def entropies(rows: int, seed: int = 0, members: int = 3) -> Trace:
    """A trace whose gates score minus the entropy, and whose exits cost something."""
    trace = trace_of(rows, seed=seed, skill=(0.7, 0.85, 0.95)[:members], macs=MACS[:members])
    columns = dict(trace.columns)
    for name, head in zip(trace.topology.gates, HEADS, strict=False):
        logits = 2 * columns[f"logits/{name}"].astype(np.float64)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        columns[f"score/{name}"] = (p * np.log(p)).sum(1).astype(np.float32)
        columns[f"cost/exit/{name}"] = np.array([head, np.nan, np.nan])
    return Trace(columns, trace.header)


def slow(trace: Trace, grids) -> dict[tuple[float, ...], tuple[float, float]]:
    """The paper's loop: for every combination of T, every row leaves at the first exit whose
    entropy is below T.
    """
    gates = trace.topology.gates
    found = {}
    e = [[-float(score) for score in trace.columns[f"score/{gate}"]] for gate in gates]
    for combination in product(*grids):
        right = cost = 0.0
        for row in range(len(trace)):
            index = next((g for g, t in enumerate(combination) if e[g][row] < t), len(gates))
            right += float(trace.answers[row, index] == trace.labels[row])
            cost += sum(MACS[: index + 1]) + sum(HEADS[: index + 1])
        found[combination] = right / len(trace), cost / len(trace)
    return found


@pytest.mark.parametrize("name", GRIDS)
def test_the_papers_grids_give_what_its_loop_gives(name):
    trace = entropies(60)
    want = slow(trace, [GRIDS[name]] * 2)
    points = grid_plans(trace, grid=name)
    never = [point for point in points if set(point.thresholds.values()) == {math.inf}]
    assert len(never) == 1
    points = tuple(point for point in points if point is not never[0])
    assert len(points) == len(GRIDS[name]) ** 2
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    assert sorted((round(p.cost, 9), round(p.accuracy, 9)) for p in points) == sorted(
        (round(cost, 9), round(accuracy, 9)) for accuracy, cost in want.values()
    )


def test_each_point_is_what_its_plan_does():
    trace = entropies(80)
    want = slow(trace, [GRIDS["alexnet"]] * 2)
    for point in grid_plans(trace, grid="alexnet")[::9]:
        done = trace.evaluate(point.plan)
        assert done.accuracy == pytest.approx(point.accuracy)
        assert done.prices[0].mean == pytest.approx(point.cost)
        known = [*want.values(), (done.plain_accuracy, MACS[-1])]
        assert any((point.accuracy, point.cost) == pytest.approx(each) for each in known)
        assert str(point.plan).endswith("no promise: set by hand.")


def near(score: np.float32) -> list[float]:
    """A score, its neighbours, and numbers between that float32 does not have."""
    around = [score, np.nextafter(score, np.float32(9)), np.nextafter(score, np.float32(-9))]
    return [*map(float, around), float(score) + 1e-12, float(score) - 1e-12]


@given(
    st.lists(st.integers(-6, 2), min_size=1, max_size=6),
    st.floats(-2, 2, width=32),
    st.integers(0, 4),
)
def test_a_value_lets_exactly_the_rows_above_it_leave(steps, middle, which):
    """On scores that crowd around the value, a few float32 steps apart."""
    scores = []
    for step in steps:
        score = np.float32(middle)
        for _ in range(abs(step)):
            score = np.nextafter(score, np.float32(math.copysign(9, step)))
        scores.append(score)
    score_N = np.array([*scores, np.nan, np.inf, -np.inf], np.float32)
    value = near(np.float32(middle))[which]
    t = above(value, score_N)
    assert (
        (choose(score_N[:, None], np.array([t])) == 0) == (score_N.astype(np.float64) > value)
    ).all()
    below = score_N[score_N.astype(np.float64) <= value]
    # strictly between, where it can be
    assert not (score_N == t).any() or np.nextafter(t, np.float32(-9)) in below


def test_a_row_on_the_value_stays_as_the_paper_has_it():
    score_N = np.float32([-0.25, -0.5])
    assert (score_N >= above(-0.25, score_N)).tolist() == [False, False]
    assert (score_N >= above(-0.5, score_N)).tolist() == [True, False]
    assert above(math.inf, score_N) == math.inf


def test_the_front_is_that_of_the_authors():
    points = grid_plans(entropies(200, seed=3), grid="lenet")
    kept = []
    last = None
    for point in points:
        if last is None or point.accuracy > last - 1e-4:
            kept.append(point)
            last = point.accuracy
    assert front(points) == tuple(kept)
    assert 1 < len(kept) < len(points)
    made = [
        GridPlan({}, accuracy, cost)
        for accuracy, cost in ((0.9, 1), (0.8, 2), (0.89995, 3), (0.8999, 4), (1, 5))
    ]
    assert [point.cost for point in front(made[::-1])] == [1, 3, 4, 5]
    assert [point.cost for point in front(made, 0.0)] == [1, 5]
    one_row_of_10_000 = [GridPlan({}, 1 - 800 / 10_000, 1), GridPlan({}, 1 - 801 / 10_000, 2)]
    assert len(front(one_row_of_10_000)) == 1


def test_another_gate_has_a_grid_of_its_own_scores():
    trace = trace_of(50)
    grids = {"small": (1.0, 2.5, math.inf), "middle": (0.5, 3.0)}
    points = grid_plans(trace, grid=grids)
    assert len(points) == 6 + 1
    for small, middle in product(*grids.values()):
        scores = [trace.columns[f"score/{gate}"].astype(np.float64) for gate in ("small", "middle")]
        exits = np.where(scores[0] > small, 0, np.where(scores[1] > middle, 1, 2))
        right = (trace.answers[np.arange(50), exits] == trace.labels).mean()
        # a closed member is not run
        cost = np.cumsum([MACS[0] * (small < math.inf), *MACS[1:]])[exits].mean()
        assert any((p.accuracy, p.cost) == pytest.approx((right, cost)) for p in points)
    assert len(grid_plans(trace, grid=(1.0, 2.0, 3.0))) == 9 + 1


def test_a_closed_exit_is_not_charged():
    trace = entropies(40)
    (point,) = grid_plans(trace, grid=(math.inf,))
    assert point.cost == MACS[-1]
    never, charged = grid_plans(trace, grid=(-1e-9,))
    assert never.cost == MACS[-1]  # cheaper than to ask every exit and leave at none
    assert charged.cost == sum(MACS) + sum(HEADS)


@pytest.mark.parametrize("members", [2, 3])
def test_shares_of_the_rows_that_arrive(members):
    trace = entropies(101, members=members)
    shares = (0.0, 0.3, 0.5, 1.0)
    points = grid_plans(trace, shares=shares)
    assert len(points) == 4 ** (members - 1)
    got = sorted(tuple(np.bincount(trace.replay(p.plan).exit, minlength=members)) for p in points)
    want = []
    for combination in product(shares, repeat=members - 1):
        left = 101
        counts = []
        for share in combination:
            counts.append(math.floor(share * left + 1e-9))
            left -= counts[-1]
        want.append((*counts, left))
    assert got == sorted(want)
    for point in points:
        done = trace.replay(point.plan).exit
        # those that leave are the readiest of those that arrive
        for index, gate in enumerate(trace.topology.gates):
            scores = trace.columns[f"score/{gate}"]
            arrived = done >= index
            if 0 < (done == index).sum() < arrived.sum():
                assert scores[done == index].min() > scores[done > index].max()


def test_rows_with_equal_scores_stay_together():
    trace = entropies(8, members=2)
    column = np.float32([-1, -1, -1, -2, -2, -3, -4, np.nan])
    tied = Trace({**trace.columns, "score/small": column}, trace.header)
    leaving = {
        p.thresholds["small"]: tied.replay(p.plan).exit
        for p in grid_plans(tied, shares=(0.25, 0.5, 0.7, 1.0))
    }
    assert sorted(int((exits == 0).sum()) for exits in leaving.values()) == [0, 3, 5, 7]


REFUSED = {
    "neither": ({}, InvalidArgument, "exactly one"),
    "both": ({"grid": "lenet", "shares": (0.5,)}, InvalidArgument, "exactly one"),
    "an unknown grid": ({"grid": "lennet"}, UnknownName, "lenet"),
    "a grid for others": ({"grid": {"small": (1.0,)}}, InvalidArgument, "values for each gate"),
    "no values": ({"grid": ()}, InvalidArgument, "float32 numbers"),
    "NaN": ({"grid": (math.nan,)}, InvalidArgument, "float32 numbers"),
    "too large": ({"grid": (1e39,)}, InvalidArgument, "float32 numbers"),
    "no share": ({"shares": (1.5,)}, InvalidArgument, "from 0 to 1"),
    "too many": (
        {"grid": np.linspace(0, 1, 1001)},
        InvalidArgument,
        "1,002,001 plans over 2 gates",
    ),
    "too many shares": ({"shares": np.linspace(0, 1, 1001)}, InvalidArgument, "1,002,001 plans"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    options, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        grid_plans(entropies(10), **options)


def test_traces_that_are_refused():
    with pytest.raises(InvalidArgument, match="neg_entropy"):
        grid_plans(trace_of(20), grid="lenet")
    with pytest.raises(InvalidArgument, match="labels"):
        grid_plans(trace_of(20, labelled=False), grid=(1.0,))
    trace = entropies(20)
    with pytest.raises(InvalidArgument, match="never trained"):
        grid_plans(Trace(trace.columns, replace(trace.header, trained=False)), grid="lenet")


def test_the_share_that_is_kept_for_later_exits():
    """kunglab/branchynet a33d136, branchynet/net.py, find_thresholds_entropies: over all rows at
    every exit.
    """
    trace = trace_of(200)
    plan = kept_shares(trace, 0.25)
    for gate, score in zip(trace.topology.gates, trace.scores.T, strict=True):
        entropy = np.sort(-score)
        limit = entropy[int(200 - 0.25 * 200)]  # their threshold; rows of a smaller entropy leave
        (threshold,) = plan.thresholds[gate]
        assert np.array_equal(score >= np.float32(threshold), -score < limit)
    assert kept_shares(trace, 1.0).thresholds.keys() == plan.thresholds.keys()
    for wrong in (0, 1.5, [0.5], -1):
        with pytest.raises(InvalidArgument, match="keep must be a share above 0"):
            kept_shares(trace, wrong)
