"""Every recipe on the shelf keeps the contract, and the kit notices those that do not."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp._support import find
from offramp.errors import BadNetwork
from offramp.fitting.training import recipe_of
from offramp.models.signal_resnet import SignalResNet
from offramp.networks.recipe import Phase, Recipe
from offramp.recipes.distill import Distill
from offramp.testing import check_recipe
from small import cut_of, images_of, ladder_of, made_once, seeded, stages

RECIPES = sorted(
    file.stem for file in (find.HOUSE / "recipes").glob("*.py") if not file.stem.startswith("_")
)
SLOW = ("d2nn", "gumbel", "pondered", "wae")  # drnet and random_ways train the same forks
FEW = {
    "boosted": {"epochs": 6, "rate": 0.02},
    "cascaded": {"epochs": 8, "rate": 1e-2},
    "decorrelated": {"epochs": 6, "rate": 1e-2},
    "imta": {"epochs": 4, "together": 4, "rate": 0.05},
    "joint": {"epochs": 6, "rate": 1e-2, "equilibrium": True},
    "weighted": {"epochs": 6, "rate": 0.05, "hidden": 20},
    "sdn": {"epochs": 6, "rate": 1e-2},
    "ztw": {"epochs": 6, "rate": 1e-2, "ensembles": 3},
    "distill": {"epochs": 6, "rate": 1e-2},
    "imitated": {"epochs": 8, "rate": 1.0},
    "synergy": {"epochs": 4, "rate": 2e-2},
    "patience": {"epochs": 6, "rate": 1e-2},
    "pondered": {"inner": Distill(hints=0.0, epochs=4, rate=0.1)},
    "wae": {"images": 1, "classes": 6, "joint": 1, "rate": 0.05, "anchor": 1.0},
    "objective": {"warm": 3, "epochs": 4, "every": 2},
    "d2nn": {"warm": 10, "epochs": 6, "rate": 2e-2, "gate_rate": 1e-2},
    "drnet": {"first": 10, "epochs": 4, "rate": 2e-2, "second_rate": 1e-2},
    "random_ways": {"epochs": 8, "rate": 2e-2},
    "gumbel": {"warm": 10, "epochs": 6, "rate": 2e-2, "gate_rate": 1e-2, "eta": 0.1},
}
ROUTED = ("gumbel", "d2nn", "drnet", "random_ways")
ALONG_CHAINS = [name for name in RECIPES if name not in ROUTED]


@functools.cache
def original():
    """What `recover` recovers from: the model of the tests, trained on the rows below."""
    x = images_of(72)
    y = (images_of(72).mean((1, 2, 3)) > 0).long()
    model = stages()
    steps = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        steps.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(x), y).backward()
        steps.step()
    return model.eval()


def few_of(name):
    """The arguments with which a recipe learns the toy set in few epochs."""
    if name == "recover":
        return {"original": original(), "epochs": 8, "rate": 1e-2}
    if name == "consecutive":
        return {"teachers": [original()], "epochs": 12, "rate": 1e-2, "decay": 0.0}
    return FEW.get(name, {})


CUT = {
    "ztw": {"exits": "cascade"},
    "objective": {"gate": "uncertainty"},
    "sdn": {"exits": "sdn"},
    "synergy": {"exits": "selective"},
}
X = images_of(72)
Y = (X.mean((1, 2, 3)) > 0).long()


def untrained(**options):
    return seeded(lambda: cut_of(trained=False, **options), 0)


@made_once
def signal_net():
    """A network whose stages have adaptive depth, on the rows of images one after the other."""
    x = X[:4].flatten(2)
    model = seeded(lambda: SignalResNet((2,), (4,), classes=3, adaptive=True), 0).eval()
    return seeded(lambda: off.cut(model, x, at=["stem", "stage1"], exits="linear_peaks"), 0)


def halved():
    """Two convolutions, global pooling and a linear layer."""
    wide = nn.Conv2d(64, 64, 3, padding=1)
    layers = nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), wide, nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3))


@made_once
def halved_net():
    """A WAE cut at its head A; its high branch is as wide as the other one."""
    model = seeded(lambda: off.wae(halved().eval(), X[:2], thin=1), 0)
    return off.cut(model, X[:4], at=model.cuts, exits="own")


@made_once
def routed_net():
    """Two models behind each other with exits between, as `route` makes them, and a fork."""

    def made():
        steps = [
            ("stem", nn.Conv2d(1, 4, 3, padding=1).eval()),
            off.Leave("early", "linear", "controller"),
            off.Fork("way", {"skip": [], "unit": nn.Conv2d(4, 4, 3, padding=1).eval()}),
            off.Leave("late", "linear", "controller"),
            ("head", nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 3)).eval()),
        ]
        return off.route(steps, example=X[:4])

    return seeded(made, 0)


def net_of(name):
    if name in ROUTED:
        return routed_net()
    if name == "wae":
        return halved_net()
    return signal_net() if name == "pondered" else untrained(**CUT.get(name, {}))


def rows_for(name, x=X):
    """Rows that the network of a recipe takes, with labels: for imitation what its last exit
    answers.
    """
    y = (x.mean((1, 2, 3)) > 0).long()
    if name == "pondered":  # the model takes the mean away
        return x.flatten(2), (x[:, 0, :4].std((1, 2)) > x[:, 0, 4:].std((1, 2))).long()
    return x, untrained()(x)[-1].argmax(1) if name == "imitated" else y


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES]
)
def test_the_shelf(name, tmp_path):
    check_recipe(
        lambda: recipe_of(name, **few_of(name)), lambda: net_of(name), rows_for(name), tmp_path
    )


OTHER = {
    "sdn": {"backbone": True, "epochs": 12, "rate": 3e-2},
    "ztw": {"epochs": 8, "rate": 1e-2, "ensembles": 3},
    "distill": {"backbone": False, "epochs": 6, "rate": 1e-2},
    "synergy": {"backbone": False, "epochs": 4, "rate": 2e-2},
    "joint": {"keep": 0.5, "epochs": 6, "rate": 1e-2},
}
OTHER_CUT = {
    "ztw": {"exits": "cascade_conv"},
    "sdn": {"exits": "linear"},
    "synergy": {"exits": "selective"},
}


@pytest.mark.parametrize(
    "name", ["sdn", "ztw", "distill", "joint", pytest.param("synergy", marks=pytest.mark.slow)]
)
def test_the_other_way_of_a_recipe(name, tmp_path):
    check_recipe(
        lambda: recipe_of(name, **OTHER[name]),
        lambda: untrained(**OTHER_CUT.get(name, {})),
        (X, Y),
        tmp_path,
    )


@pytest.mark.parametrize("name", ALONG_CHAINS)
def test_it_refuses_a_network_without_anything_to_train(name):
    net = ladder_of(2)
    with pytest.raises(BadNetwork, match="parameters"):
        recipe_of(name, **({"backbone": False} if name == "joint" else {})).prepare(net)


# tests/runtime/test_routes.py has networks with forks
@pytest.mark.parametrize("name", ALONG_CHAINS)
def test_what_it_trained_is_a_network_like_any_other(name, tmp_path):
    few = {**few_of(name), **({"epochs": 1} if "epochs" in few_of(name) else {})}
    net = net_of(name)
    off.fit(net, rows_for(name), recipe=recipe_of(name, **few), batch_size=36, progress=False)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    x, y = rows_for(name, images_of(200, 5))
    trace = off.record(again, (x, y), timed=False, progress=False)
    halves = {
        name: float(np.quantile(trace.columns[f"score/{name}"], 0.5))
        for name in trace.topology.gates
    }
    assert len(set(off.run(again, off.Plan.by_hand(halves), x).exit.tolist())) == len(
        net.topology.exits
    )
    for plan in (off.calibrate(trace, budget=0.9), off.Plan.by_hand(halves)):
        replay = trace.replay(plan)
        answers = off.run(again, plan, x)
        near = [
            abs(trace.columns[f"score/{gate}"] - some[0]) < 1e-4
            for gate, some in plan.thresholds.items()
        ]
        sure = ~np.any(near, axis=0)
        assert sure.mean() > 0.9
        assert (answers.exit.numpy() == replay.exit)[sure].all()
        assert (answers.logits.argmax(1).numpy() == replay.answer)[sure].all()


class Plain(Recipe):
    """Exits from pooled features by cross-entropy, with one thing wrong."""

    def __init__(self, wrong=""):
        self.wrong = wrong

    def phases(self, network):
        exits = [name for name in network.exits if self.wrong != "one exit" or name != "stem"]
        values = tuple(value for name in exits for value in network.exits[name].parameters())
        return [Phase("exits", values, 3, lambda some: torch.optim.SGD(some, 0.1), reads="pooled")]

    def prepare(self, network):
        if self.wrong == "touches":
            self.hidden = network.backbone.head.bias

    def loss(self, outputs, batch):
        if self.wrong == "touches":
            self.hidden.data.add_(1)
        if self.wrong == "draws":
            return {
                n: nn.functional.cross_entropy(v * DRAW.random(), batch.labels())
                for n, v in outputs.logits.items()
            }
        way = -1 if self.wrong == "uphill" else 1
        return {
            name: way * nn.functional.cross_entropy(value, batch.labels())
            for name, value in outputs.logits.items()
        }


DRAW = random.Random(0)


def test_the_kit_passes_a_plain_recipe(tmp_path):
    check_recipe(Plain, untrained, (X, Y), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("one exit", "left .*stem"),
        ("uphill", "right before and"),
        ("touches", "'backbone.head.bias' changed"),
        ("draws", "two runs from the same seed differ"),
    ],
)
def test_the_kit_notices(wrong, says, tmp_path):
    with pytest.raises(AssertionError, match=says):
        check_recipe(lambda: Plain(wrong), untrained, (X, Y), tmp_path)
