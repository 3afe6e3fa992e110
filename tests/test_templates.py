"""D2NN's four layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp import templates
from offramp.errors import InvalidArgument

X = torch.randn(20, 5)
Y = torch.arange(20) % 3


def linear(out: int = 5) -> nn.Module:
    return nn.Linear(5, out).eval()


def built():
    torch.manual_seed(0)
    yield templates.high_low(linear(), linear(), linear(), linear(3), example=X)
    yield templates.cascade([linear(), linear(), linear(3)], example=X, exit="linear")
    yield templates.chain(
        linear(), [{"skip": None, "light": linear(), "heavy": linear()}] * 2, linear(3), example=X
    )
    groups = {"animals": {"few": linear(3), "many": linear(3)}, "things": {"one": linear(3)}}
    yield templates.hierarchy(linear(), groups, example=X)


def test_their_shapes():
    high_low, cascade, chain, hierarchy = built()
    assert high_low.topology.node("capacity").successors == ("low", "high")
    assert cascade.topology.exits == ("exit1", "exit2", "stage3")
    assert chain.topology.node("link1").successors == ("link2", "link1-light", "link1-heavy")
    assert len(chain.topology.paths["head"]) == 9
    assert hierarchy.topology.exits == ("animals-few", "animals-many", "things-one")
    assert hierarchy.topology.gates == ("group", "animals")


@pytest.mark.parametrize("recipe", ["d2nn?warm=1&epochs=1", "gumbel?warm=1&epochs=1"])
def test_both_recipes_train_them_and_they_run(recipe):
    for net in built():
        off.fit(net, (X, Y), recipe=recipe, progress=False)
        trace = off.record(
            net, (torch.randn(60, 5), torch.arange(60) % 3), timed=False, progress=False
        )
        plan = off.calibrate(trace, budget=1.0)
        done = trace.replay(plan)
        assert trace.price(plan).mean <= trace.price(plan).plain * (1 + 1e-9)
        assert len(done.answer) == 60


def test_bad_input():
    with pytest.raises(InvalidArgument, match="at least two stages"):
        templates.cascade([linear(3)], example=X)
    with pytest.raises(InvalidArgument, match="at least one link"):
        templates.chain(linear(), [], linear(3), example=X)
