"""The heads of Be Your Own Teacher: widths at the places of a ResNet-18 for CIFAR, the mask, and in
a network.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork
from offramp.exits.attentive import Attentive, attentive, bottleneck
from offramp.networks.nodes import Seen
from offramp.plans.plan import Plan
from offramp.runtime.measuring import macs
from small import cut_of, images_of, moved, seeded, sizes
from waves import wave_of, waves

PLACES = [((64, 32, 32), 3, 8), ((128, 16, 16), 2, 4), ((256, 8, 8), 1, 2)]


@pytest.mark.parametrize(("shape", "steps", "kernel"), PLACES)
def test_all_heads_end_at_one_width(shape, steps, kernel):
    one = attentive(shape, 100).eval()
    other = bottleneck(shape, 100).eval()
    assert (one.steps, one.linear.in_features, other.linear.in_features) == (steps, 512, 512)
    assert other.layers[3].kernel_size == other.layers[3].stride == (kernel, kernel)
    seen = Seen(torch.zeros(1, *shape), {})
    for made in (one, other):
        ran = sizes(made, lambda made=made: made(seen))
        assert ran[-2] == ("ReLU", (512, 4, 4))
        assert ran[-1] == ("Linear", (100,))


def separable(channels, out, side):
    return side * side * channels * (9 + channels + 9 + out)


def test_the_cost_of_the_first_head():
    made = attentive((64, 32, 32), 100).eval()
    want = (
        separable(64, 64, 16)
        + separable(64, 128, 16)
        + separable(128, 256, 8)
        + separable(256, 512, 4)
        + 51_200
    )
    assert macs(lambda: made(Seen(torch.zeros(1, 64, 32, 32), {}))) == want


def test_the_mask_lies_between_a_half_and_one():
    made = seeded(lambda: Attentive((2, 9, 8), 3, 0), 0).eval()
    x = torch.rand(6, 2, 9, 8) + 0.1
    with torch.no_grad():
        for part in made.mask:
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.fill_(3.0)
        share = made.feature(x) / x.mean((2, 3))  # no steps: the mean of mask times features
        none = made.mask[-2]
        none.weight.zero_()
        none.bias.fill_(-1.0)
        torch.testing.assert_close(made.feature(x), 0.5 * x.mean((2, 3)))
    assert ((share >= 0.5) & (share < 1)).all()
    assert (share > 0.5).any()


# What their SepConv, attention and scala layers give at 3 channels with two steps, weights and
# features being waves: github.com/ArchipLab-LinfengZhang/pytorch-self-distillation-final,
# 47ca93b6a60baaaf127a762e9f19bc70f4f0ffed.
MASK = {"eval": [0.6324678, 0.7449836, 0.6330124], "train": [0.5, 0.5, 0.8622109]}
FEATURE = {
    "eval": [
        *(0, 0, 0.0022234, 0.0011025, 0, 0.1219373),
        *(0.0488995, 0.0492414, 0.3479256, 0.1425682, 0.1613027, 0.3391894),
    ],
    "train": [
        *(0.3362114, 0.3018321, 0.4666747, 0.3525125, 0.514119, 0.6615396),
        *(0.2424004, 0.6892568, 0.7256272, 0.3741896, 0.6768041, 0.5914584),
    ],
}
LOGITS = {
    "eval": [
        [-0.204468, -0.254346, 0.098684, -0.1749652],
        [-0.2018849, -0.2548113, 0.0963513, -0.1732447],
    ],
    "train": [
        [-0.7319048, 0.1071359, 0.4316196, -0.7155885],
        [-0.7994462, 0.193421, 0.4527339, -0.8132346],
    ],
}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_head_computes_as_the_authors_code_does(mode):
    made = waves(Attentive((3, 16, 16), 4, 2)).train(mode == "train")
    x = wave_of(2, 3, 16, 16, scale=2.0)
    heard = []
    made.layers.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    feature = made.feature(x)
    near = {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close((heard[0] / x)[0, :, 3, 5], torch.tensor(MASK[mode]), **near)
    torch.testing.assert_close(feature[0], torch.tensor(FEATURE[mode]), **near)
    torch.testing.assert_close(made.linear(feature), torch.tensor(LOGITS[mode]), **near)


def test_it_stands_on_images():
    for name in (attentive, bottleneck):
        with pytest.raises(BadNetwork, match=r"\[C, H, W\]"):
            name((64,), 5)


@pytest.mark.parametrize("name", ["attentive", "bottleneck"])
def test_in_a_network(name, tmp_path):
    net = moved(cut_of(exits=name))
    x = images_of(40, 4)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    trace = off.record(net, x, timed=False, progress=False)
    plan = Plan.by_hand(
        {gate: float(np.median(trace.columns[f"score/{gate}"])) for gate in trace.topology.gates}
    )
    replay = trace.replay(plan)
    answers = off.run(again, plan, x)
    assert len(set(replay.exit.tolist())) == 3
    assert (answers.exit.numpy() == replay.exit).all()
    assert (answers.logits.argmax(1).numpy() == replay.answer).all()
