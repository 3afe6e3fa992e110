"""Local response norm, by its formula."""

from __future__ import annotations

import torch

from offramp.layers.lateral import lateral_norm


def test_the_formula_by_hand():
    x = torch.randn(2, 5, 3, 3) * 40
    squares = x.square()
    for channel in range(5):
        near = squares[:, max(0, channel - 1) : channel + 2].sum(1)
        want = x[:, channel] / (2 + 5e-5 * near) ** 0.75
        torch.testing.assert_close(lateral_norm()(x)[:, channel], want)
