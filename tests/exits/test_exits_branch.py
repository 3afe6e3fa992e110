"""BranchyNet's side branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork
from offramp.exits.branch import Branch, branch
from offramp.networks.nodes import Seen


def test_each_convolution_halves_rounding_up():
    made = Branch((3, 13, 7), 5, (8, 4))
    assert [layer.out_channels for layer in made.convolutions if isinstance(layer, nn.Conv2d)] == [
        8,
        4,
    ]
    assert made.linear.in_features == 4 * 4 * 2  # 13 -> 7 -> 4, 7 -> 4 -> 2
    assert made(Seen(torch.randn(2, 3, 13, 7), {})).shape == (2, 5)


def test_by_name_it_has_one_convolution():
    assert branch((3, 8, 8), 5).config() == {
        "name": "Branch",
        "shape": [3, 8, 8],
        "classes": 5,
        "widths": [32],
    }


def test_it_stands_on_images():
    with pytest.raises(BadNetwork, match=r"\[C, H, W\]"):
        branch((64,), 5)
