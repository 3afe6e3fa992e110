"""BranchyNet's LeNet and its branch: every size that follows from the authors' code, its cost, and
a cut at conv1.
"""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp._support import find
from offramp.building.factories import make_model, preprocess_of
from offramp.exits.branch import b_lenet
from offramp.models.lenet import lenet, preprocess
from offramp.networks.nodes import Seen
from offramp.plans.plan import Plan
from offramp.runtime.measuring import macs
from small import moved, seeded, sizes


def digits(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def test_the_trunk_has_the_sizes_of_the_authors_code():
    model = make_model("offramp:lenet")
    assert sizes(model, lambda: model(torch.zeros(2, 1, 28, 28))) == [
        ("Conv2d", (5, 30, 30)),
        ("MaxPool2d", (5, 15, 15)),
        ("Conv2d", (10, 17, 17)),
        ("MaxPool2d", (10, 9, 9)),
        ("Conv2d", (20, 11, 11)),
        ("MaxPool2d", (20, 6, 6)),
        ("Linear", (84,)),
        ("Linear", (10,)),
    ]
    assert model.fc1.in_features == 720
    assert sum(value.numel() for value in model.parameters()) == 67_824
    assert macs(lambda: model(torch.zeros(1, 1, 28, 28))) == 1_140_070


def test_the_branch_has_the_sizes_of_the_authors_code():
    branch = b_lenet((5, 30, 30), 10)
    seen = Seen(torch.zeros(2, 5, 30, 30), {})
    assert sizes(branch, lambda: branch(seen)) == [
        ("MaxPool2d", (5, 15, 15)),
        ("ReLU", (5, 15, 15)),
        ("Conv2d", (10, 15, 15)),
        ("ReLU", (10, 15, 15)),
        ("MaxPool2d", (10, 8, 8)),
        ("Flatten", (640,)),
        ("Linear", (10,)),
    ]
    assert branch.linear.in_features == 640
    assert macs(lambda: branch(Seen(torch.zeros(1, 5, 30, 30), {}))) == 107_650


def test_no_relu_between_the_linear_layers():
    model = seeded(lenet, 0).eval()
    x = digits(3) / 255
    with torch.no_grad():
        h = model(x)
        model.fc1.weight.neg_()
        model.fc1.bias.neg_()
        model.fc2.weight.neg_()
        torch.testing.assert_close(model(x), h)


def test_the_front_is_mnists():
    x = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)
    assert preprocess()(x).mean().item() == pytest.approx((1 - 0.1307) / 0.3081)
    assert preprocess_of("offramp:lenet").config() == preprocess().config()
    assert "lenet" in find.names("models")
    assert "b_lenet" in find.names("exits")


def test_cut_at_conv1_is_b_lenet(tmp_path):
    model = seeded(lenet, 0).eval()
    x = digits(6)
    net = moved(
        off.cut(
            model, x, at=["conv1"], exits="b_lenet", preprocess=preprocess(), spec="offramp:lenet"
        )
    )
    tap = model.conv1(preprocess()(x))
    assert (tap < 0).any()  # before the ReLU
    exit_ = net.exits["conv1"]
    torch.testing.assert_close(net(x)[0], exit_(Seen(tap, {})))
    trace = off.record(net, x.numpy(), timed=False, progress=False)
    costs = [
        trace.columns[f"cost/{part}"][0]
        for part in ("segment/conv1", "exit/conv1", "segment/backbone")
    ]
    assert costs == [112_500, 107_650, 1_140_070 - 112_500]
    plan = Plan.by_hand({"conv1": float(trace.columns["score/conv1"].mean())})
    answers = off.run(net, plan, x)
    assert 0 < answers.exit.sum() < len(x)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    assert again.exits["conv1"].config() == exit_.config() | {"raw": True}
    assert torch.equal(off.run(again, plan, x).logits, answers.logits)
