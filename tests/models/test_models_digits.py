"""The two small nets for the digits: their size, and that they fit their preprocessing."""

from __future__ import annotations

import pytest
import torch

from offramp.building.factories import make_model, preprocess_of
from offramp.errors import BadData
from offramp.runtime.measuring import macs


@pytest.mark.parametrize(
    ("name", "parameters", "most_macs"),
    [("digits_small", 1_386, 2.5e3), ("digits_large", 121_930, 5.5e6)],
)
def test_sizes(name, parameters, most_macs):
    model = make_model(f"offramp:{name}")
    preprocess = preprocess_of(f"offramp:{name}")
    x = preprocess(torch.full((1, 1, 8, 8), 16, dtype=torch.uint8))
    assert (x == 1).all()
    assert model(x).shape == (1, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert 0.9 * most_macs < macs(lambda: model(x)) < most_macs
    with pytest.raises(BadData):
        preprocess(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
