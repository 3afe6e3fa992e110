"""Searching a supernet: costs that add up, one threshold for all exits, and what the evolution
finds.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from offramp.designing.evolution import (
    Judged,
    Search,
    along_thresholds,
    cost_table,
    crossed,
    evolve,
    judge,
    mutated,
    uniform,
)
from offramp.designing.single_path import reestimate, train_supernet
from offramp.designing.supernet import Subnet
from offramp.errors import InvalidArgument, UnknownName
from offramp.networks.nodes import Seen
from offramp.runtime.measuring import macs
from small import images_of
from supernets import supernet_of

X = images_of(96)
Y = (X.mean((1, 2, 3)) > 0).long()


@pytest.fixture(scope="module")
def trained():
    net = supernet_of()
    train_supernet(
        net,
        {"three": (X[:64], Y[:64]), "two": (X[:64], Y[:64])},
        steps=60,
        batch_size=32,
        progress=False,
    )
    return net


def test_costs_add_up_to_those_of_the_network_alone():
    net = supernet_of()
    table = cost_table(net)
    rng = np.random.default_rng(1)
    for task in ("three", "two"):
        for _ in range(4):
            subnet = net.drawn(rng)
            model = net.extract(subnet, task)
            head = net.exit_of("body.0", task)
            exits = macs(lambda head=head: head(Seen(torch.zeros(2, 8, 8, 8), {}))) / 2
            whole = macs(lambda model=model: model(X[:2])) / 2
            assert table.whole(subnet, task) == whole + 2 * exits
            bare = Subnet(subnet.options)
            assert table.leaving(bare, task).tolist() == [whole]
            stem = 8 * 9 * 64
            options = [
                table.options[index][number]
                for index, number in zip(net.places, subnet.options, strict=True)
            ]
            expected = [
                stem + options[0] + exits,
                stem + sum(options[:2]) + 2 * exits,
                whole + 2 * exits,
            ]
            assert table.leaving(subnet, task).tolist() == expected


def test_milliseconds_are_those_of_a_clock():
    ticks = itertools.count()
    table = cost_table(
        supernet_of(), unit="ms", rows=4, repeats=2, clock=lambda: next(ticks) * 0.004
    )
    # each call takes one tick of 4 ms, for four rows
    assert table.options["body.0"] == pytest.approx((1.0,) * 4)
    assert table.unit == "ms"
    with pytest.raises(InvalidArgument, match="unit must be one of macs, ms, got 'joules'"):
        cost_table(supernet_of(), unit="joules")


def test_the_threshold_is_the_best_one_within_the_budget():
    rng = np.random.default_rng(0)
    sure = rng.random((3, 40))
    right = rng.random((3, 40)) < np.array([[0.5], [0.7], [0.9]])
    leaving = np.array([1.0, 3.0, 8.0])
    best = -1.0
    for level in [*np.quantile(sure[:2], np.linspace(0, 1, 200)), np.inf]:
        exits = np.where(sure[0] >= level, 0, np.where(sure[1] >= level, 1, 2))
        if leaving[exits].mean() <= 5.0:
            best = max(best, right[exits, np.arange(40)].mean())
    accuracy, cost, threshold = along_thresholds(sure, right, leaving, 5.0)
    assert accuracy == pytest.approx(best)
    assert cost <= 5.0
    leaves = np.where(sure[0] >= threshold, 0, np.where(sure[1] >= threshold, 1, 2))
    assert leaving[leaves].mean() == pytest.approx(cost)
    assert along_thresholds(sure, right, leaving, 0.5)[0] == -1.0
    assert along_thresholds(sure[2:], right[2:], leaving[2:], 9.0) == (
        right[2].mean(),
        8.0,
        float("inf"),
    )


def test_the_accuracy_is_that_of_the_network_alone(trained):
    table = cost_table(trained)
    subnet = Subnet((1, 2, 0))
    found = judge(trained, subnet, "three", (X[64:], Y[64:]), X[:64], costs=table)
    assert found.threshold == float("inf")
    assert found.cost == table.whole(subnet, "three")
    model = trained.extract(subnet, "three")
    reestimate(model, [X[:64]])
    assert found.accuracy == (model(X[64:]).argmax(1) == Y[64:]).float().mean().item()
    assert (
        judge(trained, subnet, "three", (X[64:], Y[64:]), X[:64], costs=table, budget=1.0) is None
    )


def test_judging_leaves_the_supernet_as_it_is(trained):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    judge(
        trained,
        Subnet((0, 1, 2), ("body.0",)),
        "two",
        (X[64:], Y[64:]),
        X[:64],
        costs=cost_table(trained),
    )
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())


def test_it_finds_the_best_of_all_networks_within_the_budget(trained):
    table = cost_table(trained)
    budget = 0.6 * table.whole(trained.dense, "three")
    judging = X[64:], Y[64:]
    best = -1.0
    for options in itertools.product(range(4), repeat=3):
        for exits in ((), ("body.0",), ("body.1",), ("body.0", "body.1")):
            found = judge(
                trained,
                Subnet(options, exits),
                "three",
                judging,
                X[:64],
                costs=table,
                budget=budget,
            )
            best = max(best, -1.0 if found is None else found.accuracy)

    def searched():
        return evolve(
            trained,
            "three",
            judging,
            X[:64],
            costs=table,
            budget=budget,
            population=20,
            generations=6,
            progress=False,
        )

    search = searched()
    assert search.best.accuracy == pytest.approx(best)
    assert all(one.cost <= budget for one in search.candidates)
    assert len({one.subnet for one in search.candidates}) == len(search.candidates)
    again = searched()
    assert again.best == search.best


def test_it_begins_with_the_networks_of_one_option_everywhere(trained):
    assert uniform(trained) == [Subnet((number,) * 3) for number in range(4)]
    mixed = supernet_of(choices={"body.0": ["dense", "skip"], "body.2": ["ghost?ratio=2"]})
    # where a place does not have the option, its first one stands there
    assert uniform(mixed) == [Subnet((0, 0)), Subnet((1, 0))]
    table = cost_table(trained)
    arguments = (trained, "three", (X[64:], Y[64:]), X[:64])
    found = evolve(*arguments, costs=table, budget=1e9, population=6, generations=1, progress=False)
    assert set(uniform(trained)) < {judged.subnet for judged in found.candidates}


def test_exits_can_be_left_out(trained):
    table = cost_table(trained)
    found = evolve(
        trained,
        "three",
        (X[64:], Y[64:]),
        X[:64],
        costs=table,
        budget=0.7 * table.whole(trained.dense, "three"),
        population=12,
        generations=3,
        exits=False,
        progress=False,
    )
    assert len(found.candidates) > 12
    assert all(judged.subnet.exits == () for judged in found.candidates)


def test_what_is_known_is_not_judged_again(trained, monkeypatch):
    from offramp.designing import evolution

    table = cost_table(trained)
    arguments = (trained, "three", (X[64:], Y[64:]), X[:64])
    options = {"costs": table, "budget": 1e9, "population": 6, "generations": 2, "progress": False}
    memory = {}
    calls = []
    first = evolve(*arguments, memory=memory, after=lambda: calls.append(len(memory)), **options)
    assert calls == [6, 12]
    assert set(memory) == {judged.subnet for judged in first.candidates}
    monkeypatch.setattr(evolution, "judge", None)
    assert evolve(*arguments, memory=memory, **options) == first


def test_children_come_from_their_parents():
    net = supernet_of()
    rng = np.random.default_rng(0)
    one = Subnet((0, 0, 0), ())
    other = Subnet((1, 2, 3), ("body.0", "body.1"))
    seen = set()
    for _ in range(60):
        child = crossed(net, one, other, rng)
        seen.add(child)
        assert all(
            option in pair
            for option, pair in zip(child.options, ((0, 1), (0, 2), (0, 3)), strict=True)
        )
    assert len(seen) > 10
    assert mutated(net, other, 0.0, rng) == other
    fresh = {mutated(net, other, 1.0, rng) for _ in range(60)}
    assert {child.exits for child in fresh} == {()}  # each exit turned over
    assert len({child.options for child in fresh}) > 10


def test_the_front_holds_no_network_that_another_one_beats():
    points = [(0.5, 3.0), (0.7, 5.0), (0.6, 6.0), (0.5, 2.0), (0.9, 9.0)]
    judged = tuple(
        Judged(Subnet((number,)), *point, float("inf")) for number, point in enumerate(points)
    )
    found = Search(judged, 0).frontier()
    assert [(one.accuracy, one.cost) for one in found] == [(0.5, 2.0), (0.7, 5.0), (0.9, 9.0)]


def test_what_cannot_be_searched_is_refused(trained):
    table = cost_table(trained)
    arguments = (trained, "three", (X[64:], Y[64:]), X[:64])
    with pytest.raises(InvalidArgument, match="no network is within the budget of 1 macs"):
        evolve(*arguments, costs=table, budget=1.0, population=2, generations=1, progress=False)
    with pytest.raises(InvalidArgument, match=r"mutation must be between 0 and 1, got 2\.0"):
        evolve(*arguments, costs=table, budget=1e9, mutation=2.0, progress=False)
    with pytest.raises(UnknownName, match="task"):
        evolve(trained, "four", *arguments[2:], costs=table, budget=1e9, progress=False)
