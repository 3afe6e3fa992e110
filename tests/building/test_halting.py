"""Halting units on a trained model: what is copied, what stays, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.layers.adaptive_depth import depths, stages_of
from offramp.models.cifar_resnet import CifarResNet
from offramp.recipes.joint import Joint
from offramp.recipes.pondered import Pondered
from small import seeded

STAGES = ["layer1", "layer2", "layer3"]


def small(blocks=2):
    return seeded(lambda: CifarResNet(blocks), 0).eval()


@pytest.mark.parametrize("per", ["position", "sample"])
def test_the_units_and_everything_else_are_the_models(per):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adaptive = off.halting(model, STAGES, per=per, bias=-30.0)
    x = torch.randn(3, 3, 32, 32)
    assert [*stages_of(adaptive)] == STAGES
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.layer1) is nn.Sequential
    assert not adaptive.training
    with torch.no_grad():  # scores of 0: all the weight is the last unit's
        torch.testing.assert_close(adaptive(x), model(x), atol=1e-4, rtol=1e-4)
    theirs = {value.data_ptr() for value in model.parameters()}
    assert not theirs & {value.data_ptr() for value in adaptive.parameters()}


def test_a_stage_within_another_module():
    model = nn.Sequential(nn.Sequential(small().layer1, nn.ReLU())).eval()
    adaptive = off.halting(model, ["0.0"])
    assert [*stages_of(adaptive)] == ["0.0"]


def test_it_is_fine_tuned_by_the_recipe_and_runs_as_part_of_a_network():
    x = (
        torch.randint(
            0, 256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        ).float()
        / 128
    )
    y = torch.arange(24) % 10
    net = seeded(
        lambda: off.cut(
            off.halting(small(), STAGES, per="sample"), x[:2], at=["layer2"], exits="linear"
        ),
        1,
    )
    before = net.backbone.layer3.halts[0].all.bias.item()
    recipe = Pondered(Joint(epochs=2, rate=0.01), tau=1.0, ramp=0.5)
    off.fit(net, (x, y), recipe=recipe, batch_size=8, progress=False)
    assert net.backbone.layer3.halts[0].all.bias.item() > before
    fresh = x.flip(3)
    trace = off.record(net, (fresh, y), timed=False, progress=False)
    plan = off.calibrate(trace, budget=0.8)
    run = off.run(net, plan, fresh)
    replay = trace.replay(plan)
    assert run.exit.tolist() == replay.exit.tolist()


def test_positions_are_skipped_in_a_ladder_and_runs_are_replayed():
    x = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    model = small()
    options = {"bias": 0.5, "break_even": 1.0, "tile": 4}
    sact = seeded(lambda: off.halting(model, STAGES, **options), 2)
    with torch.no_grad():
        for stage in stages_of(sact).values():
            stage.halts[0].near.weight.mul_(20)
    shares = [float((cost > 2).float().mean()) for cost in depths(sact, x).values()]
    assert any(0 < share < 1 for share in shares)  # some positions halt after the first unit
    net = off.ladder({"small": sact, "large": model})
    trace = off.record(net, x, timed=False, progress=False)
    threshold = float(np.median(trace.columns["score/small"]))
    for plan in (off.Plan.by_hand({"small": threshold + 1e-3}), off.Plan.by_hand({"small": -1.0})):
        run = off.run(net, plan, x)
        replay = trace.replay(plan)
        assert run.exit.tolist() == replay.exit.tolist()
        assert run.logits.argmax(1).tolist() == replay.answer.tolist()


@pytest.mark.parametrize(
    ("stages", "kind", "says"),
    [
        ([], InvalidArgument, "names of stages"),
        (["layer1", "layer1"], InvalidArgument, "each once"),
        (["layer4"], UnknownName, "layer4"),
        (["conv1"], BadNetwork, "'conv1': adaptive depth must replace a Sequential"),
    ],
)
def test_stages_that_are_none(stages, kind, says):
    with pytest.raises(kind, match=says):
        off.halting(small(), stages)


def test_a_stage_within_a_stage_and_an_option_that_is_none():
    model = nn.Sequential(nn.Sequential(small().layer1, small().layer1)).eval()
    with pytest.raises(InvalidArgument, match=r"'0\.0' lies within '0'"):
        off.halting(model, ["0", "0.0"])
    with pytest.raises(InvalidArgument, match="options are width"):
        off.halting(small(), ["layer1"], depth=3)
