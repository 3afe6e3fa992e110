"""Context managers in a model's forward: regions that change no value are cut like the rest,
autocast is named.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork


class Two(nn.Module):
    """Two layers and a head; subclasses say what they run under."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)


class NoGrad(Two):
    def forward(self, x):
        with torch.no_grad():
            h = self.b(self.a(x).relu_())
        return self.head(h)


class Nested(Two):
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x)
            with torch.enable_grad():
                h = self.b(h) + torch.arange(6.0)
        return self.head(h)


class AutocastOff(Two):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            h = self.b(self.a(x).float())
        return self.head(h)


class AutocastFirst(Two):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
        return self.head(self.b(h.float()))


def agrees(model, at):
    x = torch.randn(8, 6)
    net = off.cut(model, x, at=at, exits="linear")
    answers = off.run(net, off.Plan.by_hand({at[0]: 1e9}), x)
    torch.testing.assert_close(answers.logits, model(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [NoGrad, Nested, AutocastOff])
def test_a_cut_inside_a_region_that_changes_nothing(kind):
    agrees(kind().eval(), ["a", "b"])


def test_a_cut_behind_autocast():
    agrees(AutocastFirst().eval(), ["b"])


def test_a_cut_inside_autocast_names_it():
    with pytest.raises(
        BadNetwork, match=r"'a' .* inside `with torch.autocast\('cpu', torch.bfloat16\)`"
    ):
        off.cut(AutocastFirst().eval(), torch.randn(8, 6), at=["a"])
