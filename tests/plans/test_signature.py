"""Seeded rows of an input: the same for ever, and integers no larger than those that were seen."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import cut
from offramp.plans.plan import Plan
from offramp.plans.signature import Input
from small import moved, seeded

TOKENS = 12
ROWS = [[53, 9, 244], [87, 51, 124]]  # as the first version drew them


class Words(nn.Module):
    """Tokens [B, 5] of a small vocabulary and a mask [B, 5] -> logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, 6)
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

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
    """Rows beyond the vocabulary would fail: at record, when a loaded network is exported, when a
    plan is opened.
    """
    model = seeded(Words, 0).eval()
    x = sentences(40)
    net = moved(
        cut(model, {key: value[:4] for key, value in x.items()}, at=["first"], exits="linear")
    )
    off.save(net, tmp_path / "net")
    net = off.load(tmp_path / "net", model)
    trace = off.record(
        net, {key: value.numpy() for key, value in x.items()}, timed=False, progress=False
    )
    trace.save(tmp_path / "trace.npz")
    trace = off.Trace.load(tmp_path / "trace.npz")
    tokens, mask = (trace.header.origin.probe.batch()[name] for name in ("tokens", "mask"))
    assert (tokens.min() >= 0, tokens.max() < TOKENS, set(mask.ravel())) == (True, True, {1})
    assert len(np.unique(tokens)) > TOKENS / 2
    plan = Plan(
        thresholds={"first": (float(np.median(trace.columns["score/first"])) + 1e-3,)},
        origin=trace.header.origin,
    )
    assert (
        off.run(off.load(tmp_path / "net", model), plan, x).exit.tolist()
        == trace.replay(plan).exit.tolist()
    )


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("uint8", 0, 255),
        ("int8", -128, 127),
        ("int64", 5, 5),
        ("int64", -3, 9),
        ("int64", 0, 2**40),
        ("uint64", 7, 9),
    ],
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


CATEGORIES = (7, 4, 300)


def columns(count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(0, size, (count,), generator=draw) for size in CATEGORIES], 1)


class Tables(nn.Module):
    """Categories [B, 3] of several tables -> logits [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, 4) for size in CATEGORIES)
        self.first = nn.Linear(12, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(
            self.first(torch.cat([table(x[:, i]) for i, table in enumerate(self.tables)], 1)).relu()
        )


class Roots(nn.Module):
    """Logarithms and roots of positive rows [B, 8], of which one column is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = torch.tensor([1.0] * 7 + [-1.0])
        return self.last(self.first((x * signs).log() + (x * signs).sqrt()).relu())


def spectra(count: int) -> torch.Tensor:
    rows = torch.rand(count, 8, generator=torch.Generator().manual_seed(0)) * 50 + 0.01
    rows[:, 7] *= -1
    return rows


@pytest.mark.parametrize(("kind", "rows"), [(Tables, columns), (Roots, spectra)])
def test_seeded_rows_are_like_those_that_were_seen_column_by_column(kind, rows, tmp_path):
    """Also after a network was saved and loaded, and in a plan that was."""
    model = seeded(kind, 0).eval()
    x = rows(80)
    whole = off.ladder({"small": seeded(kind, 1).eval(), "large": model}).eval()
    off.save(moved(cut(model, x[:3], at=["first"], exits="linear")), tmp_path / "net")
    for net, gate in ((whole, "small"), (off.load(tmp_path / "net", model), "first")):
        trace = off.record(net, x, timed=False, progress=False)
        assert trace.header.origin.probe.rows == (0, 1, 2, 3)
        plan = Plan.from_json(Plan(thresholds={gate: (0.5,)}, origin=trace.header.origin).to_json())
        assert off.open(net, plan)(x).exit.tolist() == trace.replay(plan).exit.tolist()
    loaded = off.load(tmp_path / "net", model)
    assert off.run(loaded, Plan.by_hand({"first": 0.0}), x).logits.isfinite().all()


