"""A model at several resolutions: what is shared, what is not, and what runs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.preprocess import Preprocess
from offramp.layers.switchable_norm import SwitchableNorm, route_of, with_switchable_norms
from offramp.models.cifar_resnet import resnet20
from offramp.testing import check_layer


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(6, 4)).eval()


X = torch.randint(0, 256, (24, 3, 12, 12), dtype=torch.uint8)
Y = torch.arange(24) % 4
GATE = "predictor?width=4&side=8&stride=1"


def network(**options) -> off.Network:
    torch.manual_seed(1)
    return off.resolutions(
        model(), X[:4], [12, 6, 9], gate=GATE, preprocess=Preprocess(), **options
    )


def test_arms_share_convolutions_and_have_norms_of_their_own():
    own = model()
    before = copy.deepcopy(own.state_dict())
    net = off.resolutions(own, X[:4], [12, 6], gate=GATE, preprocess=Preprocess())
    small = net.backbone["r6"][1]
    large = net.backbone["r12"][1]
    assert small[0] is large[0]
    assert small[0].weight is not own[0].weight
    assert small[1] is not large[1]
    assert net.topology.exits == ("r6", "r12")
    assert len([*net.backbone.parameters()]) == len([*own.parameters()]) + 2  # one norm more
    for key, value in own.state_dict().items():
        assert torch.equal(value, before[key])


def test_every_arm_is_the_model_at_its_size():
    own = model()
    net = off.resolutions(own, X[:4], [12, 6], gate=GATE, preprocess=Preprocess())
    small = interpolate(Preprocess()(X), (6, 6), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(net(X)[0], own(small))
        torch.testing.assert_close(net(X)[1], own(Preprocess()(X)))


def test_rows_are_bucketed_by_resolution_when_it_runs():
    net = network()
    trace = off.record(net, (X, Y), timed=False, progress=False)
    scores = [float(trace.columns[f"score/resolution@{route}"][3]) + 1e-3 for route in (0, 1)]
    plan = off.Plan.by_hand({"resolution": tuple(scores)})
    done = trace.replay(plan)
    answers = off.run(net, plan, X)
    assert answers.exit.tolist() == done.exit.tolist()
    for index, label in enumerate(net.topology.exits):
        rows = answers.exit == index
        want = torch.as_tensor(trace.columns[f"logits/{label}"])[rows]
        torch.testing.assert_close(answers.logits[rows], want, rtol=0, atol=1e-4)
    costs = [trace.prices.along([name], unit="macs", batch=1) for name in net.topology.exits]
    assert costs == pytest.approx([costs[-1] * (size / 12) ** 2 for size in (6, 9, 12)], rel=0.01)


def test_drnet_trains_each_norm_on_its_own_rows():
    net = network()
    norms = {name: net.backbone[name][1][1] for name in net.topology.exits}
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    history = off.fit(net, (X, Y), recipe="drnet", first=2, epochs=2, batch_size=12, progress=False)
    assert len({id(net.backbone[name][1][0].weight) for name in net.topology.exits}) == 1
    assert all(not torch.equal(norm.running_mean, before[name]) for name, norm in norms.items())
    assert not torch.equal(norms["r6"].running_mean, norms["r12"].running_mean)
    assert {"loss/r6", "loss/r9", "loss/r12"} <= set(history.epochs[0].figures)
    assert {"loss/answers", "loss/cost"} <= set(history.epochs[-1].figures)


def greys_and_boards() -> tuple[torch.Tensor, torch.Tensor]:
    """Three flat greys and a fine chessboard, which at half the size is the second grey."""
    torch.manual_seed(2)
    squares = (torch.arange(12)[:, None] + torch.arange(12)) % 2  # [12, 12]
    board = 240 * squares.float()
    flat = [torch.full((12, 12), level) for level in (20.0, 120.0, 220.0)]
    kinds = torch.stack([*flat, board])  # [4, 12, 12]
    y = torch.arange(64) % 4
    x = kinds[y][:, None].expand(-1, 3, -1, -1) + 4 * torch.rand(64, 3, 12, 12)
    return x.to(torch.uint8), y


def test_a_gate_alone_learns_the_cheapest_arm_that_is_right():
    x, y = greys_and_boards()
    gate = "predictor?width=4&side=12&stride=1"
    net = off.resolutions(model(), x[:4], [6, 12], gate=gate, preprocess=Preprocess())
    arms = "drnet?first=25&gate_epochs=0&epochs=0&rate=0.1"
    off.fit(net, (x, y), recipe=arms, batch_size=16, progress=False)
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}

    alone = "drnet?first=0&gate_epochs=20&epochs=0&gate_rate=0.05"
    off.fit(net, (x, y), recipe=alone, batch_size=16, progress=False)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(value, before[name])

    trace = off.record(net, (x, y), timed=False, progress=False)
    right = np.stack([trace.columns[f"answer/{name}"] == trace.labels for name in ("r6", "r12")])
    needed = right.argmax(0)  # 1 where only the larger size is right
    assert 0 < needed.sum() < len(needed)
    chosen = trace.replay(off.Plan.by_hand({"resolution": 0.0})).exit
    assert np.array_equal(chosen, needed)


def test_a_gate_alone_needs_one_fork_whose_arms_answer():
    torch.manual_seed(0)
    low, high = nn.Linear(4, 3), nn.Linear(4, 3)
    steps = [
        off.Fork("capacity", {"low": low.eval(), "high": high.eval()}, "controller"),
        ("head", nn.Linear(3, 2).eval()),
    ]
    net = off.route(steps, example=torch.zeros(2, 4))
    rows = (np.zeros((8, 4), np.float32), np.zeros(8, np.int64))
    with pytest.raises(
        BadNetwork,
        match="gate_epochs trains the one gate at the entrance of a network whose arms all",
    ):
        off.fit(net, rows, recipe="drnet?gate_epochs=1", progress=False)
    with pytest.raises(InvalidArgument, match="must be above 0, got 0 epochs in all"):
        off.fit(net, rows, recipe="drnet?first=0&epochs=0", progress=False)


def test_a_saved_network_is_built_again_by_name(tmp_path):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    net = off.resolutions(
        resnet20().eval(), x, [16, 32], gate=GATE, preprocess=Preprocess(), spec="offramp:resnet20"
    )
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    assert again.fingerprint() == net.fingerprint()
    plan = off.Plan.by_hand({"resolution": 0.0})
    assert torch.equal(off.run(again, plan, x).logits, off.run(net, plan, x).logits)


def test_a_switchable_norm_keeps_the_contract_of_layers():
    norm = nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        norm.running_mean.add_(torch.arange(5))
    check_layer(SwitchableNorm, norm, (5, 3, 3), same=True, routes=3)
    with pytest.raises(BadNetwork, match="must be made of a batch norm, got a Linear"):
        SwitchableNorm.from_layer(nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="routes must be at least 1"):
        SwitchableNorm.from_layer(norm, routes=0)


def test_a_route_keeps_what_has_no_norm():
    switchable = with_switchable_norms(model(), 2)
    first = route_of(switchable, 0)
    second = route_of(switchable, 1)
    assert first[5] is second[5] is switchable[5]
    assert isinstance(first[1], nn.BatchNorm2d)
    assert first[1] is switchable[1].norms[0]
    assert isinstance(switchable[1], SwitchableNorm)


@pytest.mark.parametrize(
    ("sizes", "example", "says"),
    [
        ([12], X[:2], "at least two that differ"),
        ([12, 12], X[:2], "at least two that differ"),
        (12, X[:2], "at least two that differ"),
        ([12, 0.5], X[:2], "whole numbers of pixels"),
        ([12, 6], X[:2, 0], "must be images"),
    ],
)
def test_bad_sizes(sizes, example, says):
    with pytest.raises(InvalidArgument, match=says):
        off.resolutions(model(), example, sizes, gate=GATE)


def test_a_model_without_batch_norms_is_refused():
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(BadNetwork, match="no batch norms"):
        off.resolutions(bare, X[:2], [12, 6])


@pytest.mark.parametrize("norm", ["moving", "frozen"])
def test_frozen_norms_keep_their_statistics_while_rows_choose(norm):
    net = network()
    before = {name: value.clone() for name, value in net.named_buffers()}
    recipe = f"drnet?first=0&epochs=1&norm={norm}"
    off.fit(net, (X, Y), recipe=recipe, batch_size=12, progress=False)
    moved = [
        name
        for name, value in net.named_buffers()
        if name.startswith("backbone") and not torch.equal(value, before[name])
    ]
    assert bool(moved) == (norm == "moving")
    with pytest.raises(InvalidArgument, match="norm must be one of moving, frozen"):
        off.fit(net, (X, Y), recipe="drnet?norm=still", progress=False)
