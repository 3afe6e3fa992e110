"""Exits of whole models: the own logits, and the mean of the members visited."""

from __future__ import annotations

import pytest
import torch

from offramp.errors import BadNetwork
from offramp.exits.whole import Mean, Own, own
from offramp.networks.nodes import Seen


def test_own_is_what_the_model_gave():
    logits = torch.randn(3, 4)
    assert Own()(Seen(logits, {})) is logits
    assert Own().reads == ()
    assert Own().config() == {"name": "Own"}


def test_own_by_name_needs_logits():
    assert isinstance(own((4,), 4), Own)
    for shape in ((5,), (4, 2, 2)):
        with pytest.raises(BadNetwork, match="needs logits of 4 classes"):
            own(shape, 4)


def test_mean_over_three_members():
    draw = torch.Generator().manual_seed(0)
    members = [torch.randn(6, 5, generator=draw) * 3 for _ in range(3)]
    exits = [Mean(None, 0), Mean("a", 1), Mean("b", 2)]
    first = exits[0](Seen(members[0], {}))
    second = exits[1](Seen(members[1], {"a": first}))
    third = exits[2](Seen(members[2], {"b": second}))
    chances = torch.stack(members).double().softmax(-1)
    for place, got in enumerate((first, second, third)):
        torch.testing.assert_close(
            got.double().exp(), chances[: place + 1].mean(0), atol=1e-6, rtol=1e-5
        )
    assert [exit_.reads for exit_ in exits] == [(), ("a",), ("b",)]
    assert exits[2].config() == {"name": "Mean", "before": "b", "visited": 2}


def test_finite_logits_give_finite_means():
    wide = torch.tensor([[500.0, 0.0, -500.0], [0.0, 0.0, 0.0]])
    got = Mean("a", 1)(Seen(wide, {"a": Mean(None, 0)(Seen(-wide, {}))}))
    assert got.isfinite().all()
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2))
    assert got.exp()[0].tolist() == [0.5, 0.0, 0.5]
