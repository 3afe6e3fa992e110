"""Plans found on a sample and refined on all rows: they hold the limit there, and lose little to
the full search.
"""

from __future__ import annotations

import numpy as np
import pytest

from offramp.calibration import refining, search
from offramp.calibration.search import SearchProblem, best, cheapest, evaluate
from offramp.errors import OutOfBudget

KINDS = ("errors", "gaps", "per row", "ties")


def problem(kind: str, gates: int, rows: int, seed: int = 0) -> SearchProblem:
    rng = np.random.default_rng(seed)
    hard_N1 = rng.random((rows, 1))
    scores = -hard_N1 + 0.2 * rng.standard_normal((rows, gates))
    losses = (
        hard_N1 * np.linspace(1.6, 0.6, gates + 1) + 0.3 * rng.standard_normal((rows, gates + 1))
        > 0.6
    ) * 1.0
    if kind == "gaps":
        losses -= losses[:, -1:]
    if kind == "ties":
        scores = np.round(5 * scores)
        scores[rng.random(scores.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    to_E = np.cumsum(np.ones(gates + 1))
    size = rng.random((rows, 1)) + 0.5 if kind == "per row" else 1.0
    return SearchProblem(
        scores.astype(np.float32), losses, lambda open_E: size * (to_E + 0.05 * np.cumsum(open_E))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gates", [1, 3])
def test_a_sample_loses_little_and_all_rows_hold_the_limit(kind, gates, monkeypatch):
    p = problem(kind, gates, 1500)
    dear = evaluate(p, np.full((1, gates), np.inf, np.float32))[1][0]
    exact_best = best(p, 0.6 * dear)
    exact_cheapest = cheapest(p, exact_best.loss)
    monkeypatch.setattr(search, "SEARCH_ROWS", 500)
    monkeypatch.setattr(refining, "BLOCK", 256)
    found = best(p, 0.6 * dear)
    assert found.cost <= 0.6 * dear * (1 + 1e-9)
    assert found.loss <= exact_best.loss + 0.02
    found = cheapest(p, exact_best.loss)
    assert found.loss <= exact_best.loss + 1e-9
    assert found.cost <= exact_cheapest.cost + 0.04 * dear
    for g in range(gates):
        assert found.thresholds_G[g] not in p.scores_NG[np.isfinite(p.scores_NG[:, g]), g]
    assert np.array_equal(evaluate(p, found.thresholds_G[None]), [[found.loss], [found.cost]])


def test_a_limit_that_no_plan_keeps(monkeypatch):
    monkeypatch.setattr(search, "SEARCH_ROWS", 100)
    with pytest.raises(OutOfBudget):
        best(problem("errors", 2, 1000), 0.01)


def test_a_limit_that_only_all_rows_keep(monkeypatch):
    """The cheapest plan costs exactly the limit: the sample misses it by its luck, all rows do
    not.
    """
    p = problem("per row", 2, 1000)
    everyone = np.array([[-100.0, np.inf]], np.float32)
    limit = float(evaluate(p, everyone)[1][0]) * 1.0001
    monkeypatch.setattr(search, "SEARCH_ROWS", 60)
    assert best(p, limit).cost <= limit


def test_curves_are_what_each_move_gives():
    p = problem("gaps", 3, 400)
    refiner = refining.Refiner(p.scores_NG, p.losses_NE, p.cost, loss_held=False, tie=0.0)
    cut_G = np.array([40, 90, 10])
    for gate, goal_K, held_K in refiner._curves(cut_G)[0]:
        for k in (1, 20, 200, len(goal_K) - 1):
            moved_G = cut_G.copy()
            moved_G[gate] = k
            loss_P, cost_P = evaluate(p, refiner.thresholds(moved_G)[None])
            assert goal_K[k] / 400 == pytest.approx(loss_P[0])
            assert held_K[k] / 400 == pytest.approx(cost_P[0])
