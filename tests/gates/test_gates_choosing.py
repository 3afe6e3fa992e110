"""Gates that rate ways: the controller and DRNet's predictor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.building.factories import make_gate
from offramp.errors import BadNetwork
from offramp.gates.controller import controller
from offramp.gates.predictor import Predictor, predictor
from offramp.networks.nodes import Seen, margins_of
from offramp.plans.plan import choose
from offramp.runtime.measuring import macs


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_thresholds_of_zero_take_the_best_way(ways):
    draw = torch.Generator().manual_seed(ways)
    ratings = torch.randint(-2, 3, (500, ways), generator=draw).float()  # with ties
    scores = margins_of(ratings).reshape(500, ways - 1)
    taken = choose(scores.numpy(), np.zeros(ways - 1, np.float32))
    assert taken.tolist() == ratings.argmax(1).tolist()


def test_the_predictor_has_the_size_of_the_paper():
    gate = Predictor(3).eval()
    images = Seen(torch.zeros(1, 3, 224, 224), {})
    assert sum(value.numel() for value in gate.parameters()) / 1e6 == pytest.approx(4.90, abs=0.01)
    assert macs(lambda: gate.score(images)) / 1e6 == pytest.approx(290, abs=1)


@pytest.mark.parametrize(
    "gate",
    [
        controller((5, 4, 4), 3, width=7),
        predictor((3, 9, 9), 2, width=4, side=0, stride=1),
    ],
)
def test_a_gate_is_made_again_from_its_configuration(gate):
    gate = gate.eval()
    again = make_gate(gate.config()).eval()
    again.load_state_dict(gate.state_dict())
    seen = Seen(
        torch.rand(6, 5, 4, 4) if gate.config()["name"] == "Controller" else torch.rand(6, 3, 9, 9),
        {},
    )
    assert torch.equal(gate.score(seen), again.score(seen))
    assert gate.score(seen).shape == ((6, 2) if gate.config()["name"] == "Controller" else (6,))


def test_other_features_are_refused():
    with pytest.raises(BadNetwork, match=r"must be images \[C, H, W\] .*, got rows of shape \[7\]"):
        predictor((7,), 2)
    with pytest.raises(BadNetwork, match="one number a row"):
        controller((), 2)
    with pytest.raises(BadNetwork, match=r"images must be \[B, 3, H, W\] .*got \[2, 1, 8, 8\]"):
        Predictor(2).eval().score(Seen(torch.zeros(2, 1, 8, 8), {}))
