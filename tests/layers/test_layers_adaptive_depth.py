"""Adaptive depth: the halting rule position by position, what is kept where it halted, and the
gradient of its cost.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.adaptive_depth import AdaptiveDepth, Halt, depths
from offramp.layers.residual import Block
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
    stage = AdaptiveDepth([Plus(10.0**index) for index in range(len(scores) + 1)], 2)
    stage.halts = nn.ModuleList(Scores(each) for each in scores)
    return stage.eval()


def by_hand(scores, x):
    """Output and cost of one position."""
    total = 0.0
    state = x
    out = 0.0
    for index, score in enumerate([*scores, 1.0]):
        state += 10.0**index
        if total + score >= 0.99:
            return out + (1 - total) * state, index + 1 + 1 - total
        total = total + score
        out = out + score * state
    raise AssertionError


def test_every_position_by_hand():
    scores = [[0.995, 0.2, 0.5, 0.0], [0.5, 0.9, 0.48, 0.3], [0.1, 0.1, 0.1, 0.4]]
    stage = made(scores)
    x = torch.randn(3, 2, 4)
    costs = []
    with listening({"ponder": stage.ponder}, lambda _, cost: costs.append(cost)):
        out = stage(x)
    for position in range(4):
        for row in range(3):
            want = [
                by_hand([each[position] for each in scores], value)
                for value in x[row, :, position].tolist()
            ]
            assert out[row, :, position].tolist() == pytest.approx(
                [value for value, _ in want], rel=1e-5
            )
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
    stage = seeded(
        lambda: AdaptiveDepth([nn.Conv1d(4, 4, 3, padding=1) for _ in range(3)], 4), 0
    ).eval()
    found = depths(nn.Sequential(stage), torch.randn(5, 4, 9))
    assert found["0"].shape == (5, 1, 9)
    assert found["0"].min() > 3
    assert seeded(lambda: Halt(4), 0).near.bias.item() == -3
    assert not any(part._forward_hooks for part in stage.modules())


def images(per, units=4, kind=None, **options):
    """A stage on images [B, 6, 8, 8] whose scores differ from position to position and from row to
    row.
    """

    def make():
        if kind is None:
            blocks = [Block(6, 6) for _ in range(units)]
        else:
            blocks = [kind() for _ in range(units)]
        stage = AdaptiveDepth(blocks, 6, per=per, **options)
        draw = torch.Generator().manual_seed(5)
        for part in stage.modules():
            if isinstance(part, (nn.BatchNorm2d, nn.BatchNorm1d)):
                part.running_mean.copy_(torch.randn(part.num_features, generator=draw) * 0.2)
                with torch.no_grad():
                    part.bias.copy_(torch.randn(part.num_features, generator=draw) * 0.2)
        for halt in stage.halts:
            with torch.no_grad():
                (halt.near if per == "position" else halt.all).weight.mul_(8)
                (halt.near if per == "position" else halt.all).bias.fill_(-0.5)
        return stage

    return seeded(make, 3).eval()


@pytest.mark.parametrize("per", ["position", "sample"])
@pytest.mark.parametrize("break_even", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "kind", [None, lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))]
)
def test_what_is_skipped_changes_nothing(per, break_even, kind):
    stage = images(per, kind=kind, break_even=break_even, tile=2)
    x = torch.randn(9, 6, 8, 8, generator=torch.Generator().manual_seed(6)) + torch.linspace(
        -3, 3, 9
    ).view(9, 1, 1, 1)
    kept = x.clone()
    with torch.no_grad():
        want, wanted = stage.masked(x)
        got, spent = stage.skipping(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(spent, wanted, atol=1e-5, rtol=1e-5)
    assert len(wanted.ceil().unique()) > 1  # some go on for longer than others
    assert torch.equal(x, kept)
    with torch.no_grad():
        assert torch.equal(stage(x), got)
    torch.testing.assert_close(stage(x), want)  # under autograd


@pytest.mark.parametrize("per", ["position", "sample"])
@pytest.mark.parametrize("break_even", [0.0, 1.0])
def test_a_row_with_nan_gives_nan_and_leaves_the_others_alone(per, break_even):
    """Its score never reaches 1, so it never halts."""
    stage = images(per, break_even=break_even, tile=2)
    x = torch.randn(5, 6, 8, 8, generator=torch.Generator().manual_seed(6))
    spoiled = x.clone()
    spoiled[1] = torch.nan
    spoiled[3, 0, 2, 2] = torch.nan
    with torch.no_grad():
        got = stage(spoiled)
        want = stage(x)
        masked, _ = stage.masked(spoiled)
    assert got.isnan().flatten(1).any(1).tolist() == [False, True, False, True, False]
    assert torch.equal(got.isnan(), masked.isnan())
    torch.testing.assert_close(got[[0, 2, 4]], want[[0, 2, 4]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("per", ["position", "sample"])
def test_the_weights_add_up_to_one(per):
    class Ones(nn.Module):
        def forward(self, x):
            return torch.ones_like(x)

    stage = images(per)
    scores = stage.halts
    stage.units = nn.ModuleList(Ones() for _ in range(4))
    stage.halts = nn.ModuleList(Drawn(per, number) for number in range(len(scores)))
    with torch.no_grad():
        out, cost = stage.masked(torch.randn(5, 6, 8, 8))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-6, rtol=0)
    assert cost.shape == ((5, 1, 8, 8) if per == "position" else (5, 1, 1, 1))
    assert ((cost > 1) & (cost <= 5)).all()


class Drawn(nn.Module):
    """Scores at random."""

    def __init__(self, per, seed):
        super().__init__()
        self.per = per
        self.seed = seed

    def forward(self, x):
        space = x.shape[2:] if self.per == "position" else (1, 1)
        return torch.rand(len(x), 1, *space, generator=torch.Generator().manual_seed(self.seed))


class Counted(nn.Module):
    """A unit that writes down on how many rows it ran."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return x + 1.0


