"""MSDNet: the cost of every exit as the authors' counter has it, and a small one cut, taught, run and replayed."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.exits.strided import strided, strided_wide
from offramp.factories import front_of, make_model
from offramp.models.msdnet import MSDNet, msdnet_even, msdnet_growing
from offramp.models.msdnet_imagenet import msdnet_imagenet
from offramp.recipes.boosted import Boosted
from offramp.recipes.joint import Joint
from small import seeded

# per configuration: MACs (M) up to each exit, earlier classifiers included, and the channels that each classifier reads
TABLE = {
    "even 7": "15.1 25.5 37.1 46.3 57.3 67.0 75.9 / 160 208 140 188 236 152 200",
    "even 10": "15.1 25.5 37.8 52.1 62.2 74.1 87.7 100.0 110.1 121.7 / 160 208 256 164 212 260 308 188 236 284",
    "even 6": "15.1 25.8 33.7 43.3 51.8 60.3 / 160 104 152 200 136 184",
    "growing 5": "6.9 14.4 27.5 41.7 58.5 / 88 136 104 200 208",
    "growing 7": "6.9 14.4 27.3 48.4 76.4 108.9 137.3 / 88 136 208 304 260 200 368",
    "growing 8": "6.9 14.4 27.3 48.4 81.6 112.6 152.9 192.7 / 88 136 208 304 236 380 308 500",
    "imagenet 4": "339.9 685.5 1008.2 1254.5 1360.5 / 384 384 352 304 560",
    "imagenet 6": "514.7 1171.2 1844.5 2501.4 2742.1 / 512 544 496 880 792",
    "imagenet 7": "615.7 1436.4 2283.2 2967.4 3253.8 / 576 640 608 528 976",
}
MADE = {"even": msdnet_even, "growing": msdnet_growing, "imagenet": msdnet_imagenet}


def counted(call) -> tuple[float, object]:
    """What the authors' counter gives for a call, and what the call gives.

    Convolutions without, linear layers with their biases, one for each value into a ReLU, k * k for each pooled value.
    """
    total = []

    def heard(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            total.append(output[0].numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            total.append(module.weight.numel() + module.bias.numel())
        elif isinstance(module, nn.ReLU):
            total.append(inputs[0][0].numel())
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            total.append(module.kernel_size**2 * output[0].numel())

    handle = nn.modules.module.register_module_forward_hook(heard)
    try:
        with torch.no_grad():
            return call(), sum(total) / 1e6
    finally:
        handle.remove()


@pytest.mark.parametrize("name", TABLE)
def test_every_exit_costs_what_the_table_says(name):
    kind, number = name.split()
    model, wide = MADE[kind](int(number)).eval(), kind == "imagenet"
    size = 224 if wide else 32
    scales, spent = counted(lambda: model.stem(torch.zeros(1, 3, size, size)))
    costs, widths = [], []
    for block in model.blocks:
        scales, more = counted(partial(block, scales))
        shape = scales[0].shape[1:]
        assert all(2 * one.shape[-1] == other.shape[-1] for one, other in pairwise(scales))
        classifier = (strided_wide if wide else strided)(shape, model.head[-1].out_features).eval().layers
        if block is model.blocks[-1]:
            classifier = model.head
        spent += more + counted(partial(classifier, scales[0]))[1]
        costs.append(f"{spent:.1f}")
        widths.append(str(shape[0]))
    assert f"{' '.join(costs)} / {' '.join(widths)}" == TABLE[name]


def colours(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 32, 32], and which of their three colours is the strongest."""
    y = torch.arange(count) % 3
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(count), y] += 1.0
    return x, y


def small_net():
    model = seeded(lambda: MSDNet([2, 1, 1], 3, channels=4, growth=4), 0).eval()
    return seeded(lambda: off.cut(model, colours(4)[0], at=model.cuts, exits="strided"), 0)


@pytest.mark.parametrize("recipe", [Joint(epochs=5, rate=3e-3), Boosted(epochs=5, rate=0.05)])
def test_cut_at_its_blocks_it_is_taught_run_and_replayed(recipe, tmp_path):
    net = small_net()
    assert net.chain.exits == ("blocks.0", "blocks.1", "backbone")
    off.fit(net, colours(60), recipe=recipe, batch_size=10, progress=False)
    x, y = colours(60, 1)
    with torch.no_grad():
        assert [(logits.argmax(1) == y).float().mean() > 0.6 for logits in net(x)] == [True] * 3
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    trace = off.record(again, (x, y), timed=False, progress=False)
    plan = off.Plan.by_hand({name: float(np.median(trace.columns[f"score/{name}"])) for name in trace.chain.gates})
    answers, replay = off.run(again, plan, x), trace.replay(plan)
    near = np.any([abs(trace.columns[f"score/{n}"] - t[0]) < 1e-4 for n, t in plan.thresholds.items()], axis=0)
    assert set(answers.exit.tolist()) == {0, 1, 2}
    assert near.mean() < 0.1
    assert (answers.exit.numpy() == replay.exit)[~near].all()
    assert (answers.logits.argmax(1).numpy() == replay.answer)[~near].all()


def test_a_tap_shows_the_coarsest_scale():
    net = small_net()
    seen = dict(net.look(colours(2)[0]))
    assert seen["blocks.0"].features.shape[2:] == (8, 8)


def test_the_shelf_makes_them_by_name():
    model = make_model("offramp:msdnet_growing")
    assert [len([*block.children()]) for block in model.blocks] == [1, 2, 4, 4, 6]  # two transitions among the layers
    assert front_of("offramp:msdnet_even").config()["expects"] == (32, 32)
    assert front_of("offramp:msdnet_imagenet").config()["expects"] == (224, 224)
