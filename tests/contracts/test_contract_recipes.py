"""Every recipe on the shelf keeps the contract, and the kit notices those that do not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from offramp import find
from offramp.calibration.calibrating import calibrate
from offramp.checks import check_recipe
from offramp.errors import BadNetwork
from offramp.fitting.teaching import fit, recipe_of
from offramp.plan import Plan
from offramp.recipe import Phase, Recipe
from offramp.recording import record
from offramp.running import run
from offramp.storing import load, save
from small import cut_of, images_of, ladder_of, seeded

RECIPES = sorted(file.stem for file in (find.HOUSE / "recipes").glob("*.py") if not file.stem.startswith("_"))
FEW = {
    "joint": {"epochs": 6, "rate": 1e-2},
    "sdn": {"epochs": 6, "rate": 1e-2},
    "ztw": {"epochs": 6, "rate": 1e-2, "ensembles": 3},
    "distill": {"epochs": 6, "rate": 1e-2},
    "patience": {"epochs": 6, "rate": 1e-2},
    "objective": {"warm": 3, "epochs": 4, "every": 2},
}
CUT = {"ztw": {"exits": "cascade"}, "objective": {"gate": "uncertainty"}, "sdn": {"exits": "sdn"}}
ONCE = {"epochs": 1}
BRIEF = dict.fromkeys(("joint", "sdn", "ztw", "distill", "patience", "objective"), ONCE)
X = images_of(72)
Y = (X.mean((1, 2, 3)) > 0).long()


def untaught(**options):
    return seeded(lambda: cut_of(taught=False, **options), 0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shelf(name, tmp_path):
    check_recipe(lambda: recipe_of(name, **FEW.get(name, {})), lambda: untaught(**CUT.get(name, {})), (X, Y), tmp_path)


OTHER = {
    "sdn": {"backbone": True, "epochs": 12, "rate": 3e-2},
    "ztw": {"epochs": 8, "rate": 1e-2, "ensembles": 3},
    "distill": {"backbone": False, "epochs": 6, "rate": 1e-2},
}
OTHER_CUT = {"ztw": {"exits": "cascade_conv"}, "sdn": {"exits": "linear"}}


@pytest.mark.parametrize("name", OTHER)
def test_the_other_way_of_a_recipe(name, tmp_path):
    check_recipe(lambda: recipe_of(name, **OTHER[name]), lambda: untaught(**OTHER_CUT.get(name, {})), (X, Y), tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_taught_runs_as_it_replays_from_disk(name, tmp_path):
    net = untaught(**CUT.get(name, {}))
    fit(net, (X, Y), recipe=recipe_of(name, **FEW.get(name, {}) | BRIEF.get(name, {})), batch_size=36, progress=False)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", net.backbone)
    assert again.fingerprint() == net.fingerprint()
    x = images_of(80, 5)
    trace = record(again, (x, (x.mean((1, 2, 3)) > 0).long()), timed=False, progress=False)
    middle = {gate: float(np.median(trace.columns[f"score/{gate}"])) + 1e-3 for gate in net.chain.gates}
    for plan in (calibrate(trace, budget=0.9), Plan.by_hand(middle)):
        replayed, answers = trace.replay(plan), run(again, plan, x)
        assert (answers.exit.numpy() == replayed.exit).all()
        assert (answers.logits.argmax(1).numpy() == replayed.answer).all()
    assert len(set(replayed.exit.tolist())) > 1


@pytest.mark.parametrize("name", RECIPES)
def test_it_refuses_a_network_without_anything_to_teach(name):
    net = ladder_of(2)
    with pytest.raises(BadNetwork, match="parameters"):
        recipe_of(name, **({"backbone": False} if name == "joint" else {})).prepare(net)


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

    def loss(self, view, lesson):
        if self.wrong == "touches":
            self.hidden.data.add_(1)
        if self.wrong == "draws":
            return {n: nn.functional.cross_entropy(v * DRAW.random(), lesson.labels()) for n, v in view.logits.items()}
        way = -1 if self.wrong == "uphill" else 1
        return {name: way * nn.functional.cross_entropy(value, lesson.labels()) for name, value in view.logits.items()}


DRAW = random.Random(0)


def test_the_kit_passes_a_plain_recipe(tmp_path):
    check_recipe(Plain, untaught, (X, Y), tmp_path)


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
        check_recipe(lambda: Plain(wrong), untaught, (X, Y), tmp_path)
