"""Adaptive depth: the halting rule position by position, what is kept where it halted, and the gradient of its cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.layers.adaptive_depth import AdaptiveDepth, Halt, depths
from offramp.networks.taps import listening
from small import seeded


class Plus(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


class Scores(nn.Module):
    """Scores of its own for every position."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x):
        return self.values.expand(len(x), 1, -1)


def made(scores):
    stage = AdaptiveDepth([Plus(10.0**place) for place in range(len(scores) + 1)], 2)
    stage.halts = nn.ModuleList(Scores(each) for each in scores)
    return stage.eval()


def by_hand(scores, x):
    """Output and cost of one position."""
    total, state, out = 0.0, x, 0.0
    for place, score in enumerate([*scores, 1.0]):
        state += 10.0**place
        if total + score >= 0.99:
            return out + (1 - total) * state, place + 1 + 1 - total
        total, out = total + score, out + score * state
    raise AssertionError


def test_every_position_by_hand():
    scores = [[0.995, 0.2, 0.5, 0.0], [0.5, 0.9, 0.48, 0.3], [0.1, 0.1, 0.1, 0.4]]
    stage, x = made(scores), torch.randn(3, 2, 4)
    costs = []
    with listening({"ponder": stage.ponder}, lambda _, cost: costs.append(cost)):
        out = stage(x)
    for position in range(4):
        for row in range(3):
            want = [by_hand([each[position] for each in scores], value) for value in x[row, :, position].tolist()]
            assert out[row, :, position].tolist() == pytest.approx([value for value, _ in want], rel=1e-5)
            assert costs[0][row, 0, position].item() == pytest.approx(want[0][1])
    assert costs[0].shape == (3, 1, 4)
    assert [round(value) for value in costs[0][0, 0].floor().tolist()] == [2, 2, 3, 4]


def test_the_cost_pulls_at_the_scores_before_the_last_unit_alone():
    stage = made([[0.2, 0.995], [0.9, 0.5]])
    costs = []
    with listening({"ponder": stage.ponder}, lambda _, cost: costs.append(cost)):
        stage(torch.zeros(1, 2, 2))
    costs[0].sum().backward()
    assert stage.halts[0].values.grad.tolist() == [-1, 0]
    assert stage.halts[1].values.grad.tolist() == [0, 0]


def test_it_starts_at_full_depth():
    stage = seeded(lambda: AdaptiveDepth([nn.Conv1d(4, 4, 3, padding=1) for _ in range(3)], 4), 0).eval()
    found = depths(nn.Sequential(stage), torch.randn(5, 4, 9))
    assert found["0"].shape == (5, 1, 9)
    assert found["0"].min() > 3
    assert seeded(lambda: Halt(4), 0).near.bias.item() == -3
    assert not any(part._forward_hooks for part in stage.modules())
