"""Seeded rows of an input: the same for ever, and integers no larger than those that were seen."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.cutting import cut
from offramp.plan import Plan
from offramp.signature import Input
from small import moved, seeded

TOKENS = 12
ROWS = [[53, 9, 244], [87, 51, 124]]  # as the first version drew them


class Words(nn.Module):
    """Tokens [B, 5] of a small vocabulary and a mask [B, 5] -> logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(TOKENS, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = self.first((self.embed(tokens) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))
        return self.last(h.relu())


def sentences(count: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "tokens": torch.randint(0, TOKENS, (count, 5), generator=draw),
        "mask": torch.ones(count, 5, dtype=torch.int64),
    }


def test_a_vocabulary_of_fewer_tokens_than_a_byte_has(tmp_path):
    """Rows beyond the vocabulary would fail: at record, when a loaded network is exported, when a plan is opened."""
    model, x = seeded(Words, 0).eval(), sentences(40)
    net = moved(cut(model, {key: value[:4] for key, value in x.items()}, at=["first"], exits="linear"))
    off.save(net, tmp_path / "net")
    net = off.load(tmp_path / "net", model)
    trace = off.record(net, {key: value.numpy() for key, value in x.items()}, timed=False, progress=False)
    trace.save(tmp_path / "trace.npz")
    trace = off.Trace.load(tmp_path / "trace.npz")
    tokens, mask = (trace.header.origin.probe.batch()[name] for name in ("tokens", "mask"))
    assert (tokens.min() >= 0, tokens.max() < TOKENS, set(mask.ravel())) == (True, True, {1})
    assert len(np.unique(tokens)) > TOKENS / 2
    plan = Plan(
        thresholds={"first": (float(np.median(trace.columns["score/first"])) + 1e-3,)}, origin=trace.header.origin
    )
    assert off.run(off.load(tmp_path / "net", model), plan, x).exit.tolist() == trace.replay(plan).exit.tolist()


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("uint8", 0, 255), ("int8", -128, 127), ("int64", 5, 5), ("int64", -3, 9), ("int64", 0, 2**40), ("uint64", 7, 9)],
)
def test_integers_lie_where_those_seen_did(kind, low, high):
    made = Input.of("x", np.array([[low], [high]], kind))
    assert (made.low, made.high) == (low, high)
    rows = made.rows(4000, 0)
    assert (rows.dtype, rows.shape) == (kind, (4000, 1))
    assert int(rows.min()) >= low
    assert int(rows.max()) <= high
    if high - low < 300:
        assert len(np.unique(rows)) == high - low + 1
    assert Input.from_json(asdict(made)) == made


def test_rows_of_files_that_know_no_range_stay_what_they_were():
    old = Input.from_json({"name": "x", "shape": [3], "dtype": "uint8"})
    assert (old.low, old.high) == (None, None)
    assert old.rows(2, 0).tolist() == ROWS
    assert old.rows(2, 0).tolist() == Input("x", (3,), "uint8", 0, 254).rows(2, 0).tolist()
    assert Input.of("x", np.zeros((1, 2), np.float32)).low is None
    assert Input.of("x", np.zeros((0, 2), np.int64)).low is None
    assert set(Input.of("x", np.ones((1, 4), bool)).rows(20, 0).ravel()) == {False, True}


@pytest.mark.parametrize(
    "seen", [{"low": 3}, {"high": 3}, {"low": 4, "high": 3}, {"low": 0, "high": 256}, {"low": "a", "high": 3}]
)
def test_a_range_that_is_none(seen):
    with pytest.raises((TypeError, ValueError)):
        Input.from_json({"name": "x", "shape": [3], "dtype": "uint8"} | seen)
    with pytest.raises((TypeError, ValueError)):
        Input.from_json({"name": "x", "shape": [3], "dtype": "float32", "low": 0, "high": 1})
