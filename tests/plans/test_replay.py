"""`replay` on random topologies, against a walk of every single row that is written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from offramp.errors import BadNetwork
from offramp.plans.header import Header
from offramp.plans.plan import Plan
from offramp.plans.provenance import Origin
from offramp.plans.replay import WHY
from offramp.plans.topology import LEAVE, Node, Topology
from offramp.plans.trace import Trace

ROWS = 60
VALUES = np.float32([-math.inf, -1, 0, 0.5, 1, math.inf, math.nan])


def random_topology(dice: np.random.Generator) -> Topology | None:
    """Forks within arms, arms that re-join, skips and exits in arms; None where a draw is none, or
    has many paths.
    """
    count = int(dice.integers(2, 9))
    names = [f"n{number}" for number in range(count)]
    nodes = []
    for number, name in enumerate(names):
        later = names[number + 1 :]
        if later:
            some = dice.permutation(later[:4])[: dice.integers(1, 4)].tolist()
        else:
            some = []
        if not some or dice.random() < 0.4:
            some.insert(int(dice.integers(0, len(some) + 1)), LEAVE)
        before = [node.name for node in nodes if name in node.successors]
        nodes.append(Node(name, tuple(some), tuple(before) if dice.random() < 0.8 else ()))
    try:
        found = Topology(tuple(nodes))
        return found if found.exit_labels and found.gate_labels is not None else None
    except BadNetwork:
        return None


def random_trace(topology: Topology, dice: np.random.Generator) -> Trace:
    columns = {"row": np.arange(ROWS), "digest": np.arange(ROWS).astype(np.uint64)}
    for label in topology.exit_labels:
        columns[f"answer/{label}"] = dice.integers(0, 5, ROWS)
    for label in topology.gate_labels:
        for name in topology.score_columns(label):
            columns[name] = dice.choice(VALUES, ROWS)
    for name in topology.names:
        columns[f"cost/segment/{name}"] = np.array([float(dice.integers(1, 100)), np.nan, np.nan])
        columns[f"cost/exit/{name}"] = np.array([float(dice.integers(1, 100)), np.nan, np.nan])
    header = Header(topology, topology.exits[-1], 5, "random", "0", Origin("0", "torch", "float32"))
    return Trace(columns, header)


def walk(trace: Trace, plan: Plan, row: int) -> tuple[list[str], str, int, str]:
    """The nodes that a row passes under a plan, the exit that answers, its answer, and why."""
    topology = trace.topology
    path = (topology.names[0],)
    while True:
        node = topology.node(path[-1])
        label = topology.label(path)
        if node.name == plan.max_exit:
            return (
                list(path),
                node.name,
                trace.columns[f"answer/{label}"][row],
                reason(node, "deepest"),
            )
        following = node.successors[-1]
        decided = False
        if len(node.successors) > 1:
            thresholds = plan.thresholds.get(node.name, (math.inf,) * 9)
            decided = any(t < math.inf for t in thresholds[: len(node.successors) - 1])
            names = topology.score_columns(label)
            for successor, name, t in zip(node.successors[:-1], names, thresholds, strict=False):
                score = trace.columns[name][row]
                if t < math.inf and score >= t:
                    following = successor
                    break
        if following == LEAVE:
            why = "gate" if decided else reason(node, "deepest")
            return list(path), node.name, trace.columns[f"answer/{label}"][row], why
        path = (*path, following)


def reason(node: Node, cut_short: str) -> str:
    return "end" if node.successors == (LEAVE,) else cut_short


@pytest.mark.parametrize("seed", range(8))
def test_replay_is_the_walk_of_every_row(seed):
    dice = np.random.default_rng(seed)
    forks = done_topologies = 0
    while done_topologies < 25:
        topology = random_topology(dice)
        if topology is None:
            continue
        done_topologies += 1
        forks += not topology.is_chain
        trace = random_trace(topology, dice)
        for _ in range(4):
            thresholds = {}
            for gate in topology.gates:
                if dice.random() < 0.8:
                    thresholds[gate] = tuple(
                        map(float, dice.choice(VALUES[:-1], topology.routes(gate)))
                    )
            max_exit = str(dice.choice(topology.exits)) if dice.random() < 0.3 else None
            plan = Plan.by_hand(thresholds, max_exit=max_exit)
            done = trace.replay(plan)
            stages = {stage.name: number for number, stage in enumerate(done.schedule)}
            costs = np.zeros(ROWS)
            for row in range(ROWS):
                path, exit_, answer, why = walk(trace, plan, row)
                assert topology.exits[done.exit[row]] == exit_
                assert done.answer[row] == answer
                assert WHY[done.why[row]] == why
                ran = [name for name in path if name in stages]
                assert np.flatnonzero(done.ran[row]).tolist() == [stages[name] for name in ran]
                assert exit_ in ran
                for name in ran:
                    stage = done.schedule.stages[stages[name]]
                    costs[row] += trace.columns[f"cost/segment/{name}"][0]
                    costs[row] += trace.columns[f"cost/exit/{name}"][0] * stage.exit
            price = trace.price(plan, "macs")
            assert price.mean == pytest.approx(costs.mean())
            assert price.worst >= costs.max() - 1e-9
    assert forks > 10