def test_who_has_halted_is_not_computed():
    class By(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.at = at

        def forward(self, x):
            return (x[:, :1].amax((2, 3), keepdim=True) >= self.at).float()

    stage = AdaptiveDepth([Counted() for _ in range(4)], 2, per="sample", dims=2).eval()
    stage.halts = nn.ModuleList(By(3.0) for _ in range(3))
    x = torch.tensor([0.0, 2.0, 1.0, 2.0]).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    with torch.no_grad():
        out = stage(x)
    assert [unit.rows for unit in stage.units] == [[4], [2], [1], []]
    assert out[:, 0, 0, 0].tolist() == [3, 3, 3, 3]


def test_the_gradient_of_the_cost_pulls_at_samples_too():
    stage = images("sample")
    costs = []
    with listening({"ponder": stage.ponder}, lambda _, cost: costs.append(cost)):
        stage(torch.randn(3, 6, 8, 8))
    costs[0].sum().backward()
    assert stage.halts[0].all.bias.grad.item() < 0


@pytest.mark.parametrize("per", ["position", "sample"])
def test_an_exported_graph_computes_all_units(per):
    stage = images(per, break_even=1.0, tile=2)
    x = torch.randn(5, 6, 8, 8)
    with torch.no_grad():
        graph = torch.export.export(stage, (x,)).module()
        torch.testing.assert_close(graph(x), stage(x), atol=1e-5, rtol=1e-5)


def test_where_tiles_pay_is_measured():
    stage = images("position", tile=2)
    found = stage.tuned(torch.randn(4, 6, 8, 8), repeats=1)
    assert [*found] == [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]
    paying = [share for share, relation in found.items() if relation < 1]
    assert stage.break_even == 0.0 or stage.break_even in paying
    assert images("sample").tuned(torch.randn(4, 6, 8, 8)) == {}
    with pytest.raises(BadNetwork, match="must be in eval mode"):
        images("position").train().tuned(torch.randn(4, 6, 8, 8))
    with pytest.raises(BadNetwork, match="must be residual units on images"):
        made([[0.1]]).sparse_over_dense(torch.randn(2, 2, 4), 0.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per": "row"}, "'position' or 'sample', got 'row'"),
        ({"eps": 0.0}, "eps"),
        ({"tile": 0}, "tile"),
        ({"bias": float("nan")}, "bias must be a number, got nan"),
        ({"bias": "low"}, "bias must be a number, got 'low'"),
    ],
)
def test_options_that_are_none(options, says):
    with pytest.raises(InvalidArgument, match=says):
        AdaptiveDepth([Plus(1.0), Plus(1.0)], 2, **options)
