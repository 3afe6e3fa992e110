"""Cuts into even parts: what is said where the legal cuts divide the work badly."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import UnevenParts
from offramp.partition import CutPoint, unevenness


class TimeFirst(nn.Module):
    """A transformer that runs with time as the first dimension, as torch does by default."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(5, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(self.inp(x).transpose(0, 1)).mean(0))


def test_uneven_parts_are_told_with_the_reason():
    x = torch.randn(8, 24, 5)
    with pytest.warns(
        UnevenParts, match=r"parts=2 gives parts of .*%, 9.*% .* first dimension is 24, not B"
    ):
        off.cut(TimeFirst().eval(), x, parts=2)


def test_even_parts_are_not():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off.cut(model, torch.randn(8, 8), parts=2)


def points(*shares, barred=()):
    found = [CutPoint(f"m{share}", None, share=share) for share in shares]
    found += [CutPoint(f"b{share}", "runs twice", share=share) for share in barred]
    return found


def test_what_counts_as_uneven():
    assert unevenness(points(0.5), ["m0.5"]) is None
    assert unevenness(points(0.26), ["m0.26"]) is None
    assert unevenness(points(0.2, barred=[0.6]), ["m0.2"]) == (
        "gives parts of 20.0%, 80.0% of the work, because no cut inside the largest part is "
        "legal: 'b0.6' runs twice"
    )
    assert unevenness(points(0.9), ["m0.9"]) == (
        "gives parts of 90.0%, 10.0% of the work: no module ends inside the largest part"
    )
