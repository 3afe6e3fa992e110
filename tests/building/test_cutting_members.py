"""Cut networks as members of a ladder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import offramp as off
from offramp.building.cutting import cut, ladder
from offramp.errors import BadNetwork
from offramp.layers.preprocess import Preprocess
from offramp.plans.plan import Plan
from offramp.runtime.recording import record
from small import Reader, cut_of, dense, moved, seeded, stages


@pytest.mark.parametrize("answer", ["own", "mean"])
def test_cut_members_in_a_ladder(answer, tmp_path):
    raw = torch.randint(
        0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    preprocess = Preprocess((0.5,), (0.25,))
    small = moved(
        seeded(
            lambda: cut(stages(), raw[:4], at=["stem"], exits="linear", preprocess=preprocess), 0
        )
    )
    large = moved(
        seeded(lambda: cut(stages(1), raw[:4], at=["blocks.0", "stem"], preprocess=preprocess), 1)
    )
    net = ladder({"small": small, "large": large}, answer=answer, example=raw[:4])
    assert net.topology.exits == ("small/stem", "small", "large/stem", "large/blocks.0", "large")
    assert [node.after for node in net.topology.nodes] == [
        (),
        ("small/stem",),
        (),
        ("large/stem",),
        ("large/blocks.0",),
    ]
    assert net.backbone["small"] is small.backbone
    assert net.untrained() == ()
    trace = record(net, raw.numpy(), timed=False, progress=False)
    for name, logits, _ in net.walk(raw):
        np.testing.assert_allclose(trace.columns[f"logits/{name}"], logits.detach(), atol=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        gates = {}
        for gate in net.topology.gates:
            gates[gate] = float(rng.choice([*trace.columns[f"score/{gate}"], math.inf])) + 1e-3
        plan = Plan.by_hand(gates)
        answers = off.open(net, plan)(raw)
        done = trace.replay(plan)
        assert answers.exit.tolist() == done.exit.tolist()
        assert answers.logits.argmax(1).tolist() == done.answer.tolist()
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", {"small": stages(5), "large": stages(6)})
    assert again.fingerprint() == net.fingerprint()
    assert off.run(again, plan, raw).exit.tolist() == answers.exit.tolist()


def test_untrained_exits_of_a_member_stay_untrained():
    net = ladder({"small": cut_of("stem", trained=False), "large": stages(1)})
    assert net.untrained() == ("small/stem",)


def test_members_that_cannot_be():
    for member, says in (
        (ladder([dense(0), dense(1)]), "got a ladder"),
        ((cut_of("stem"), Preprocess()), "with preprocessing"),
        (cut_of(exits={"stem": "linear", "blocks.0": Reader()}), "reads exits"),
    ):
        with pytest.raises(BadNetwork, match=says):
            ladder({"small": member, "large": stages()})
