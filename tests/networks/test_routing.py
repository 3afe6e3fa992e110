"""A throwaway proof that the formats can carry routes: one gate with three successors that re-join.

    a --score/a@0 >= t0--> answered at a
      --score/a@1 >= t1--> c          (skips b)
      --otherwise--------> b --> c    (b and the skip re-join at c)

Nothing in the package routes yet; the trace's columns, the thresholds and `choose` are ready for it.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offramp.plans.plan import Plan, choose
from offramp.plans.trace import Trace
from small import trace_of

THRESHOLDS = {"small": (1.5, 0.25), "middle": (math.inf,)}


def routed(rows: int = 200) -> Trace:
    """A trace whose first gate has two score columns, K - 1 for K = 3 successors."""
    trace = trace_of(rows)
    columns = dict(trace.columns)
    first = columns.pop("score/small")
    columns["score/small@0"] = first
    columns["score/small@1"] = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
    columns["score/small@0"][:2], columns["score/small@1"][:3] = np.nan, [np.nan, 0.25, np.inf]
    return Trace(columns, trace.header)


def scores_of(trace: Trace) -> np.ndarray:
    return np.column_stack([trace.columns["score/small@0"], trace.columns["score/small@1"]])


def by_hand(trace: Trace) -> list[int]:
    first, second = THRESHOLDS["small"]
    return [0 if a >= first else 1 if b >= second else 2 for a, b in scores_of(trace)]


def test_choose_gives_the_successor_of_each_row():
    trace = routed()
    taken = choose(scores_of(trace), np.float32(THRESHOLDS["small"]))
    assert taken.tolist() == by_hand(trace)
    assert set(taken.tolist()) == {0, 1, 2}
    assert taken[:2].tolist() == [2, 1]  # NaN takes no route; at the threshold the route is taken
    same = choose(torch.from_numpy(scores_of(trace)), torch.tensor(THRESHOLDS["small"]))
    assert same.tolist() == taken.tolist()
    shut = choose(scores_of(trace), np.float32([np.inf, np.inf]))
    assert (shut == 2).all()


def test_routes_re_join():
    """Whoever skipped b and whoever went through b arrive at c; the plain cost model sums what each row ran."""
    trace = routed()
    taken = choose(scores_of(trace), np.float32(THRESHOLDS["small"]))
    arrive = (taken == 1) | (taken == 2)
    ran = {"small": np.ones(len(trace)), "middle": taken == 2, "large": arrive}
    cost = sum(trace.columns[f"cost/segment/{name}"][0] * rows for name, rows in ran.items())
    assert set(np.unique(cost)) == {1.0, 1.0 + 8.0, 1.0 + 2.0 + 8.0}
    answers = np.where(taken == 0, trace.columns["answer/small"], trace.columns["answer/large"])
    assert answers.shape == (200,)


def test_a_trace_carries_the_columns(tmp_path):
    trace = routed()
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert {"score/small@0", "score/small@1"} <= again.columns.keys()
    np.testing.assert_array_equal(scores_of(again), scores_of(trace))
    assert len(again[10:20].columns["score/small@1"]) == 10


def test_a_plan_carries_the_thresholds(tmp_path):
    plan = Plan.by_hand(THRESHOLDS)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.thresholds == THRESHOLDS
    assert again == plan
    assert again.open_gates() == {"small"}
    assert Plan.covers(again.thresholds, None) != Plan.covers({**THRESHOLDS, "small": (1.5, 0.5)}, None)


def test_replay_knows_who_is_answered_there():
    trace = routed()
    done = trace.replay(Plan.by_hand(THRESHOLDS))
    assert ((done.exit == 0) == (np.array(by_hand(trace)) == 0)).all()
    assert 0 < trace.evaluate(Plan.by_hand(THRESHOLDS)).in_band < 1


def test_one_threshold_does_not_fit_two_routes():
    trace = routed()
    with pytest.raises(ValueError, match="1 thresholds, expected 2"):
        trace.replay(Plan.by_hand({"small": 1.0}))
