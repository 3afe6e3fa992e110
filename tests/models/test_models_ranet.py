"""RANet: the costs that are plotted for it, its fused blocks, and a small one cut, trained, run and
replayed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import offramp as off
from counter import colours, costs_of_exits
from offramp.building.factories import make_model, preprocess_of
from offramp.models.ranet import RANet, RanetBlock, RanetSizes, ranet, ranet_growing
from offramp.recipes.joint import Joint
from small import seeded

# million operations per exit, read off BoostNet's plots: those on ImageNet to three million or so
PLOTTED = [15.9, 31.4, 44.7, 50.4, 60.8, 63.8, 90.3, 95.0]
PLOTTED_LARGE = [438, 890, 1156, 1354, 2283, 2591, 3237, 3334]


def test_every_exit_costs_what_is_plotted():
    costs, _ = costs_of_exits(ranet().eval(), 32)
    assert costs == pytest.approx(PLOTTED, rel=0.01)
    large = RANet(
        1000, (1, 2, 3, 4), (4, 2, 2, 1), channels=64, growth=16, step=8, large=True
    ).eval()
    costs, widths = costs_of_exits(large, 224)
    assert costs == pytest.approx(PLOTTED_LARGE, rel=0.01)
    assert len(widths) == 8


def test_blocks_may_grow():
    model = ranet_growing()
    assert [[len(block.across) for block in flow] for flow in model.flows] == [
        [2, 4],
        [2, 4, 6, 8],
        [2, 4, 6, 8, 10, 12],
    ]
    assert model.cuts == ["flows.0.0", "flows.0.1", "flows.1.2", "flows.1.3", "flows.2.4"]
    assert {len(ranet().cuts), len(model.cuts)} == {7, 5}


def test_a_fused_block_reads_the_sub_network_before_at_its_own_place():
    sizes = RanetSizes(growth=8, factor=2, low_factor=4, compress=0.25)
    block = seeded(lambda: RanetBlock(6, 2, sizes, [5, 7, 9], halve=True, shrink=True), 0).eval()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 8, 8, generator=draw)
    low = [torch.randn(2, n, 4, 4, generator=draw) for n in (5, 7, 9)]

    def sized(value, size):
        return interpolate(value, size=(size, size), mode="bilinear", align_corners=True)

    first = torch.cat([x, sized(block.up[0](low[0]), 8), block.across[0](x)], 1)
    second = torch.cat([sized(first, 4), block.up[1](low[1]), block.across[1](first)], 1)
    want = block.shrink(torch.cat([second, block.last(low[2])], 1))
    got, found = block(x, tuple(low))
    torch.testing.assert_close(got, want)
    assert [tuple(one.shape[1:]) for one in found] == [(6, 8, 8), (14, 8, 8), (22, 4, 4)]
    assert got.shape[1] == block.width == (22 + math.floor(22 * 0.25)) // 2
    assert block.up[0][-2].num_features == 2  # a quarter of the new channels


@pytest.mark.slow
def test_cut_at_its_blocks_it_is_trained_run_and_replayed(tmp_path):
    made = {"channels": 4, "growth": 4, "blocks": 1, "more": 1, "step": 2}
    model = seeded(lambda: RANet(3, (1, 2), (2, 1), **made), 0).eval()
    assert model.cuts == ["flows.0.0"]
    net = seeded(lambda: off.cut(model, colours(4)[0], at=model.cuts, exits="strided"), 0)
    off.fit(net, colours(60), recipe=Joint(epochs=5, rate=5e-3), batch_size=10, progress=False)
    x, y = colours(60, 1)
    with torch.no_grad():
        assert [(logits.argmax(1) == y).float().mean() > 0.6 for logits in net(x)] == [True] * 2
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    trace = off.record(again, (x, y), timed=False, progress=False)
    scores = trace.columns["score/flows.0.0"]
    plan = off.Plan.by_hand({"flows.0.0": float(np.median(scores))})
    answers = off.run(again, plan, x)
    replay = trace.replay(plan)
    sure = abs(scores - plan.thresholds["flows.0.0"][0]) > 1e-4
    assert sure.mean() > 0.9
    assert set(answers.exit.tolist()) == {0, 1}
    assert (answers.exit.numpy() == replay.exit)[sure].all()
    assert (answers.logits.argmax(1).numpy() == replay.answer)[sure].all()


def test_the_shelf_makes_it_by_name():
    assert make_model("offramp:ranet").head[-1].out_features == 100
    assert preprocess_of("offramp:ranet").config() == preprocess_of("offramp:msdnet_even").config()
