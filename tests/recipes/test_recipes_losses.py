"""The losses against their formulas, and the planes below them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from offramp.recipes._losses import LOSSES
from written_losses import loss_of

ALL = tuple(LOSSES)


@settings(max_examples=60)
@given(st.sampled_from(ALL), st.integers(0, 10**6), st.floats(1e-4, 10), st.floats(0.01, 30))
def test_every_u_bounds_every_objective(loss, seed, regularizer, spread):
    made = torch.Generator().manual_seed(seed)
    one = LOSSES[loss]
    x = torch.randn(12, 4, generator=made).double()
    y = torch.arange(12) % 3
    u = one.feasible(torch.randn(12, 3, generator=made).double() * 2, y)
    weight = spread * torch.randn(3, 4, generator=made).double()
    primal = loss_of(loss, (x @ weight.T).numpy(), y.tolist()) + regularizer / 2 * float(
        weight.square().sum()
    )
    pull = u.T @ x / 12
    dual = -float(one.conjugate(u, y).mean()) - float(pull.square().sum()) / (2 * regularizer)
    assert dual <= primal + 1e-9


@settings(max_examples=60)
@given(st.sampled_from(ALL), st.integers(0, 10**6), st.floats(1e-4, 1), st.floats(0.01, 30))
def test_the_plane_of_dual_is_feasible_and_nears_the_loss(loss, seed, mu, spread):
    made = torch.Generator().manual_seed(seed)
    one = LOSSES[loss]
    s = spread * torch.randn(20, 4, generator=made).double()
    y = torch.arange(20) % 4
    u = one.dual(s, y, mu)
    assert_close(one.feasible(u, y), u, rtol=0, atol=1e-9)
    below = one.value(s, y) - (u * s).sum(1) + one.conjugate(u, y)
    assert below.min() >= -1e-9
    assert (below <= mu / 2 * 4 * one.kinked + 1e-9).all()  # |u|^2 is at most the number of classes
    assert float(one.value(s, y).mean()) == pytest.approx(loss_of(loss, s.numpy(), y.tolist()))
