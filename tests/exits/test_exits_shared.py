"""An exit that is one of the model's own layers."""

from __future__ import annotations

import torch
from torch import nn

from offramp.exits.shared import Shared
from offramp.testing import check_exit, example_seen
from small import seeded


def test_it_answers_with_the_layer_itself():
    head = seeded(lambda: nn.Linear(6, 3), 0).eval()
    exit_ = Shared(head).eval()
    seen = example_seen(shape=(6,))
    check_exit(exit_, seen)
    assert torch.equal(exit_(seen), head(seen.features))
    assert exit_.head is head
    assert exit_.config() == {"name": "Shared"}
