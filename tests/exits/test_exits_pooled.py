"""Linear exits and a small MLP on pooled features."""

from __future__ import annotations

import pytest
import torch

from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.pooled import Pooled, linear, linear_grid, mlp
from offramp.networks.nodes import Seen


def test_the_mean_over_positions():
    features = torch.randn(3, 5, 7, 6)
    exit_ = linear((5, 7, 6), 4)
    torch.testing.assert_close(exit_.pool(features), features.mean((2, 3)))
    torch.testing.assert_close(exit_(Seen(features, {})), exit_.head(features.mean((2, 3))))


def test_mean_maximum_and_grid():
    features = torch.randn(2, 3, 8, 8)
    exit_ = linear_grid((3, 8, 8), 4)
    got = exit_.pool(features)
    assert got.shape == (2, exit_.features) == (2, 3 * 18)
    torch.testing.assert_close(got[:, :3], features.mean((2, 3)))
    torch.testing.assert_close(got[:, 3:6], features.amax((2, 3)))
    torch.testing.assert_close(got[:, 6], features[:, 0, :2, :2].mean((1, 2)))


@pytest.mark.parametrize(("shape", "width"), [((6,), 6), ((4, 6), 6), ((4, 2, 2, 2), 4)])
def test_features_that_are_no_images(shape, width):
    assert linear(shape, 3).features == linear_grid(shape, 3).features == width


def test_tokens_are_averaged():
    tokens = torch.randn(2, 4, 6)
    torch.testing.assert_close(linear((4, 6), 3).pool(tokens), tokens.mean(1))


def test_flat_and_hidden():
    exit_ = Pooled("flat", 24, 3, (8, 5))
    assert [tuple(layer.weight.shape) for layer in exit_.head if hasattr(layer, "weight")] == [
        (8, 24),
        (5, 8),
        (3, 5),
    ]
    assert exit_(Seen(torch.randn(2, 6, 2, 2), {})).shape == (2, 3)
    assert mlp((6, 2, 2), 3).config() == {
        "name": "Pooled", "pool": "grid", "features": 108, "classes": 3, "hidden": [128]
    }  # fmt: skip


def test_what_is_refused():
    with pytest.raises(InvalidArgument, match="mean, grid, flat"):
        Pooled("max", 3, 3)
    with pytest.raises(BadNetwork, match="without features"):
        linear((), 3)
