"""Networks made by `route`: what runs is what the trace replays, on random topologies."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

import offramp as off
from forked import CLASSES, WIDTH
from offramp.networks.walking import routed
from offramp.plans.plan import Plan, choose
from routes import drawn

SEEDS = range(20)
ROWS = 600


def rows_of(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (count, WIDTH), generator=draw).float()


def plan_for(net, seed: int) -> Plan:
    draw = random.Random(seed)
    thresholds = {}
    for gate in net.topology.gates:
        values = []
        for _ in range(net.topology.routes(gate)):
            values.append(draw.choice([-math.inf, -1.5, -0.5, 0.5, 1.0, 1.5, math.inf]))
        thresholds[gate] = tuple(values)
    max_exit = draw.choice([None, None, None, *net.topology.exits])
    return Plan.by_hand(thresholds, max_exit=max_exit)


def recorded(net, x):
    return off.record(net, (x, torch.arange(len(x)) % CLASSES), timed=False, progress=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_run_is_replay_on_a_random_topology(seed):
    net = drawn(seed)
    x = rows_of(ROWS, seed)
    trace = recorded(net, x)
    for number in range(4):
        plan = plan_for(net, 10 * seed + number)
        done = trace.replay(plan)
        answers = off.run(net, plan, x)
        assert answers.exit.tolist() == done.exit.tolist()
        assert answers.why.tolist() == done.why.tolist()
        assert answers.logits.argmax(1).tolist() == done.answer.tolist()


@pytest.mark.slow
def test_a_hundred_thousand_rows_on_random_topologies_run_as_they_replay():
    differing = 0
    for seed in range(100, 110):
        net = drawn(seed)
        x = rows_of(10_000, seed)
        trace = recorded(net, x)
        plan = plan_for(net, seed)
        done = trace.replay(plan)
        answers = off.run(net, plan, x)
        differing += int((answers.exit.numpy() != done.exit).sum())
        differing += int((answers.logits.argmax(1).numpy() != done.answer).sum())
    assert differing == 0


@pytest.mark.parametrize("seed", SEEDS[:8])
@pytest.mark.parametrize("mixed", [False, True])
def test_one_hot_choices_give_what_the_runner_gives(seed, mixed):
    """Bucketed and mixed execution, of random topologies."""
    net = drawn(seed)
    x = rows_of(100, seed)
    limits = {
        gate: np.zeros(net.topology.routes(gate), np.float32) + 0.5 for gate in net.topology.gates
    }

    def decide(name, gate, seen):
        scores = gate.score(seen).reshape(len(seen.features), -1)
        ways = torch.as_tensor(choose(scores.numpy(), limits[name]))
        return torch.nn.functional.one_hot(ways, scores.shape[1] + 1).float()

    plan = Plan.by_hand({gate: tuple(map(float, values)) for gate, values in limits.items()})
    answers = off.run(net, plan, x)
    with torch.no_grad():
        done = routed(net, {"x": x}, decide, mixed=mixed)
    torch.testing.assert_close(done.logits, answers.logits, rtol=0, atol=1e-4)
    assert done.exits.tolist() == answers.exit.tolist()


def test_a_call_of_the_network_gives_every_exit_on_every_path():
    net = drawn(3)
    x = rows_of(50)
    trace = recorded(net, x)
    logits = net(x)
    assert len(logits) == len(net.topology.exit_labels)
    for label, own in zip(net.topology.exit_labels, logits, strict=True):
        assert own.argmax(1).tolist() == trace.columns[f"answer/{label}"].tolist()


def test_a_saved_network_is_read_again(tmp_path):
    from routes import Steps  # noqa: F401 - the models are the user's, and are given again

    net = drawn(5)
    off.save(net, tmp_path / "net")
    models = {name: net.backbone[name] for name in net.topology.names}
    again = off.load(
        tmp_path / "net",
        model=models,
        gates={gate: net.gate_of(gate) for gate in net.topology.gates},
        exits={name: net.exit_of(name) for name in net.topology.exits},
    )
    assert again.topology == net.topology
    assert again.fingerprint() == net.fingerprint()
