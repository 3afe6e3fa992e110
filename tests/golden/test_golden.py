"""Files written by schema 1 load for ever, and still mean the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from write_golden import rows

import offramp as off
from offramp.plans.plan import Promise

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def net():
    return off.load(HERE / "network")


@pytest.fixture(scope="module")
def trace():
    return off.Trace.load(HERE / "trace.npz")


@pytest.fixture(scope="module")
def plan():
    return off.Plan.load(HERE / "plan.json")


def test_the_network(net, trace):
    assert net.topology.exits == ("small", "large")
    assert net.fingerprint() == "6a56d9680f31ded8"
    for name, logits, _ in net.walk(torch.from_numpy(rows())):
        np.testing.assert_allclose(logits.detach(), trace.columns[f"logits/{name}"], atol=1e-4)


def test_the_trace(trace):
    assert len(trace) == 60
    assert trace.labels.tolist() == [row % 10 for row in range(60)]
    assert trace.header.origin.key == ("6a56d9680f31ded8", "torch", "float32")
    assert sorted(trace.columns)[:4] == [
        "answer/backbone",
        "answer/large",
        "answer/small",
        "cost/exit/large",
    ]
    assert trace.columns["cost/segment/small"][0] == 2432.0


def test_the_plan(plan):
    assert plan.thresholds == {"small": (0.07069031149148941,)}
    assert plan.promise == Promise(
        "disagreement", 0.7, 0.95, "backbone", "binomial", "path", 60, 0, plan.promise.covers
    )
    assert (plan.price.mean, plan.price.worst, plan.price.plain) == (
        3931.7333333333336,
        4864.0,
        2432.0,
    )
    assert len(plan.rows.digests) == 60


def test_together(net, trace, plan):
    done = trace.replay(plan)
    assert done.exit[:20].tolist() == [0, 1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1]
    y = off.run(net, plan, torch.from_numpy(rows()))
    assert y.exit.tolist() == done.exit.tolist()
    assert y.logits.argmax(1).tolist() == done.answer.tolist()
    assert set(trace.columns["digest"]) == set(plan.rows.digests)


def test_heads_of_the_first_edition_keep_their_form():
    """first_heads holds exits `attentive` without the mask's second norm, and gates that know no
    earlier ones.
    """
    net = off.load(HERE / "first_heads")
    assert [net.exit_of(name).normed for name in ("0", "2")] == [False, False]
    assert net.fingerprint() == "1c3224f37a9beee7"
    x = torch.from_numpy(rows(8)).float() / 16
    found = {name: (logits.detach(), score) for name, logits, score in net.walk(x)}
    first = [
        -0.782833,
        0.20577,
        -0.215113,
        -0.404792,
        0.308849,
        0.306909,
        -0.103325,
        0.366919,
        -0.315772,
        1.389202,
    ]
    np.testing.assert_allclose(found["0"][0][0], first, atol=2e-6)
    second = [0.774272, 0.767305, 0.774325, 0.778239, 0.759454, 0.770844, 0.768612, 0.75823]
    np.testing.assert_allclose(found["2"][1].detach(), second, atol=2e-6)
