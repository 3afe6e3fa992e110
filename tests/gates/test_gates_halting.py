"""The sum of halting scores as a gate."""

from __future__ import annotations

import torch

from offramp.gates.halting import Halting
from offramp.networks.nodes import Seen
from offramp.plans.scores import ScoreRange


def test_the_score_is_the_sum_so_far_and_the_latest_one():
    rows = torch.tensor([[9.0, 9.0, 0.25, 0.5], [9.0, 9.0, 0.0, 0.125]])
    gate = Halting(2)
    assert gate.score(Seen(rows, {})).tolist() == [0.75, 0.125]
    assert gate.score_range() == ScoreRange(0.0, 2.0)
    assert (
        Halting(**{key: value for key, value in gate.config().items() if key != "name"}).config()
        == gate.config()
    )
