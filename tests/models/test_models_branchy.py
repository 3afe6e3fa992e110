"""BranchyNet's AlexNet and ResNet-110: sizes and cost that follow from the authors' code, and cuts
at their taps.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import offramp as off
from offramp.building.factories import make_exit, make_model, preprocess_of
from offramp.layers.residual import as_first_edition
from offramp.models.alexnet import alexnet, preprocess
from offramp.models.branchy_resnet import BranchyResNet
from offramp.networks.nodes import Seen
from offramp.plans.plan import Plan
from offramp.runtime.measuring import macs
from small import moved, seeded, sizes
from waves import wave_of, waves

ONE = torch.zeros(1, 3, 32, 32)


def images(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


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
    assert [size for kind, size in ran if kind == "MaxPool2d"] == [
        (32, 16, 16),
        (64, 8, 8),
        (64, 4, 4),
    ]
    assert [kind for kind, _ in ran].count("LocalResponseNorm") == 2
    assert [kind for kind, _ in ran][-5:] == ["Linear", "Dropout", "Linear", "Dropout", "Linear"]
    assert [model.fc1.in_features, model.fc2.in_features, model.fc3.in_features] == [1024, 256, 128]
    convolutions = 1024 * 25 * 3 * 32 + 256 * 25 * 32 * 64 + 64 * 9 * (64 * 96 + 96 * 96 + 96 * 64)
    assert macs(lambda: model(ONE)) == convolutions + 1024 * 256 + 256 * 128 + 1280


def test_resnet_has_the_sizes_of_the_authors_code():
    model = make_model("offramp:resnet110_branchy")
    layers = {
        name: model.get_submodule(name) for name in ("stem", "layer1", "layer2", "layer3", "pool")
    }
    heard = {}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, __, out, name=name: heard.__setitem__(name, tuple(out.shape[1:]))
        )
    model(ONE)
    assert [*heard.values()] == [(16, 30, 30), (16, 30, 30), (32, 15, 15), (64, 8, 8), (64, 3, 3)]
    assert model.linear.in_features == 576
    assert macs(lambda: model(ONE)) / 1e6 == pytest.approx(232.4, abs=0.05)
    assert sum(isinstance(part, torch.nn.Conv2d) for part in model.modules()) == 109
    assert not any("shortcut" in name or "downsample" in name for name, _ in model.named_modules())


# One block a stage, all weights and rows being waves: what the links of the authors' code give
# (their ResBlock and network of github.com/kunglab/branchynet,
# a33d136af511a4852715fcf189ee9405543056d7, on Chainer 7.8.1, for their own 1.17 needs Python 2), in
# testing and in training.
ANSWERS = {
    "eval": [
        *(
            -0.0973715,
            0.0768627,
            0.2181543,
            0.2986456,
            0.3066166,
            0.2482778,
            0.1450893,
            0.0274243,
            -0.0736891,
            -0.1345874,
        ),
        *(
            -0.1513013,
            0.0378666,
            0.2039527,
            0.3128294,
            0.3455989,
            0.3022025,
            0.2003211,
            0.0699974,
            -0.0545394,
            -0.1437029,
        ),
    ],
    "train": [
        *(
            -0.2408042,
            -0.0055732,
            0.2175594,
            0.3800423,
            0.449423,
            0.4163854,
            0.295991,
            0.1229641,
            -0.057669,
            -0.2021372,
        ),
        *(-0.272309, -0.0759428, 0.126118, 0.290651, 0.3846844),
        *(0.3926687, 0.3192936, 0.1873934, 0.0315959, -0.1106078),
    ],
}
VARIANCE = [
    0.8715773,
    0.8092080,
    0.7591715,
    0.7282426,
]  # of the last batch norm after training on that batch
# What the first edition gave on such weights, without biases.
FIRST = [
    *(
        -0.1041491,
        -0.129596,
        -0.1450927,
        -0.1431426,
        -0.1180564,
        -0.0682276,
        0.0023856,
        0.0840912,
        0.1628097,
        0.2227433,
    ),
    *(
        -0.0972167,
        -0.1269354,
        -0.1473766,
        -0.1497936,
        -0.1273927,
        -0.0778884,
        -0.005157,
        0.0805739,
        0.1642072,
        0.2287022,
    ),
]
NEAR = {"atol": 2e-6, "rtol": 1e-5}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_resnet_computes_as_the_authors_code_does(mode):
    model = waves(BranchyResNet(1)).train(mode == "train")
    x = (0.11 * torch.arange(2 * 3 * 32 * 32).double()).sin().float().reshape(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x).flatten(), torch.tensor(ANSWERS[mode]), atol=1e-6, rtol=1e-5
        )
    if mode == "train":
        torch.testing.assert_close(
            model.layer3[0].bn2.running_var[:4], torch.tensor(VARIANCE), **NEAR
        )


def test_weights_of_the_first_edition_load_and_mean_the_same(tmp_path):
    old = BranchyResNet(1)
    as_first_edition(old)
    waves(old)
    assert "stem.0.bias" not in old.state_dict()
    model = BranchyResNet(1).eval()
    model.load_state_dict(old.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            model(wave_of(2, 3, 32, 32)).flatten(), torch.tensor(FIRST), **NEAR
        )
    x = images(4)
    options = {"at": ["layer1"], "exits": "linear", "preprocess": preprocess()}
    net = moved(off.cut(model, x, **options))
    off.save(net, tmp_path / "net")
    # the new form, until the file's weights come
    again = off.load(tmp_path / "net", BranchyResNet(1))
    assert again.fingerprint() == net.fingerprint()
    torch.testing.assert_close(again(x)[1], net(x)[1])
    torch.testing.assert_close(copy.deepcopy(again)(x)[1], net(x)[1])


def test_weights_start_as_chainers_do():
    model = seeded(lambda: BranchyResNet(2), 0)
    convolutions = [part for part in model.modules() if isinstance(part, torch.nn.Conv2d)]
    for part in convolutions[1:]:
        fan_in = part.weight[0].numel()
        assert part.weight.std().item() == pytest.approx((2**0.5 / fan_in) ** 0.5, rel=0.05)
        assert not part.bias.any()
    assert model.linear.weight.std().item() == pytest.approx(576**-0.5, rel=0.05)
    net = seeded(alexnet, 0)
    assert net.conv4.weight.std().item() == pytest.approx((1 / 864) ** 0.5, rel=0.05)
    assert net.fc1.weight.std().item() == pytest.approx(1 / 32, rel=0.05)
    assert not net.fc1.bias.any()
    branch = seeded(lambda: make_exit("b_lenet", (5, 30, 30), 10), 0)
    assert branch.linear.weight.std().item() == pytest.approx(640**-0.5, rel=0.05)
    assert not branch.linear.bias.any()


def test_one_front():
    x = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert preprocess()(x)[0, :, 0, 0].tolist() == pytest.approx(
        [(1 - 0.4914) / 0.247, 2.1265, 2.1158], abs=1e-3
    )
    assert (
        preprocess_of("offramp:alexnet").config()
        == preprocess_of("offramp:resnet110_branchy").config()
        == preprocess().config()
    )


def runs(net, x):
    """Running equals replaying, where rows leave at every place."""
    trace = off.record(net, x.numpy(), timed=False, progress=False)
    plan = Plan.by_hand(
        {name: float(np.median(trace.columns[f"score/{name}"])) for name in trace.topology.gates}
    )
    replay = trace.replay(plan)
    answers = off.run(net, plan, x)
    assert len(set(replay.exit.tolist())) == 3
    assert (answers.exit.numpy() == replay.exit).all()
    assert (answers.logits.argmax(1).numpy() == replay.answer).all()
    return trace, plan, answers


def test_cut_at_conv2_and_conv3_is_b_alexnet(tmp_path):
    model = seeded(alexnet, 0).eval()
    x = images(12)
    at = ["conv2", "conv3"]
    net = moved(
        off.cut(
            model, x[:2], at=at, exits="b_alexnet", preprocess=preprocess(), spec="offramp:alexnet"
        )
    )
    tap = model.conv2(model.norm(model.pool(model.conv1(preprocess()(x)).relu())))
    assert (tap < 0).any()  # before the ReLU
    torch.testing.assert_close(net(x)[0], net.exits["conv2"](Seen(tap, {})))
    trace, plan, answers = runs(net, x)
    assert [trace.columns[f"cost/exit/{name}"][0] for name in at] == [1_774_592, 443_648]
    assert trace.columns["cost/segment/conv2"][0] == 2_457_600 + 13_107_200
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net")
    assert [again.exits[name].config()["widths"] for name in at] == [[32, 32], [32]]
    assert torch.equal(off.run(again, plan, x).logits, answers.logits)


# logits of weights that were drawn are large
@pytest.mark.filterwarnings("ignore::offramp.errors.Notice")
def test_cut_at_stem_and_layer1_is_b_resnet():
    x = images(9)
    model = seeded(lambda: BranchyResNet(1), 0).eval()
    # the exits are drawn too: nothing may depend on what ran before
    net = seeded(
        lambda: moved(
            off.cut(model, x[:2], at=["stem", "layer1"], exits="b_resnet", preprocess=preprocess())
        ),
        0,
    )
    trace, _, _ = runs(net, x)
    assert trace.columns["cost/segment/stem"][0] == 900 * 27 * 16
