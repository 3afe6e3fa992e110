"""Where a model can be cut, as an object: figures, plain data and a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork
from small import images_of, stages


def test_it_lists_what_cut_takes():
    model = stages()
    found = off.inspect(model, images_of(4))
    assert {"stem", "blocks.0"} <= set(found.legal)
    assert off.cut(model, images_of(4), at=found.legal[0]).topology.exits == (
        found.legal[0],
        "backbone",
    )
    assert found.batch == 4
    assert found.forward_ms > 0
    assert f"{len(found.legal)} legal cuts among {len(found.points)} modules" in str(found)


def test_its_json_and_its_table_say_the_same():
    found = off.inspect(stages(), images_of(4))
    body = json.loads(json.dumps(found.to_json()))
    assert [point["name"] for point in body["points"]] == [row[0] for row in found.rows()]
    for point, row in zip(body["points"], found.rows(), strict=True):
        assert point["legal"] == (not row[-1].startswith("no cut: "))


def test_a_model_that_mixes_rows_is_refused():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(x - x.mean(0))

    with pytest.raises(BadNetwork, match="mixes rows"):
        off.inspect(Mixes().eval(), torch.randn(4, 8))
