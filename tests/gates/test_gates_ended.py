"""What has ended gets a score above all others."""

from __future__ import annotations

import pytest
import torch

from offramp.building.factories import make_gate
from offramp.errors import InvalidArgument
from offramp.gates.ended import FAR, Ended
from offramp.networks.nodes import Seen
from offramp.plans.scores import ScoreRange
from offramp.testing import check_gate, example_seen

MASK = "x/attention_mask"


def test_scores_by_hand():
    own = torch.tensor([[2.0, 1.0], [5.0, 1.0], [1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    seen = Seen(torch.zeros(3, 2), {}, own, {MASK: mask})
    assert Ended(make_gate("margin"), MASK, 2).score(seen).tolist() == [FAR, 4.0, 0.0]
    assert Ended(make_gate("margin"), MASK, 3).score(seen).tolist() == [FAR, FAR, 0.0]
    assert Ended(make_gate("max_prob"), MASK, 2).score(seen)[0] == 2.0


@pytest.mark.parametrize("name", ["margin", "max_prob", "neg_entropy"])
def test_the_contract(name):
    gate = Ended(make_gate(name), MASK, 2)
    check_gate(gate, example_seen(reads=gate.reads, shape=(6,)), make_gate)


def test_ranges():
    assert Ended(make_gate("max_prob"), MASK, 2).score_range() == ScoreRange(0.0, 2.0, (1.0, 2.0))
    assert Ended(make_gate("margin"), MASK, 2).score_range() == ScoreRange(0.0, FAR, (FAR,))
    with pytest.raises(InvalidArgument, match="read must be at least 1"):
        Ended(make_gate("margin"), MASK, 0)
