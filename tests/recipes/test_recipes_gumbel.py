"""Forks trained by gradients: choices, costs, and what a network learns by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.walking import reach_of
from offramp.plans.topology import LEAVE, Node, Topology
from offramp.recipes._routing import PathPrices, gumbel, prices_of


def test_choices_are_one_hot_and_have_the_gradient_of_a_softmax():
    ratings = torch.tensor([[1.0, 2.0, 0.5], [3.0, -1.0, 0.0]], requires_grad=True)
    chosen = gumbel(ratings, 0.5, noise=False)
    assert chosen.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    weights = torch.tensor([1.0, 2.0, 3.0])
    (chosen @ weights).sum().backward()
    other = ratings.detach().clone().requires_grad_()
    ((other.log_softmax(1) / 0.5).softmax(1) @ weights).sum().backward()
    torch.testing.assert_close(ratings.grad, other.grad)


def test_ways_are_drawn_as_the_softmax_says():
    torch.manual_seed(0)
    ratings = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3)
    shares = gumbel(ratings, 1.0).mean(0)
    torch.testing.assert_close(shares, ratings[0].softmax(0), atol=0.015, rtol=0)


NESTED = Topology(
    (
        Node("a", ("b", "c")),
        Node("b", (LEAVE, "d"), ("a",)),
        Node("c", ("d",), ("a",)),
        Node("d", (LEAVE,), ("b", "c")),
    )
)


def test_the_cost_of_a_path_is_the_sum_of_its_nodes():
    prices = PathPrices([0.1, 0.2, 0.5, 0.4], 0.3, 1.0)
    choices = {
        "a": torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        "b": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
    }
    cost = prices.of(NESTED, choices, 3)
    torch.testing.assert_close(cost, torch.tensor([0.3, 0.7, 1.0]))
    reach = reach_of(NESTED, choices, 3, torch.ones(1))
    assert reach["d"].tolist() == [0.0, 1.0, 1.0]
    torch.testing.assert_close(prices.over(cost, 0.5), torch.tensor((2 / 3 - 0.5) / 0.7))
    assert prices.over(cost, 0.9) == 0


def data(rows: int, seed: int):
    """Two classes; half of the rows are told apart by a sum, the others only by a product."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=draw)
    hard = torch.arange(rows) % 2 == 1
    x[:, 5] = torch.where(hard, 2.0, -2.0)
    y = torch.where(hard, x[:, 0] * x[:, 1] > 0, x[:, 0] + x[:, 1] > 0).long()
    return x, y, hard


def network() -> off.Network:
    torch.manual_seed(0)
    small = nn.Linear(6, 2).eval()
    large = nn.Sequential(
        nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    ).eval()
    fork = off.Fork("size", {"small": small, "large": large}, gate="controller?width=4")
    return off.route([fork], example=data(8, 0)[0])


@pytest.mark.parametrize("mixed", [True, False])
def test_hard_rows_take_the_dear_way(mixed):
    net = network()
    x, y, _ = data(4000, 1)
    options = {"epochs": 12, "warm": 8, "rate": 0.01, "gate_rate": 0.03, "budget": 0.6, "eta": 2.0}
    off.fit(net, (x, y), recipe="gumbel", mixed=mixed, progress=False, **options)
    test, labels, hard = data(1000, 2)
    scores = off.record(net, (test, labels), timed=False, progress=False).columns["score/size"]
    answers = off.run(net, off.Plan.by_hand({"size": float(np.median(scores))}), test)
    large = answers.exit == 1
    assert (answers.logits.argmax(1) == labels).float().mean() > 0.9
    assert large[hard].float().mean() > large[~hard].float().mean() + 0.5


def test_an_exit_whose_gate_is_fixed_learns_too():
    torch.manual_seed(0)
    stem = nn.Linear(6, 6).eval()
    fork = off.Fork("f", {"a": [], "b": nn.Linear(6, 6).eval()})
    head = nn.Linear(6, 2).eval()
    steps = [("stem", stem), off.Leave("early", "linear"), fork, ("head", head)]
    x, y, _ = data(400, 3)
    net = off.route(steps, example=x[:4])
    before = cross_entropy(net(x)[0], y)
    off.fit(net, (x, y), recipe="gumbel", epochs=20, rate=0.02, progress=False)
    assert net.untrained() == ()
    assert cross_entropy(net(x)[0], y) < before - 0.05


def test_the_prices_of_a_network_are_its_macs():
    net = network()
    prices = prices_of(net)
    large = 6 * 64 + 64 * 32 + 32 * 2
    gate = 6 * 4 + 4 * 2
    assert prices.least == pytest.approx((12 + gate) / large)
    assert prices.most == pytest.approx(1 + gate / large)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"budget": 0.0}, "budget must be above "
                       "0"), ({"tau": -1.0}, "tau must be above 0"), ({"eta": -1.0}, "eta must"),
     ({"warm": -1}, "warm must"), ({"norm": "no"}, "norm must be one of")],
)  # fmt: skip
def test_bad_arguments(arguments, says):
    x, y, _ = data(20, 0)
    with pytest.raises(InvalidArgument, match=says):
        off.fit(network(), (x, y), recipe="gumbel", progress=False, **arguments)


def test_it_needs_gates_that_rate_ways():
    net = off.ladder({"a": nn.Linear(6, 2).eval(), "b": nn.Linear(6, 2).eval()})
    x, y, _ = data(20, 0)
    with pytest.raises(BadNetwork, match="gates that rate their ways, but this network has none"):
        off.fit(net, (x, y), recipe="gumbel", progress=False)


@pytest.mark.parametrize("recipe", ["gumbel?warm=2", "d2nn?warm=2", "random_ways"])
def test_a_network_of_too_many_paths_to_record_is_trained(recipe):
    x, y, _ = data(400, 4)
    torch.manual_seed(0)
    steps = [("stem", nn.Linear(6, 6).eval())]
    for number in range(6):
        arms = {f"none{number}": [], f"unit{number}": nn.Linear(6, 6).eval()}
        steps.append(off.Fork(f"skip{number}", arms, "controller?width=4"))
    net = off.route([*steps, ("head", nn.Linear(6, 2).eval())], example=x[:4])
    assert net.topology.has_many_paths
    before = {key: value.clone() for key, value in net.state_dict().items()}
    history = off.fit(
        net, (x, y), recipe=recipe, epochs=3, rate=0.02, development=data(50, 5)[:2],
        progress=False,
    )  # fmt: skip
    # the accuracy is that of the most expensive path
    assert 0 <= history.epochs[-1].figures["accuracy/head"] <= 1
    for key in ("backbone.unit0.weight", "backbone.unit5.weight", "backbone.head.weight"):
        assert not torch.equal(net.state_dict()[key], before[key])
