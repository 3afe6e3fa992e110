"""MSDNet: the cost of every exit as the authors' counter has it, and a small one cut, trained, run
and replayed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from counter import colours, costs_of_exits
from offramp.building.factories import make_exit, make_model, preprocess_of
from offramp.models.msdnet import MSDNet, msdnet_even, msdnet_growing
from offramp.models.msdnet_imagenet import msdnet_imagenet
from offramp.models.ranet import ranet
from offramp.recipes.boosted import Boosted
from offramp.recipes.joint import Joint
from small import made_once, seeded

# per configuration: MACs (M) up to each exit, earlier classifiers included, and the channels that
# each classifier reads
TABLE = {
    "even 7": "15.1 25.5 37.1 46.3 57.3 67.0 75.9 / 160 208 140 188 236 152 200",
    "even 10": "15.1 25.5 37.8 52.1 62.2 74.1 87.7 100.0 110.1 121.7 / 160 208 256 164 212 260 "
    "308 188 236 284",
    "even 6": "15.1 25.8 33.7 43.3 51.8 60.3 / 160 104 152 200 136 184",
    "growing 5": "6.9 14.4 27.5 41.7 58.5 / 88 136 104 200 208",
    "growing 7": "6.9 14.4 27.3 48.4 76.4 108.9 137.3 / 88 136 208 304 260 200 368",
    "growing 8": "6.9 14.4 27.3 48.4 81.6 112.6 152.9 192.7 / 88 136 208 304 236 380 308 500",
    "imagenet 4": "339.9 685.5 1008.2 1254.5 1360.5 / 384 384 352 304 560",
    "imagenet 6": "514.7 1171.2 1844.5 2501.4 2742.1 / 512 544 496 880 792",
    "imagenet 7": "615.7 1436.4 2283.2 2967.4 3253.8 / 576 640 608 528 976",
}
MADE = {"even": msdnet_even, "growing": msdnet_growing, "imagenet": msdnet_imagenet}


@pytest.mark.parametrize("name", TABLE)
def test_every_exit_costs_what_the_table_says(name):
    kind, number = name.split()
    costs, widths = costs_of_exits(
        MADE[kind](int(number)).eval(), 224 if kind == "imagenet" else 32
    )
    assert (
        f"{' '.join(f'{cost:.1f}' for cost in costs)} / {' '.join(map(str, widths))}" == TABLE[name]
    )


@made_once
def small_net():
    model = seeded(lambda: MSDNet([2, 1, 1], 3, channels=4, growth=4), 0).eval()
    return seeded(lambda: off.cut(model, colours(4)[0], at=model.cuts, exits="strided"), 0)


@pytest.mark.parametrize(
    "recipe",
    [
        Joint(epochs=5, rate=3e-3),
        pytest.param(Boosted(epochs=5, rate=0.05), marks=pytest.mark.slow),
    ],
)
def test_cut_at_its_blocks_it_is_trained_run_and_replayed(recipe, tmp_path):
    net = small_net()
    assert net.topology.exits == ("blocks.0", "blocks.1", "backbone")
    off.fit(net, colours(60), recipe=recipe, batch_size=10, progress=False)
    x, y = colours(60, 1)
    with torch.no_grad():
        assert [(logits.argmax(1) == y).float().mean() > 0.6 for logits in net(x)] == [True] * 3
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    trace = off.record(again, (x, y), timed=False, progress=False)
    plan = off.Plan.by_hand(
        {name: float(np.median(trace.columns[f"score/{name}"])) for name in trace.topology.gates}
    )
    answers = off.run(again, plan, x)
    replay = trace.replay(plan)
    near = np.any(
        [abs(trace.columns[f"score/{n}"] - t[0]) < 1e-4 for n, t in plan.thresholds.items()], axis=0
    )
    assert set(answers.exit.tolist()) == {0, 1, 2}
    assert near.mean() < 0.1
    assert (answers.exit.numpy() == replay.exit)[~near].all()
    assert (answers.logits.argmax(1).numpy() == replay.answer)[~near].all()


def test_a_tap_shows_the_coarsest_scale():
    net = small_net()
    seen = dict(net.look(colours(2)[0]))
    assert [seen[name].features.shape[2:] for name in net.backbone.cuts] == [(8, 8), (8, 8)]


def test_the_shelf_makes_them_by_name():
    model = make_model("offramp:msdnet_growing")
    assert [len([*block.children()]) for block in model.blocks] == [
        1,
        2,
        4,
        4,
        6,
    ]  # two transitions among the layers
    assert preprocess_of("offramp:msdnet_even").config()["expects"] == (32, 32)
    assert preprocess_of("offramp:msdnet_imagenet").config()["expects"] == (224, 224)


def test_weights_start_by_torchs_own_rules_as_the_port_leaves_them():
    """Uniform within 1 / sqrt(fan_in) for convolutions, bias and all for the linear layer; He's
    rule in RANet.
    """
    net = seeded(lambda: msdnet_even(5), 0)
    convolutions = [part for part in net.modules() if isinstance(part, torch.nn.Conv2d)]
    for part in convolutions:
        assert part.weight.abs().max() <= part.weight[0].numel() ** -0.5
    assert net.head[-1].bias.any()
    exits = [
        seeded(lambda name=name: make_exit(name, (32, 8, 8), 5), 0)
        for name in ("strided", "strided?he=true")
    ]
    assert exits[0].layers[-1].bias.any()
    assert not exits[1].layers[-1].bias.any()
    assert exits[1].layers[3].weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    ranet_start = seeded(ranet, 0)
    convolution = next(part for part in ranet_start.modules() if isinstance(part, torch.nn.Conv2d))
    assert convolution.weight.abs().max() > convolution.weight[0].numel() ** -0.5
    assert not ranet_start.head[-1].bias.any()
