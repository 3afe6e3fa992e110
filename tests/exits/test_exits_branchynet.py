"""BranchyNet's branches for AlexNet and ResNet-110: every size that follows from the authors' code,
and their cost.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from offramp.building.factories import make_exit
from offramp.building.saving import _exit
from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.branchynet import Residual, b_alexnet_1, b_alexnet_2, b_resnet_1, b_resnet_2
from offramp.networks.nodes import Seen
from offramp.runtime.measuring import macs
from small import sizes
from waves import wave_of, waves


def ran(made, shape):
    seen = Seen(torch.zeros(2, *shape), {})
    return sizes(made, lambda: made(seen))


def cost(made, shape):
    return macs(lambda: made.eval()(Seen(torch.zeros(1, *shape), {})))


def test_branch_1_of_alexnet():
    shape = (64, 16, 16)
    made = b_alexnet_1(shape, 10)
    assert ran(made, shape) == [
        ("ReLU", (64, 16, 16)),
        ("MaxPool2d", (64, 8, 8)),
        ("LocalResponseNorm", (64, 8, 8)),
        ("Conv2d", (32, 8, 8)),
        ("ReLU", (32, 8, 8)),
        ("Conv2d", (32, 8, 8)),
        ("ReLU", (32, 8, 8)),
        ("MaxPool2d", (32, 4, 4)),
        ("Flatten", (512,)),
        ("Linear", (10,)),
    ]
    assert cost(made, shape) == 64 * 9 * 32 * 64 + 64 * 9 * 32 * 32 + 5120


def test_branch_2_of_alexnet():
    shape = (96, 8, 8)
    made = b_alexnet_2(shape, 10)
    assert made.linear.in_features == 128
    assert [kind for kind, _ in ran(made, shape)].count("Conv2d") == 1
    assert cost(made, shape) == 16 * 9 * 96 * 32 + 1280


@pytest.mark.parametrize(
    ("convolutions", "features"), [(0, 1024), (1, 512), (2, 512), (3, 512), (4, 512)]
)
def test_branch_1_of_alexnet_with_other_depths(convolutions, features):
    shape = (64, 16, 16)
    made = make_exit(partial(b_alexnet_1, convolutions=convolutions), shape, 10)
    assert [kind for kind, _ in ran(made, shape)].count("Conv2d") == convolutions
    assert made.linear.in_features == features


def test_branches_of_resnet():
    shape = (16, 30, 30)
    first = b_resnet_1(shape, 10)
    second = b_resnet_2(shape, 10)
    assert [size for kind, size in ran(first, shape) if kind == "Conv2d"] == [
        (64, 30, 30),
        (32, 30, 30),
        (32, 30, 30),
    ]
    assert "MaxPool2d" not in [kind for kind, _ in ran(first, shape)]
    assert first.layers[0].kernel_size == (5, 5)
    assert (first.linear.in_features, second.linear.in_features) == (28_800, 14_400)
    assert cost(first, shape) / 1e6 == pytest.approx(48.2, abs=0.05)
    assert cost(second, shape) == 2 * 900 * 9 * 16 * 16 + 144_000


def test_a_branch_of_the_first_edition_has_no_biases():
    """Golden values of the first edition; its files say nothing of biases."""
    now = Residual((4, 5, 6), 3)
    before = Residual((4, 5, 6), 3, biased=False)
    assert now.config() == {
        "name": "Residual",
        "shape": [4, 5, 6],
        "classes": 3,
        "blocks": 1,
        "biased": True,
    }
    assert "biased" not in before.config()
    assert now.blocks[0].conv1.bias is not None
    assert now.blocks[0].bn1.eps == 2e-5
    waves(before.eval())
    expected = [-0.1321944, -0.7061911, -1.1655701, 0.0513778, -0.0659843, -0.1788144]
    logits = before(Seen(wave_of(2, 4, 5, 6), {})).flatten()
    torch.testing.assert_close(logits, torch.tensor(expected), atol=2e-6, rtol=1e-5)
    again = _exit("stem", before.config(), {})
    assert (again.biased, again.blocks[0].conv1.bias) == (False, None)
    assert _exit("stem", now.config(), {}).biased


@pytest.mark.parametrize(
    ("name", "shape"), [("b_alexnet", (64, 16, 16)), ("b_resnet", (16, 30, 30))]
)
def test_by_place(name, shape):
    one = make_exit(name, shape, 10, ())
    two = make_exit(name, shape, 10, ("conv2",))
    assert one.config() == make_exit(f"{name}_1", shape, 10).config()
    assert two.config() == make_exit(f"{name}_2", shape, 10).config()
    assert one.reads == two.reads == ()


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadNetwork, match="4 x 4"):
        b_alexnet_2((96, 3, 8), 10)
    with pytest.raises(BadNetwork, match=r"\[C, H, W\]"):
        b_resnet_2((96,), 10)
    with pytest.raises(InvalidArgument, match=r"convolutions must be .*, got -1"):
        b_alexnet_1((64, 16, 16), 10, -1)
