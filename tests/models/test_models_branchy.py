"""BranchyNet's AlexNet and ResNet-110: sizes and cost that follow from the authors' code, and cuts at their taps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from offramp.factories import front_of, make_model
from offramp.measuring import macs
from offramp.models.alexnet import alexnet, front
from offramp.models.branchy_resnet import BranchyResNet
from offramp.nodes import Seen
from offramp.plan import Plan
from small import moved, seeded, sizes

ONE = torch.zeros(1, 3, 32, 32)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_alexnet_has_the_sizes_of_the_authors_code():
    model = make_model("offramp:alexnet")
    ran = sizes(model, lambda: model(ONE))
    assert [size for kind, size in ran if kind == "Conv2d"] == [
        (32, 32, 32),
        (64, 16, 16),
        (96, 8, 8),
        (96, 8, 8),
        (64, 8, 8),
    ]
    assert [size for kind, size in ran if kind == "MaxPool2d"] == [(32, 16, 16), (64, 8, 8), (64, 4, 4)]
    assert [kind for kind, _ in ran].count("LocalResponseNorm") == 2
    assert [kind for kind, _ in ran][-5:] == ["Linear", "Dropout", "Linear", "Dropout", "Linear"]
    assert [model.fc1.in_features, model.fc2.in_features, model.fc3.in_features] == [1024, 256, 128]
    convolutions = 1024 * 25 * 3 * 32 + 256 * 25 * 32 * 64 + 64 * 9 * (64 * 96 + 96 * 96 + 96 * 64)
    assert macs(lambda: model(ONE)) == convolutions + 1024 * 256 + 256 * 128 + 1280


def test_resnet_has_the_sizes_of_the_authors_code():
    model = make_model("offramp:resnet110_branchy")
    layers = {name: model.get_submodule(name) for name in ("stem", "layer1", "layer2", "layer3", "pool")}
    heard = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, __, out, name=name: heard.__setitem__(name, tuple(out.shape[1:])))
    model(ONE)
    assert [*heard.values()] == [(16, 30, 30), (16, 30, 30), (32, 15, 15), (64, 8, 8), (64, 3, 3)]
    assert model.linear.in_features == 576
    assert macs(lambda: model(ONE)) / 1e6 == pytest.approx(232.4, abs=0.05)
    assert sum(isinstance(part, torch.nn.Conv2d) for part in model.modules()) == 109
    assert not any("shortcut" in name or "downsample" in name for name, _ in model.named_modules())


def test_one_front():
    x = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert front()(x)[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.4914) / 0.247, 2.1265, 2.1158], abs=1e-3)
    assert front_of("offramp:alexnet").config() == front_of("offramp:resnet110_branchy").config() == front().config()


def runs(net, x):
    """Running equals replaying, where rows leave at every place."""
    trace = off.record(net, x.numpy(), timed=False, progress=False)
    plan = Plan.by_hand({name: float(np.median(trace.columns[f"score/{name}"])) for name in trace.chain.gates})
    replay, answers = trace.replay(plan), off.run(net, plan, x)
    assert len(set(replay.exit.tolist())) == 3
    assert (answers.exit.numpy() == replay.exit).all()
    assert (answers.logits.argmax(1).numpy() == replay.answer).all()
    return trace, plan, answers


def test_cut_at_conv2_and_conv3_is_b_alexnet(tmp_path):
    model, x = seeded(alexnet, 0).eval(), images(12)
    at = ["conv2", "conv3"]
    net = moved(off.cut(model, x[:2], at=at, exits="b_alexnet", front=front(), spec="offramp:alexnet"))
    tap = model.conv2(model.norm(model.pool(model.conv1(front()(x)).relu())))
    assert (tap < 0).any()  # before the ReLU
    torch.testing.assert_close(net(x)[0], net.exits["conv2"](Seen(tap, {})))
    trace, plan, answers = runs(net, x)
    assert [trace.columns[f"cost/exit/{name}"][0] for name in at] == [1_774_592, 443_648]
    assert trace.columns["cost/segment/conv2"][0] == 2_457_600 + 13_107_200
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    assert [again.exits[name].config()["widths"] for name in at] == [[32, 32], [32]]
    assert torch.equal(off.run(again, plan, x).logits, answers.logits)


def test_cut_at_stem_and_layer1_is_b_resnet():
    x = images(9)
    model = seeded(lambda: BranchyResNet(1), 0).eval()
    net = moved(off.cut(model, x[:2], at=["stem", "layer1"], exits="b_resnet", front=front()))
    trace, _, _ = runs(net, x)
    assert trace.columns["cost/segment/stem"][0] == 900 * 27 * 16
