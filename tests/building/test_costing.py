"""Costs of models and of what was converted in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.converting import convert
from offramp.building.costing import changes, cost_of
from offramp.errors import InvalidArgument
from offramp.networks.layer import dense_cost
from small import images_of, stages


def test_the_cost_of_a_plain_model():
    model = stages()
    cost = cost_of(model, images_of(3))
    assert cost.macs == dense_cost(model, (1, 8, 8)).macs
    assert cost.bit_operations == cost.macs * 32 * 32
    assert cost.parameters == sum(value.numel() for value in model.parameters())
    assert cost.stored_bytes == sum(
        v.numel() * v.element_size() for v in model.state_dict().values()
    )
    assert cost.ms is None
    assert cost_of(model, images_of(3), timed=True).ms > 0
    half = cost_of(model.double(), images_of(3).double())
    assert half.bit_operations == cost.macs * 64 * 64


def test_what_changed_by_layer_and_in_all():
    before = stages()
    after = convert(before, {"blocks.0.1": "ghost", "head": "low_rank?rank=1"})
    found = changes(before, after, images_of(4))
    assert [(one.name, one.kind) for one in found] == [
        ("blocks.0.1", "Ghost"),
        ("head", "LowRank"),
        ("", "model"),
    ]
    assert found[0].before.macs == 4 * 4 * 9 * 36
    for figure in ("parameters", "macs", "bit_operations", "stored_bytes"):
        parts = sum(getattr(one.before, figure) - getattr(one.after, figure) for one in found[:2])
        whole = getattr(found[2].before, figure) - getattr(found[2].after, figure)
        assert parts == pytest.approx(whole)
    assert all(one.before.ms > 0 and one.after.ms > 0 for one in found)
    assert changes(before, after, images_of(4), timed=False)[0].after.ms is None


def test_inspect_lists_what_was_changed():
    before = stages()
    after = convert(before, {"head": "low_rank?rank=1"})
    found = off.inspect(after, images_of(4), original=before)
    assert [one.name for one in found.changes] == ["head", ""]
    assert found.changes[0].after.parameters < found.changes[0].before.parameters
    assert found.to_json()["changes"][0]["name"] == "head"
    assert off.inspect(after, images_of(4)).changes == ()
    with pytest.raises(InvalidArgument, match=r"original"):
        off.inspect(after, images_of(4), original="stages")


def test_packed_layers_count_their_weights_and_their_bytes():
    before = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU()).eval()
    soft = convert(before, {"0": "ternary"})
    hard = convert(soft, {"0": "packed"})
    x = torch.randn(2, 4, 6, 6)
    one = cost_of(soft, x)
    other = cost_of(hard, x)
    assert other.parameters == one.parameters == 16 * 36 + 16
    assert other.stored_bytes == 16 * 36 // 4 + 4 * 32
    assert other.macs == one.macs
