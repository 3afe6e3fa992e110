"""The exits of Shallow-Deep Networks: mixed pooling, and the surest answer at the end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork
from offramp.exits.sdn import Internal, sdn
from offramp.exits.surest import Surest
from offramp.networks.nodes import Seen


@pytest.mark.parametrize(("side", "kernel"), [(32, 8), (16, 4), (13, 3), (9, 2)])
def test_mixed_pooling_by_hand(side, kernel):
    features = torch.randn(3, 2, side, side, generator=torch.Generator().manual_seed(side))
    exit_ = sdn((2, side, side), 4)
    assert 0 <= exit_.mixed.share.item() < 1
    with torch.no_grad():
        exit_.mixed.share.fill_(1.7)  # no sigmoid, no clamp
    count = side // kernel
    expected = torch.empty(3, 2, count, count)  # [B, C, rows of cells, columns of cells]
    for down in range(count):
        for right in range(count):
            top, left = kernel * down, kernel * right
            patch = features[:, :, top : top + kernel, left : left + kernel]
            expected[:, :, down, right] = 1.7 * patch.amax((2, 3)) - 0.7 * patch.mean((2, 3))
    torch.testing.assert_close(exit_(Seen(features, {})), exit_.linear(expected.flatten(1)))


def test_a_small_side_is_not_pooled_and_has_no_share():
    exit_ = Internal((2, 7, 5), 3)
    features = torch.randn(4, 2, 7, 5)
    assert exit_.mixed.share is None
    torch.testing.assert_close(exit_(Seen(features, {})), exit_.linear(features.flatten(1)))


def test_the_share_learns_also_from_what_was_pooled_once():
    exit_ = Internal((2, 16, 16), 3)
    features = torch.randn(4, 2, 16, 16)
    grads = []
    for given in (features, exit_.pool(features)):
        exit_.zero_grad()
        exit_(Seen(given, {})).square().sum().backward()
        grads.append([value.grad.clone() for value in exit_.parameters()])
    assert grads[0][0].item() != 0
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_mixed_pooling_stands_on_maps():
    with pytest.raises(BadNetwork, match=r"needs features of shape \[C, H, W\], got \(5,\)"):
        sdn((5,), 3)


def test_the_surest_of_all_heads_answers():
    rows = torch.tensor
    own = rows([[1.0, 0], [3, 0], [0, 2]])
    a = rows([[0.0, 2], [0, 1], [2, 0]])
    b = rows([[0.0, 1], [2, 0], [5, 0]])
    answers = Surest(("a", "b"))(Seen(own, {"a": a, "b": b}))
    assert torch.equal(answers, torch.stack([a[0], own[1], b[2]]))


def test_of_equally_sure_heads_the_deepest_answers():
    sure = nn.functional.one_hot(torch.tensor([0, 1, 2])) * 200.0  # all probabilities are 1
    own, b, a = (row[None] for row in sure)
    assert torch.equal(Surest(("a", "b"))(Seen(own, {"a": a, "b": b})), own)
    assert torch.equal(Surest(("a", "b"))(Seen(own * 0, {"a": a, "b": b})), b)
