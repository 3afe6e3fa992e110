"""What a recipe hangs on while it teaches, and the step that its lessons tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork
from offramp.networks.recipe import Phase, Recipe
from offramp.testing import check_resumes, check_same
from small import cut_of, images_of

X = images_of(48)
Y = (X.mean((1, 2, 3)) > 0).long()


class Aided(Recipe):
    """Exits by cross-entropy on logits that a random linear layer, taught beside them, has mixed."""

    def __init__(self, steps=None):
        self.steps = steps

    def prepare(self, network):
        network.aids = {"mix": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2))}

    def phases(self, network):
        exits = tuple(network.exits.parameters())
        return [
            Phase("both", (*exits, *network.aids["mix"].parameters()), 2, reads="pooled"),
            Phase("exits", exits, 1, reads="pooled"),
        ]

    def loss(self, view, lesson):
        mix = view.network.aids["mix"]
        assert mix.training == (lesson.phase == "both") == mix[0].weight.requires_grad
        if self.steps is not None:
            self.steps.append((lesson.phase, lesson.step, lesson.steps, lesson.done))
        return {n: nn.functional.cross_entropy(mix(v), lesson.labels()) for n, v in view.logits.items()}


def taught(**options):
    net = cut_of(taught=False)
    off.fit(net, (X, Y), recipe=Aided(), batch_size=16, progress=False, **options)
    return net


def test_aids_are_seeded_and_never_stay(tmp_path):
    torch.manual_seed(1)
    net = taught(folder=tmp_path)
    torch.manual_seed(2)  # what others drew does not matter
    check_same(net, taught(), "two runs from the same seed")
    assert not torch.equal(net.exits["stem"].head[0].weight, taught(seed=1).exits["stem"].head[0].weight)
    assert net.aids == {}
    assert not [key for key in net.state_dict() if "mix" in key]
    off.load(tmp_path / "checkpoint", net.backbone)  # a network like any other


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_aids_come_back_from_a_checkpoint(tmp_path, steps):
    check_resumes(Aided, cut_of(taught=False), taught(), (X, Y), tmp_path, steps)


def test_aids_are_taken_off_when_a_run_is_refused():
    net = cut_of(taught=False, exits="branch")
    with pytest.raises(BadNetwork, match="pooled once"):
        off.fit(net, (X, Y), recipe=Aided(), progress=False)
    assert net.aids == {}


def test_a_lesson_tells_its_step():
    recipe = Aided([])
    off.fit(cut_of(taught=False), (X, Y), recipe=recipe, batch_size=16, progress=False)
    both = [("both", step, 6, step / 6) for step in range(6)]
    assert recipe.steps == [*both, *(("exits", step, 3, step / 3) for step in range(3))]
