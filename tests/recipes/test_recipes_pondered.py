"""A price on depth: its gradient, what it does to depth, and what is refused."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.adaptive_depth import depths
from offramp.models.signal_resnet import SignalResNet
from offramp.networks.recipe import TrainingBatch
from offramp.networks.taps import listening
from offramp.recipes.distill import Distill
from offramp.recipes.pondered import Pondered, priced
from small import cut_of, seeded

X = torch.randn(96, 1, 48, generator=torch.Generator().manual_seed(3))
Y = (X[:, 0, :24].std(1) > X[:, 0, 24:].std(1)).long()


def made(bias=0.0):
    model = seeded(lambda: SignalResNet((3, 3), (4, 6), classes=2, adaptive=True), 0).eval()
    with torch.no_grad():
        for stage in (model.stage1, model.stage2):
            for halt in stage.halts:
                halt.near.bias.fill_(bias)
    return model


def test_the_gradient_is_that_of_the_sum():
    model = made()
    stages = ("stage1", "stage2")
    values = [*model.parameters()]
    costs = []
    with listening(
        {name: model.get_submodule(name).ponder for name in stages},
        lambda _, cost: costs.append(cost),
    ):
        y = model(X[:8])
    assert sum(cost.mean() for cost in costs) > 2
    want = torch.autograd.grad(
        y.square().sum() + 0.3 * sum(cost.mean() for cost in costs), values, allow_unused=True
    )
    with priced(model, 0.3):
        again = model(X[:8])
    assert torch.equal(again, y)
    got = torch.autograd.grad(again.square().sum(), values, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    assert not any(part._forward_hooks for part in model.modules())
    with priced(model, 0.3), torch.no_grad():
        assert torch.equal(model(X[:8]), y)


def test_processes_that_share_a_batch_share_the_price():
    model = made()
    values = [*model.stage1.halts.parameters()]
    with priced(model, 0.3):
        whole = torch.autograd.grad(model(X[:8]).square().mean(), values)
    halves = []
    for rows in (X[:4], X[4:8]):
        with priced(model, 0.3, [0.5]):
            halves.append(torch.autograd.grad(0.5 * model(rows).square().mean(), values))
    for one, two, both in zip(*halves, whole, strict=True):
        torch.testing.assert_close(one + two, both, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_the_dearer_the_shallower():
    mean = {}
    for tau in (0.0, 4.0):
        trained = seeded(lambda: off.cut(made(-1.0), X[:4], at=["stage1"], exits="linear_peaks"), 0)
        recipe = Pondered(Distill(hints=0.0, epochs=2, rate=0.05), tau=tau)
        off.fit(trained, (X, Y), recipe=recipe, batch_size=16, progress=False)
        found = depths(trained.backbone, X)
        mean[tau] = sum(value.mean().item() for value in found.values())
    assert mean[4.0] < mean[0.0] - 0.4


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match="tau must be at least 0, got -1"):
        Pondered(tau=-1).prepare(cut_of())
    with pytest.raises(InvalidArgument, match="epochs and rate must be given to the inner recipe"):
        Pondered(Distill(), epochs=2).prepare(cut_of())
    with pytest.raises(BadNetwork, match="adaptive depth"):
        Pondered().prepare(cut_of())
    with pytest.raises(BadNetwork, match="backbone=True"):
        Pondered(Distill(backbone=False)).phases(cut_of())
    assert (
        Pondered(epochs=3).config()["inner"].items()
        >= {"hints": 0, "epochs": 3, "rate": None}.items()
    )
    assert Pondered(Distill(alpha=0.5)).config() != Pondered().config()


def test_the_price_rises():
    recipe = Pondered(ramp=0.5)
    shares = [
        recipe._price_share(TrainingBatch(None, torch.zeros(1), "phase", step, 8))
        for step in (0, 2, 4, 6)
    ]
    assert shares == [0.0, 0.5, 1.0, 1.0]
    assert Pondered()._price_share(TrainingBatch(None, torch.zeros(1), "phase", 0, 8)) == 1.0
    assert "ramp" not in Pondered().config()  # a checkpoint of before goes on
    assert recipe.config()["ramp"] == 0.5
    with pytest.raises(InvalidArgument, match="ramp must be between 0 and 1, got 2"):
        Pondered(ramp=2).prepare(cut_of())
