"""The search against brute force, against `choose`, and against the baselines that it starts
from.
"""

import doctest
import tracemalloc
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from offramp.calibration import archive, search, threshold_table
from offramp.calibration.baselines import baselines, powers_of
from offramp.calibration.search import (
    PlanPoint,
    SearchProblem,
    best,
    cheapest,
    evaluate,
    exits_of,
    frontier,
)
from offramp.calibration.threshold_table import cuts_of
from offramp.errors import BadData, InvalidArgument
from offramp.plans.plan import choose

AWKWARD = [
    0.0,
    -0.0,
    1.0,
    float(np.nextafter(np.float32(1), np.float32(2))),
    -2.5,
    3e38,
    -3e38,
    2e-45,
]
floats = st.sampled_from([*AWKWARD, np.inf, -np.inf, np.nan]).map(np.float32)
KINDS = ("errors", "gaps", "real", "ties", "per row")


def problem(seed: int, kind: str, gates: int, rows: int, *, heads: float = 0.0) -> SearchProblem:
    """A random chain: losses of several sorts; with heads > 0 every open exit costs something."""
    rng = np.random.default_rng(seed)
    hard_N1 = rng.random((rows, 1))
    scores = -hard_N1 + 0.3 * rng.standard_normal((rows, gates))
    losses = hard_N1 * np.linspace(1.5, 0.5, gates + 1) + 0.3 * rng.standard_normal(
        (rows, gates + 1)
    )
    if kind in ("errors", "gaps"):
        losses = (losses > 0.6).astype(float)
    if kind == "gaps":
        losses -= losses[:, -1:]
    if kind == "ties":
        scores = np.round(3 * scores)
        scores[rng.random(scores.shape) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
    to_E = np.cumsum(rng.random(gates + 1) + 0.2)
    head_E = heads * rng.random(gates + 1)
    size = rng.random((rows, 1)) + 0.5 if kind == "per row" else 1.0
    return SearchProblem(
        scores.astype(np.float32), losses, lambda open_E: size * (to_E + np.cumsum(head_E * open_E))
    )


def brute(p: SearchProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every plan there is: all middles between distinct scores, everyone, nobody."""
    values = []
    for score_N in p.scores_NG.T:
        distinct = np.unique(score_N[score_N > -np.inf]).astype(np.float64)
        finite = distinct[distinct < np.inf]
        middles = [*(finite[1:] + finite[:-1]) / 2, np.inf]
        if len(finite):
            middles += [finite[0] - 1] + ([finite[-1] + 1] if len(finite) < len(distinct) else [])
        values.append(np.float32(middles))
    plans = np.array(list(product(*values)), np.float32)
    return plans, *evaluate(p, plans)


def asked(
    p: SearchProblem, loss_P: np.ndarray, cost_P: np.ndarray
) -> Iterator[tuple[PlanPoint, float, float, float]]:
    """Both questions at several levels: (answer, what it reached, the least possible, what it was
    to hold).
    """
    for share in (0.0, 0.15, 0.5, 0.8):
        budget = float(cost_P.min() + share * np.ptp(cost_P))
        found = best(p, budget)
        assert found.cost <= budget + 1e-9
        yield found, found.loss, float(loss_P[cost_P <= budget + 1e-9].min()), float(np.ptp(loss_P))
        level = float(loss_P.min() + share * np.ptp(loss_P) / 2)
        found = cheapest(p, level)
        assert found.loss <= level + 1e-9
        yield found, found.cost, float(cost_P[loss_P <= level + 1e-9].min()), float(np.ptp(cost_P))


@pytest.mark.parametrize("heads", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gates", "rows"), [(1, 40), (1, 1), (2, 30), (2, 7), (3, 12)])
def test_small_chains_are_solved_exactly(gates: int, rows: int, kind: str, heads: float) -> None:
    p = problem(gates * rows, kind, gates, rows, heads=heads)
    _, loss_P, cost_P = brute(p)
    for found, reached, least, scale in asked(p, loss_P, cost_P):
        assert abs(reached - least) <= 1e-8 * max(1.0, scale)
        assert np.array_equal(evaluate(p, found.thresholds_G[None]), [[found.loss], [found.cost]])
    curve = frontier(p, points=400)
    for loss, cost in zip(loss_P, cost_P, strict=True):
        assert (
            (curve.loss_P <= loss + 1e-9) & (curve.cost_P <= cost + 0.01 * np.ptp(cost_P) + 1e-9)
        ).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_local_search_alone_is_within_half_a_percent(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "EXACT_STEPS", 0)
    off = []
    number = 0
    for seed in range(2):
        p = problem(
            seed, kind, 3, int(np.random.default_rng(seed).integers(5, 41)), heads=0.2 * (seed % 2)
        )
        _, loss_P, cost_P = brute(p)
        for _, reached, least, scale in asked(p, loss_P, cost_P):
            number += 1
            off.append((reached - least) / scale)
    assert np.mean(off) < 0.001
    assert np.mean(np.array(off) > 0.005) <= 0.04, off


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_exits_are_those_of_choose(data: st.DataObject, rows: int, gates: int, plans: int) -> None:
    scores_NG = data.draw(arrays(np.float32, (rows, gates), elements=floats))
    thresholds_PG = data.draw(arrays(np.float32, (plans, gates), elements=floats))
    expected = np.full((plans, rows), gates)
    for plan, row in product(range(plans), range(rows)):
        for g in range(gates):
            if choose(scores_NG[row, g : g + 1][None], thresholds_PG[plan, g : g + 1])[0] == 0:
                expected[plan, row] = g
                break
    assert np.array_equal(exits_of(scores_NG, thresholds_PG), expected)


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.float32, st.integers(1, 12), elements=floats | st.floats(-3, 3, width=32)),
    st.sampled_from([0.0, 1e-4, 0.5]),
)
def test_thresholds_stand_strictly_between_scores(score_N: np.ndarray, gap: float) -> None:
    made = cuts_of(score_N, gap)
    assert made.values_K.dtype == np.float32
    assert made.values_K[0] == np.inf
    assert np.isfinite(made.values_K[1:]).all()
    assert (np.diff(made.counts_K) > 0).all()
    for k, value in enumerate(made.values_K[1:], 1):
        above = score_N[score_N > value]
        below = score_N[score_N < value]
        assert not (score_N == value).any()
        assert len(above) == made.counts_K[k]
        assert np.array_equal(
            np.sort(np.flatnonzero(made.column_N <= k)), np.flatnonzero(score_N > value)
        )
        if gap and len(below):
            assert float(above.min()) - float(below.max()) >= gap


def test_neighbouring_floats_leave_no_room() -> None:
    one = np.float32(1)
    after = np.nextafter(one, np.float32(2))
    assert cuts_of(np.array([one, after], np.float32)).counts_K.tolist() == [0, 2]
    assert cuts_of(np.array([one, np.nextafter(after, np.float32(2))])).values_K[1] == after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [0.0, 0.05])
def test_never_worse_than_a_family(kind: str, heads: float) -> None:
    p = problem(5, kind, 4, 100, heads=heads)
    q = np.linspace(0, 1, 200)
    pooled = np.unique(p.scores_NG[np.isfinite(p.scores_NG)])
    middles = ((pooled[1:] + pooled[:-1]) / 2).astype(np.float32)
    path = np.nanquantile(np.where(np.isinf(p.scores_NG), np.nan, p.scores_NG), q, axis=0).astype(
        np.float32
    )
    table = archive.OpenSets.of(p.scores_NG, p.losses_NE, p.cost, 0.0).whole()
    powers = powers_of(table).cuts(np.arange(39))
    plans_PG = np.concatenate((np.repeat(middles[:, None], 4, 1), path, table.thresholds(powers)))
    loss_P, cost_P = evaluate(p, plans_PG)
    for share in (0.2, 0.6):
        budget = cost_P.min() + share * np.ptp(cost_P)
        assert best(p, budget).loss <= loss_P[cost_P <= budget].min() + 1e-9
        level = loss_P.min() + share * np.ptp(loss_P)
        assert cheapest(p, level).cost <= cost_P[loss_P <= level].min() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_priced_as_their_plans_are(kind: str) -> None:
    p = problem(3, kind, 4, 60, heads=0.0)
    table = archive.OpenSets.of(p.scores_NG, p.losses_NE, p.cost, 0.0).whole()
    for curve in baselines(table):
        plans = curve.cuts(np.arange(len(curve.loss_D)))
        loss_D, cost_D = evaluate(p, table.thresholds(plans))
        np.testing.assert_allclose(curve.loss_D / 60, loss_D, atol=1e-12)
        np.testing.assert_allclose(curve.cost_D / 60, cost_D, atol=1e-12)


def test_powers_answer_the_shares_of_msdnet() -> None:
    p = problem(1, "real", 3, 1000)
    table = archive.OpenSets.of(p.scores_NG, p.losses_NE, p.cost, 0.0).whole()
    exits_N = table.exits(powers_of(table, np.array([0.5])).cuts(np.array([0])))[0]
    shares = np.floor(1000 * 0.5 ** np.arange(1, 4) / (0.5 ** np.arange(1, 5)).sum())
    assert np.bincount(exits_N, minlength=4)[:3].tolist() == shares.tolist()


@pytest.mark.parametrize("heads", [0.0, 0.05])
@pytest.mark.parametrize(
    ("gates", "rows"), [(1, 300), (2, 300), (3, 200), (6, 200), (6, 1), (0, 4)]
)
def test_frontier_falls_from_cheap_to_dear(gates: int, rows: int, heads: float) -> None:
    p = problem(7, "errors", gates, rows, heads=heads)
    curve = frontier(p, points=50)
    assert len(curve) <= 50
    assert curve.thresholds_PG.dtype == np.float32
    assert (np.diff(curve.cost_P) >= 0).all()
    never = (curve.thresholds_PG == np.inf).all(1)
    assert never.sum() == 1
    kept = archive.undominated(curve.loss_P, curve.cost_P)
    assert set(range(len(curve))) - set(kept.tolist()) <= set(np.flatnonzero(never).tolist())
    assert np.array_equal(evaluate(p, curve.thresholds_PG), (curve.loss_P, curve.cost_P))
    exits_PN = exits_of(p.scores_NG, curve.thresholds_PG)
    for g in range(gates):
        # unused exits are closed
        assert ((curve.thresholds_PG[:, g] < np.inf) == (exits_PN == g).any(1)).all()


def test_frontier_keeps_up_with_the_point_solutions() -> None:
    p = problem(11, "real", 5, 300, heads=0.05)
    curve = frontier(p)
    for i in range(10, len(curve), 30):
        assert curve.loss_P[i] <= best(p, float(curve.cost_P[i])).loss + 0.01 * np.ptp(curve.loss_P)


def test_a_dear_exit_is_closed() -> None:
    p = problem(2, "real", 5, 200)
    price = np.array([0.0, 0.0, 50.0, 0.0, 0.0, 0.0])
    dear = SearchProblem(
        p.scores_NG, p.losses_NE, lambda open_E: p.cost(open_E)[0] + np.cumsum(price * open_E)
    )
    curve = frontier(dear)
    cheap = curve.cost_P < 20
    assert cheap.sum() > 20
    assert (curve.thresholds_PG[cheap, 2] == np.inf).all()
    assert best(dear, 2.0).thresholds_G[2] == np.inf


def test_a_member_goes_when_all_its_exits_close() -> None:
    p = problem(4, "real", 4, 100)

    def ladder(open_E: np.ndarray) -> np.ndarray:
        return np.cumsum([1.0 * open_E[0], 0, 30.0 * (open_E[1] | open_E[2]), 1.0 * open_E[3], 5.0])

    found = best(SearchProblem(p.scores_NG, p.losses_NE, ladder), 7.0)
    assert (found.thresholds_G[1:3] == np.inf).all()
    assert found.loss < p.losses_NE[:, -1].mean() + 0.1


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, -np.inf])
def test_scores_all_alike(value: float) -> None:
    losses = np.random.default_rng(0).standard_normal((9, 4))
    p = SearchProblem(
        np.full((9, 3), value, np.float32), losses, lambda open_E: np.arange(1.0, 5.0)
    )
    curve = frontier(p)
    assert (curve.thresholds_PG[-1] == np.inf).all() or curve.cost_P[-1] <= 4
    if np.isfinite(value) or value == np.inf:
        assert best(p, 1.0).loss == pytest.approx(losses[:, 0].mean())
    else:
        assert len(curve) == 1
        with pytest.raises(InvalidArgument, match="larger budget"):
            best(p, 1.0)


def test_what_cannot_be_held_says_so() -> None:
    p = problem(0, "errors", 4, 50)
    with pytest.raises(InvalidArgument, match="higher level"):
        cheapest(p, -1.0)
    with pytest.raises(InvalidArgument, match="larger budget"):
        best(p, 0.01)


def test_bad_input_is_refused() -> None:
    scores = np.zeros((3, 1), np.float32)
    losses = np.zeros((3, 2))
    with pytest.raises(BadData, match="float32"):
        SearchProblem(scores.astype(np.float64), losses, lambda o: np.ones(2))
    with pytest.raises(BadData, match="row 1"):
        SearchProblem(scores, np.array([[0, 0], [0, np.nan], [0, 0]]), lambda o: np.ones(2))
    with pytest.raises(BadData, match="cost_to"):
        frontier(SearchProblem(scores, losses, lambda o: np.ones(3)))
    with pytest.raises(InvalidArgument, match="thresholds"):
        evaluate(SearchProblem(scores, losses, lambda o: np.ones(2)), np.zeros((1, 2), np.float32))


def test_a_gap_is_kept() -> None:
    p = problem(9, "real", 4, 120)
    for row in frontier(p, gap=0.02).thresholds_PG:
        for g in np.flatnonzero(row < np.inf):
            score_N = p.scores_NG[:, g].astype(np.float64)
            below = score_N[score_N < row[g]]
            assert (
                score_N[score_N > row[g]].min() - (below.max() if len(below) else -np.inf) >= 0.02
            )


def test_evaluate_is_frugal() -> None:
    p = problem(0, "real", 4, 5000)
    plans = np.repeat(np.zeros((1, 4), np.float32), 400, 0)
    tracemalloc.start()
    evaluate(p, plans)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize("module", [threshold_table, search])
def test_docstrings_run(module: object) -> None:
    assert doctest.testmod(module).failed == 0
