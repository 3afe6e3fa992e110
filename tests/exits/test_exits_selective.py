"""Exits that select among the layers so far: the formula by hand, gradients through layers, and in
a network.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.selective import Selective, selective
from offramp.networks.nodes import Seen
from offramp.plans.plan import Plan
from small import cut_of, images_of, moved, seeded


def test_the_formula_by_hand():
    made = seeded(lambda: Selective("flat", 6, 3, before="a", place=3, channels=4, inner=5), 0)
    features = torch.randn(7, 6)
    earlier = torch.randn(7, 2, 4)
    u = torch.cat([earlier, made.project(features)[:, None]], 1)
    # [7, 12], layer by layer
    score = made.select[2](made.select[0](u[:, 0] + u[:, 1] + u[:, 2]).relu())
    share = torch.stack([score[:, 4 * place : 4 * place + 4] for place in range(3)], 1).exp()
    share = share / share.sum(1, keepdim=True)
    logits, handed = made.both(Seen(features, {"a": earlier}))
    torch.testing.assert_close(
        logits, made.linear(sum(share[:, place] * u[:, place] for place in range(3)))
    )
    torch.testing.assert_close(handed, u)
    torch.testing.assert_close(made.shares(u).sum(1), torch.ones(7, 4))


def test_alone_it_is_a_linear_exit_of_low_rank():
    made = selective((2, 8, 8), 3, ())
    assert made.select is None
    assert made.reads == ()
    x = torch.randn(5, 2, 8, 8)
    torch.testing.assert_close(made(Seen(x, {})), made.linear(made.project(made.pool(x))))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match="pooling"):
        Selective("max", 6, 3)
    with pytest.raises(BadNetwork, match="got place 2"):
        Selective("mean", 6, 3, place=2)
    mixed = {"stem": "linear", "blocks.0": "selective"}
    with pytest.raises(BadNetwork, match="selective"):
        cut_of(exits=mixed)


def test_a_later_exit_trains_earlier_projections():
    net = cut_of(exits="selective")
    net(images_of(6))[1].sum().backward()
    assert net.exits["stem"].project.weight.grad.any()
    assert net.exits["stem"].linear.weight.grad is None


def test_in_a_network(tmp_path):
    net = moved(cut_of(exits="selective"))
    x = images_of(60, 4)
    assert net.exits["blocks.0"].reads == ("stem",)
    trace = off.record(net, x, timed=False, progress=False)
    halves = {
        name: float(np.median(trace.columns[f"score/{name}"])) for name in trace.topology.gates
    }
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    for plan in (Plan.by_hand(halves), Plan.by_hand({**halves, "stem": float("inf")})):
        replay = trace.replay(plan)
        answers = off.run(again, plan, x)
        assert len(set(replay.exit.tolist())) >= 2
        assert (answers.exit.numpy() == replay.exit).all()
        assert (answers.logits.argmax(1).numpy() == replay.answer).all()
