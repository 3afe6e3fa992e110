"""A supernet: what it holds, how one network of it runs alone, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.designing.supernet import Subnet, Supernet
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.layers.ghost import Ghost
from offramp.layers.low_rank import LowRank
from offramp.layers.residual import Block, narrow
from offramp.layers.skip import Skip
from offramp.runtime.measuring import macs
from small import images_of, seeded
from supernets import PLACES, small_model, supernet_of

X = images_of(12)


def test_it_holds_every_option_and_the_dense_network_is_the_model():
    net = supernet_of()
    assert net.places == PLACES
    assert net.taps == ("body.0", "body.1")
    assert net.size == 4**3 * 2**2
    torch.testing.assert_close(net(X, net.dense, "three")[0], small_model()(X))
    assert net(X, net.dense, "two")[0].shape == (12, 2)


def test_a_network_of_its_own_answers_as_within_the_supernet():
    net = supernet_of()
    rng = np.random.default_rng(0)
    for task in ("three", "two"):
        subnet = net.drawn(rng)
        *exits, last = net(X, subnet, task)
        model = net.extract(subnet, task)
        torch.testing.assert_close(model(X), last)
        hung = net.network(subnet, task)
        assert hung.topology.exits == ("body.0", "body.1", "backbone")
        for one, other in zip(hung(X), (*exits, last), strict=True):
            torch.testing.assert_close(one, other)


def test_a_network_of_its_own_shares_no_weights():
    net = supernet_of()
    model = net.extract(net.dense, "three")
    before = net(X, net.dense, "three")[0].clone()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    assert torch.equal(net(X, net.dense, "three")[0], before)


def test_gradients_reach_the_options_that_stand_there_and_the_tasks_own_head():
    net = supernet_of()
    subnet = Subnet((0, 1, 3), ("body.1",))
    logits = net(X, subnet, "two")
    sum(cross_entropy(one, torch.arange(12) % 2) for one in logits).backward()
    touched = {
        name.rsplit(".", 2)[0] for name, value in net.named_parameters() if value.grad is not None
    }
    options = {name for name in touched if name.startswith("options")}
    assert all(name.startswith(("options.0.0", "options.1.1")) for name in options)
    assert {name[:11] for name in options} == {"options.0.0", "options.1.1"}
    assert net.heads["two"].weight.grad is not None
    assert net.heads["three"].weight.grad is None
    assert net.exit_of("body.1", "two").head[0].weight.grad is not None
    assert net.exit_of("body.1", "three").head[0].weight.grad is None


def test_nothing_stays_in_the_model_also_after_an_error():
    net = supernet_of()
    own = {name for name, _ in net.model.named_parameters()}
    assert own == {"stem.weight", "stem.bias"}
    with pytest.raises(RuntimeError, match="some"), net.along(net.dense, "two"):
        raise RuntimeError("some")
    assert {name for name, _ in net.model.named_parameters()} == own


def test_options_are_what_their_names_say():
    net = supernet_of(
        choices={"body.1": ["dense", "ghost?ratio=2", "low_rank?energy=0.5", "narrow?by=4", "skip"]}
    )
    dense, ghost, low, thin, skip = net.options[0]
    assert isinstance(dense, Block)
    assert {type(part) for part in ghost.children()} >= {Ghost}
    assert any(isinstance(part, LowRank) for part in low.modules())
    assert thin.conv1.out_channels == 2
    assert isinstance(skip, Skip)
    x = torch.zeros(2, 8, 8, 8)
    costs = [macs(lambda option=option: option(x)) for option in (dense, ghost, low, thin, skip)]
    assert costs[0] > max(costs[1:])
    assert costs[3] * 4 == costs[0]
    assert costs[4] == 0


def test_a_narrow_block_keeps_the_channels_that_weigh_most():
    block = seeded(lambda: Block(8, 8), 0).eval()
    with torch.no_grad():
        block.conv1.weight[[1, 3, 4, 6]] = 0
        block.bn1.bias.fill_(0.0)
    x = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(narrow(block)(x), block(x))  # those left out give nothing
    assert block.conv1.out_channels == 8


def test_other_kinds_of_options():
    own = seeded(lambda: nn.Conv2d(8, 8, 1), 0)
    net = supernet_of(
        choices={"body.2": [own, lambda dense: nn.Sequential(dense, nn.ReLU()), {"conv1": "keep"}]}
    )
    assert net.options[0][0] is own
    assert isinstance(net.options[0][1], nn.Sequential)
    assert isinstance(net.options[0][2], Block)
    net = supernet_of(choices={"stem": ["dense", "ghost?ratio=2"]})  # a layer itself
    assert isinstance(net.options[0][1], Ghost)


def test_a_network_is_recorded_and_run_like_any_other():
    net = supernet_of()
    hung = net.network(Subnet((2, 1, 3), ("body.0",)), "three")
    with torch.no_grad():
        for value in hung.exits.parameters():
            value.add_(0.01)
    x = images_of(40)
    trace = off.record(hung, x, timed=False, progress=False)
    plan = off.Plan.by_hand({"body.0": float(np.median(trace.columns["score/body.0"]))})
    y = off.run(hung, plan, x)
    assert (y.exit.numpy() == trace.replay(plan).exit).all()
    assert set(y.exit.tolist()) == {0, 1}


def test_a_network_in_words():
    net = supernet_of()
    told = net.told(Subnet((0, 3, 2), ("body.1",)))
    assert told == "body.0: dense, body.1: skip, body.2: narrow?by=2, exit after body.1"


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"choices": {"body.7": ["dense"]}}, UnknownName, "body.7"),
        ({"exits": ["boddy.1"]}, UnknownName, "did you mean"),
        ({"choices": {}}, InvalidArgument, "at least one place"),
        ({"choices": {"body.0": []}}, InvalidArgument, "'body.0' must have at least one option"),
        ({"head": "stem"}, InvalidArgument, "got 'stem', a Conv2d"),
        ({"heads": {"one": 1}}, InvalidArgument, "'one' must have 2 or more classes"),
        ({"choices": {"body.0": ["dense", "ghosts"]}}, UnknownName, "ghosts"),
        ({"choices": {"stem": ["dense", "skip"]}}, BadNetwork, "'skip'.*'stem'"),
        (
            {"choices": {"body.0": ["narrow?by=9"]}},
            InvalidArgument,
            "none of the block's 8 channels",
        ),
        ({"choices": {"stem": ["narrow"]}}, BadNetwork, "of two convolutions, got a Conv2d"),
        ({"choices": {"fc": ["dense"]}}, InvalidArgument, "'fc' must not be inside the place 'fc'"),
        (
            {"choices": {"body": ["dense"]}},
            InvalidArgument,
            "'body.0' must not be inside the place 'body'",
        ),
    ],
)
def test_what_fits_nowhere_is_refused(changes, error, says):
    with pytest.raises(error, match=says):
        supernet_of(**changes)


class Twice(nn.Module):
    """Runs its only block twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Block(1, 1)])
        self.fc = nn.Linear(1, 3)

    def forward(self, x):
        return self.fc(self.body[0](self.body[0](x)).mean((2, 3)))


def test_a_place_that_runs_twice_is_refused():
    with pytest.raises(BadNetwork, match=r"once for a row, got the runs body\.0, body\.0"):
        supernet_of(model=Twice().eval(), choices={"body.0": ["dense"]}, exits=[])


def test_networks_that_it_does_not_hold_are_refused():
    net = supernet_of()
    for subnet in (Subnet((0, 0)), Subnet((0, 0, 4)), Subnet((0, 0, 0), ("body.2",))):
        with pytest.raises(InvalidArgument, match="must be a network of this supernet, got Subnet"):
            net(X, subnet, "two")
    with pytest.raises(UnknownName, match="task"):
        net(X, net.dense, "twoo")
    with pytest.raises(InvalidArgument, match=r"at least one exit, got none\. Use extract"):
        net.network(net.dense, "two")
    assert isinstance(net, Supernet)
