"""What a recipe hangs on while it trains, and the step that its batches tell."""

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
    """Exits by cross-entropy on logits that a random linear layer, trained beside them, has
    mixed.
    """

    def __init__(self, steps=None):
        self.steps = steps

    def prepare(self, network):
        network.auxiliary = {"mix": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2))}

    def phases(self, network):
        exits = tuple(network.exits.parameters())
        return [
            Phase("both", (*exits, *network.auxiliary["mix"].parameters()), 2, reads="pooled"),
            Phase("exits", exits, 1, reads="pooled"),
        ]

    def loss(self, outputs, batch):
        mix = outputs.network.auxiliary["mix"]
        assert mix.training == (batch.phase == "both") == mix[0].weight.requires_grad
        if self.steps is not None:
            self.steps.append((batch.phase, batch.step, batch.steps, batch.done))
        return {
            n: nn.functional.cross_entropy(mix(v), batch.labels())
            for n, v in outputs.logits.items()
        }


def trained(**options):
    net = cut_of(trained=False)
    off.fit(net, (X, Y), recipe=Aided(), batch_size=16, progress=False, **options)
    return net


def test_auxiliary_are_seeded_and_never_stay(tmp_path):
    torch.manual_seed(1)
    net = trained(folder=tmp_path)
    torch.manual_seed(2)  # what others drew does not matter
    check_same(net, trained(), "two runs from the same seed")
    assert not torch.equal(
        net.exits["stem"].head[0].weight, trained(seed=1).exits["stem"].head[0].weight
    )
    assert net.auxiliary == {}
    assert not [key for key in net.state_dict() if "mix" in key]
    off.load(tmp_path / "checkpoint", net.backbone)  # a network like any other


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_auxiliary_come_back_from_a_checkpoint(tmp_path, steps):
    check_resumes(Aided, cut_of(trained=False), trained(), (X, Y), tmp_path, steps)


def test_auxiliary_are_taken_off_when_a_run_is_refused():
    net = cut_of(trained=False, exits="branch")
    with pytest.raises(BadNetwork, match="pooled once"):
        off.fit(net, (X, Y), recipe=Aided(), progress=False)
    assert net.auxiliary == {}


def test_a_batch_tells_its_step():
    recipe = Aided([])
    off.fit(cut_of(trained=False), (X, Y), recipe=recipe, batch_size=16, progress=False)
    both = [("both", step, 6, step / 6) for step in range(6)]
    assert recipe.steps == [*both, *(("exits", step, 3, step / 3) for step in range(3))]
