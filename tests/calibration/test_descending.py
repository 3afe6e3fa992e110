"""Trade-offs in networks with forks, against all plans of a grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import offramp as off
from forked import CLASSES, WIDTH, three
from offramp.calibration.descending import trade_offs_of_routes
from offramp.calibration.routed import thresholds_of
from offramp.calibration.threshold_table import thinned
from offramp.errors import OutOfBudget
from offramp.guarantees.risks import find_risk
from routes import drawn


def recorded(net, rows: int, seed: int, label: int = -1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, (rows, WIDTH), generator=draw).float()
    y = net(x)[label].argmax(1)
    return off.record(net, (x, y), timed=False, progress=False)


def every_plan(trace, most: int):
    """Loss and cost of all plans with thresholds out of `most` for each score."""
    topology = trace.topology
    losses = trace.losses(find_risk("error"))
    columns = [
        trace.columns[name]
        for gate in topology.gate_labels
        for name in topology.score_columns(gate)
    ]
    found = []
    for values in itertools.product(*[thinned(column, most) for column in columns]):
        plan = off.Plan(thresholds=thresholds_of(topology, values))
        done = trace.replay(plan)
        cost = trace.prices.mean(done.schedule, done.ran, unit="macs", batch=1)
        found.append((cost, losses[np.arange(len(trace)), done.output].mean()))
    return np.array(found)


@pytest.fixture(scope="module")
def traced():
    return recorded(three(), 800, seed=0)


def test_no_budget_has_a_better_plan_on_a_grid(traced):
    grid = every_plan(traced, 14)  # whole numbers: all places that there are
    plain = traced.price(off.Plan.never_leave(traced.topology)).plain
    for budget in (0.65, 0.7, 0.8, 0.9, 0.95):
        plan = off.calibrate(traced, budget=budget)
        price = traced.price(plan)
        best = grid[grid[:, 0] <= budget * plain, 1].min()
        assert price.mean <= budget * plain * (1 + 1e-9)
        assert 1 - traced.evaluate(plan).accuracy <= best + 0.005
        assert plan.promise is None
        assert "no promise" in str(plan)


def test_each_plan_loses_less_than_all_cheaper_ones(traced):
    losses = traced.losses(find_risk("error"))
    found = trade_offs_of_routes(traced, losses)
    assert (np.diff(found.cost_P) > 0).all()
    assert (np.diff(found.loss_P) < 0).all()
    for number in range(0, len(found.cost_P), 3):
        plan = off.Plan(thresholds=thresholds_of(traced.topology, found.thresholds_PG[number]))
        assert traced.price(plan).mean == pytest.approx(found.cost_P[number])


def test_it_is_never_worse_than_the_best_shared_threshold():
    net = drawn(7)
    trace = recorded(net, 500, seed=1)
    losses = trace.losses(find_risk("error"))
    found = trade_offs_of_routes(trace, losses)
    width = sum(trace.topology.routes(gate) for gate in trace.topology.gates)
    for value in (-1.5, -0.5, 0.5, 1.5):
        plan = off.Plan(thresholds=thresholds_of(trace.topology, [value] * width))
        done = trace.replay(plan)
        loss = losses[np.arange(len(trace)), done.output].mean()
        as_cheap = found.cost_P <= trace.price(plan).mean + 1e-9
        assert found.loss_P[as_cheap].min() <= loss + 1e-9


def test_a_budget_below_the_cheapest_path_is_refused(traced):
    with pytest.raises(OutOfBudget, match="budget must be at least"):
        off.calibrate(traced, budget=0.1)


def test_deepest_ends_the_search_there(traced):
    plan = off.calibrate(traced, budget=0.9, max_exit="middle")
    done = traced.replay(plan)
    assert plan.max_exit == "middle"
    assert traced.price(plan).mean <= 0.9 * traced.price(plan).plain
    assert "middle" in {traced.topology.exits[index] for index in done.exit}
    assert traced.header.classes == CLASSES
