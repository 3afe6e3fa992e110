"""Forks trained by reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp import templates
from offramp.errors import BadNetwork, InvalidArgument
from offramp.recipes.d2nn import D2nn, f_score


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
    return off.route([off.Fork("size", {"small": small, "large": large})], example=data(8, 0)[0])


def test_hard_rows_take_the_dear_way():
    net = network()
    x, y, _ = data(4000, 1)
    options = {"warm": 8, "epochs": 12, "rate": 0.01, "gate_rate": 0.02, "weight": 0.8}
    off.fit(net, (x, y), recipe="d2nn", progress=False, **options)
    test, labels, hard = data(1000, 2)
    answers = off.run(net, off.Plan.by_hand({"size": 0.0}), test)
    large = answers.exit == 1
    assert (answers.logits.argmax(1) == labels).float().mean() > 0.9
    assert large[hard].float().mean() > large[~hard].float().mean() + 0.4


def test_the_q_values_are_the_rewards():
    """Of a right answer on the cheap way: lambda + (1 - lambda) (1 - its cost)."""
    net = network()
    x, y, _ = data(4000, 1)
    off.fit(
        net,
        (x, y),
        recipe="d2nn",
        progress=False,
        warm=8,
        epochs=12,
        rate=0.01,
        gate_rate=0.02,
        weight=0.8,
    )
    test, _, hard = data(1000, 3)
    from offramp.contracts import Seen

    with torch.no_grad():
        q = net.gate_of("size").ratings(Seen(test, {}))  # [B, 2]
    # nearly always right, nearly free
    assert q[~hard, 0].mean() == pytest.approx(0.8 + 0.2 * 0.93, abs=0.08)
    assert q[hard, 0].mean() == pytest.approx(0.4 + 0.2 * 0.93, abs=0.15)  # right about by chance


def test_one_gate_explores_in_each_batch_and_the_others_are_left_alone():
    torch.manual_seed(0)
    linear = [nn.Linear(6, 6).eval() for _ in range(4)]
    links = [{"skip": None, "unit": linear[0]}, {"skip": None, "unit": linear[1]}]
    net = templates.chain(linear[2], links, nn.Linear(6, 2).eval(), example=data(8, 0)[0])
    x, y, _ = data(32, 0)
    before = {
        name: [value.clone() for value in gate.parameters()] for name, gate in net.gates.items()
    }
    off.fit(net, (x, y), recipe="d2nn", warm=0, epochs=1, batch_size=32, progress=False)
    moved = []
    for name, gate in net.gates.items():
        moved.append(
            any(not torch.equal(a, b) for a, b in zip(gate.parameters(), before[name], strict=True))
        )
    assert sorted(moved) == [False, True]


def test_epsilon_falls_along_a_line_over_the_first_half():
    recipe = D2nn(first_epsilon=1.0, epsilon=0.1)
    assert [recipe._epsilon(done) for done in (0.0, 0.25, 0.5, 0.9)] == pytest.approx(
        [1.0, 0.55, 0.1, 0.1]
    )


@pytest.mark.parametrize(
    ("answers", "y", "want"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], 0.5),
        ([0, 0], [0, 0], 1.0),
        ([1, 1], [0, 0], 0.0),
        ([1, 1, 0], [1, 1, 0], 1.0),
    ],
)
def test_f_score(answers, y, want):
    assert f_score(torch.tensor(answers), torch.tensor(y), 1) == pytest.approx(want)


def test_mini_bags_are_rewarded_together():
    net = network()
    x, y, _ = data(600, 1)
    y = y * (torch.arange(600) % 5 == 0)  # few positives
    history = off.fit(
        net,
        (x, y),
        recipe="d2nn",
        warm=2,
        epochs=4,
        rate=0.01,
        aim="f_score",
        bag=8,
        progress=False,
    )
    losses = [
        epoch.figures["loss/reward"] for epoch in history.epochs if "loss/reward" in epoch.figures
    ]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"weight": 0.0}, "weight must be above 0"), ({"epsilon": 1.5}, "epsilon must be between"),
     ({"aim": "speed"}, "aim must be one "
                        "of"), ({"bag": 0}, "bag must be"), ({"warm": -1}, "warm must"),
     ({"norm": "no"}, "norm must be one of")],
)  # fmt: skip
def test_bad_arguments(arguments, says):
    x, y, _ = data(20, 0)
    with pytest.raises(InvalidArgument, match=says):
        off.fit(network(), (x, y), recipe="d2nn", progress=False, **arguments)


def test_it_needs_gates_that_rate_ways():
    net = off.ladder({"a": nn.Linear(6, 2).eval(), "b": nn.Linear(6, 2).eval()})
    x, y, _ = data(20, 0)
    with pytest.raises(BadNetwork, match="gates that rate their ways, but this network has none"):
        off.fit(net, (x, y), recipe="d2nn", progress=False)
