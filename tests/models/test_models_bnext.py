"""BNext: the sizes of the paper, binary layers where they belong, and a network like any other."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.building.converting import convert
from offramp.errors import InvalidArgument
from offramp.layers.binary import Binary
from offramp.models.bnext import WIDTHS, Attention, BNext, FeedForward, bnext
from offramp.networks.layer import dense_cost
from small import seeded


def tiny():
    return seeded(lambda: bnext("tiny", 5, stride=1, divide=8), 0).eval()


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_shapes_and_blocks():
    model = tiny()
    assert model(X).shape == (4, 5)
    assert model.blocks(model.stem(X)).shape == (4, 128, 2, 2)  # four halvings of 32
    kinds = [type(block.first) for block in model.blocks]
    assert kinds == [Attention, FeedForward] * 6 + [Attention]
    assert len(model.blocks) == len(WIDTHS["tiny"]) - 1 == 13
    doubled = [len(block.second) for block in model.blocks]
    assert doubled == [2, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]


def test_the_operations_of_the_paper():
    """0.077 G for BNext-T: an operation is 64 of one bit, or 8 of eight bits (stem and head), or
    one float one.
    """
    with torch.device("meta"):
        model = bnext("tiny")
    whole = dense_cost(model.eval(), (3, 224, 224)).macs
    binary = 0.0
    side = 112
    for block in model.blocks:
        side = -(-side // 2) if block.first.stride == 2 else side
        width = block.first.body.conv.weight.shape[0]
        binary += side * side * (width * width * 9 + len(block.second) * width * width)
    eight = 112 * 112 * 32 * 27 + 1024 * 1000
    assert side == 7
    assert binary / 64 + eight / 8 + (whole - binary - eight) == pytest.approx(0.077e9, rel=0.03)


def test_every_convolution_of_blocks_is_binary():
    model = tiny()
    layers = [part for part in model.modules() if isinstance(part, Binary)]
    assert len(layers) == sum(1 + len(block.second) for block in model.blocks)
    assert all(part.scale is None and part.bias is None for part in layers)
    assert all(part.used().unique().tolist() == [-1.0, 1.0] for part in layers)


def test_it_is_packed():
    model = tiny()
    small = convert(model, {"Binary": "packed"})
    assert torch.allclose(small(X), model(X), atol=1e-4)


def test_it_is_cut_and_runs():
    """Four blocks: both kinds, one that halves the sides and doubles the channels, and one that
    keeps both. An export of all thirteen takes long.
    """
    model = seeded(lambda: BNext([4, 8, 16, 16, 16], 5, stride=1), 0).eval()
    net = off.cut(model, X, at=["blocks.1"]).eval()
    plan = off.Plan.by_hand({"blocks.1": float("inf")})
    assert torch.allclose(off.run(net, plan, X).logits, model(X), atol=1e-4)


def test_what_it_refuses():
    with pytest.raises(InvalidArgument, match="size must be one of tiny"):
        bnext("huge")
    with pytest.raises(InvalidArgument, match="divide must divide the widths"):
        bnext("tiny", divide=7)