def test_a_model_that_fails_on_drawn_rows_is_compared_on_recorded_ones():
    """Two columns of which one must be smaller: no range says so."""

    class Pointer(nn.Module):
        def forward(self, x):
            if (x[:, 0] >= x[:, 1]).any():
                raise IndexError("index out of range")
            return torch.nn.functional.one_hot(x[:, 0] % 3, 3).float() + 0.1 * x[:, 1:]

    x = torch.tensor([[low, low + 1 + gap] for low in range(9) for gap in range(3)])
    net = off.ladder([Pointer(), Pointer()]).eval()
    trace = off.record(net, x, timed=False, progress=False, keep_probe_rows=True)
    probe = trace.header.origin.probe
    assert (probe.rows, len(probe.recorded.digests), probe.classes) == ((), 16, 3)
    plan = Plan.from_json(
        Plan(thresholds={"member1": (0.5,)}, origin=trace.header.origin).to_json()
    )
    assert off.open(net, plan)(x).logits.shape == (27, 3)


@pytest.mark.parametrize(
    ("shape", "lows", "axis"),
    [
        ((5,), 5, None),
        ((3, 4), 12, None),
        ((3, 32, 32), 3, 0),
        ((200, 9), 9, 1),
        ((1, 28, 28), 1, 0),
        ((600,), 1, None),
    ],
)
def test_small_rows_have_a_range_for_each_value_and_large_ones_for_each_channel(shape, lows, axis):
    rows = np.random.default_rng(0).normal(size=(6, *shape)).astype(np.float32)
    made = Input.of("x", rows)
    assert (len(made.lows), made.axis) == (lows, axis)
    drawn = made.rows(50, 0)
    assert (drawn.shape, drawn.dtype) == ((50, *shape), np.float32)
    assert drawn.min() >= rows.min()
    assert drawn.max() <= rows.max()
    assert Input.from_json(asdict(made)) == made
    if lows > 1:
        others = (
            tuple(d for d in range(rows.ndim) if d != (0 if axis is None else axis + 1))
            if axis is not None
            else 0
        )
        assert (drawn.min(others) >= rows.min(others)).all()


def test_ranges_of_several_batches_are_put_together():
    one = Input.of("x", np.array([[1, 5]]))
    other = Input.of("x", np.array([[3, 2]]))
    both = one.widened(other)
    assert (both.lows, both.highs, both.low, both.high) == ((1, 2), (3, 5), 1, 5)
    longer = one.widened(Input.of("x", np.array([[0, 1, 9]])))  # a text of another length
    assert (longer.lows, longer.highs, longer.axis) == ((0,), (9,), None)


def test_one_row_says_little_of_a_range():
    alone = Input.of("x", np.array([[1.0, 4.0]], np.float32)).settled()
    assert (alone.lows, alone.highs) == ((1.0,), (4.0,))
    constant = Input.of("x", np.full((3, 2), -2, np.float32)).settled()
    assert (constant.lows, constant.highs) == ((-3.0,), (-1.0,))
    assert Input.of("x", np.zeros((3, 2), np.float32)).settled().lows is None
    assert Input.of("x", np.array([[2, 3]])).settled().lows == (2, 3)


def test_what_is_not_finite_has_no_range():
    made = Input.of("x", np.array([[np.nan, np.inf], [2.0, np.nan], [1.0, -np.inf]], np.float32))
    assert (made.lows, made.highs) == ((1.0, 0.0), (2.0, 0.0))


def test_rows_of_files_that_know_no_range_stay_what_they_were():
    old = Input.from_json({"name": "x", "shape": [3], "dtype": "uint8"})
    assert (old.low, old.high) == (None, None)
    assert old.rows(2, 0).tolist() == ROWS
    assert old.rows(2, 0).tolist() == Input("x", (3,), "uint8", 0, 254).rows(2, 0).tolist()
    assert Input.of("x", np.zeros((1, 2), np.float32)).low is None
    assert Input.of("x", np.zeros((0, 2), np.int64)).low is None
    assert set(Input.of("x", np.ones((1, 4), bool)).rows(20, 0).ravel()) == {False, True}


@pytest.mark.parametrize(
    "seen",
    [
        {"low": 3},
        {"high": 3},
        {"low": 4, "high": 3},
        {"low": 0, "high": 256},
        {"low": "a", "high": 3},
    ],
)
def test_a_range_that_is_none(seen):
    with pytest.raises((TypeError, ValueError)):
        Input.from_json({"name": "x", "shape": [3], "dtype": "uint8"} | seen)
    with pytest.raises((TypeError, ValueError)):
        Input.from_json({"name": "x", "shape": [3], "dtype": "float32", "low": 0, "high": 1})
