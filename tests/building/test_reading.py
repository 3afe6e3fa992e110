"""Sequences read chunk by chunk: who is read how far, texts of different lengths, replay, files,
and refusals.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.gates.ended import FAR
from offramp.plans.plan import Plan
from offramp.runtime.measuring import macs
from small import made_once, seeded

WORDS = 40
WIDTH = 8
T = 12
CHUNK = 4
GATES = ("chunks.0", "chunks.1")


class Cell(nn.Module):
    """A recurrent reader, word by word."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, state, chunk, mask):
        h = self.words(chunk)
        for index in range(chunk.shape[1]):
            state = torch.where(
                mask[:, index : index + 1] != 0, self.cell(h[:, index], state), state
            )
        return state


class Fused(nn.Module):
    """The same with torch's own loop."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, state, chunk, mask):
        states, _ = self.cell(self.words(chunk), state[None].contiguous())
        count = (mask != 0).sum(1)
        last = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, WIDTH)
        return torch.where(count[:, None] > 0, states.gather(1, last)[:, 0], state)


class Causal(nn.Module):
    """A causal model: each chunk looks at the words before it, which are its state [B, T, F]."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.looks = nn.Linear(WIDTH, WIDTH)

    def forward(self, state, chunk, mask):
        h = self.words(chunk) * (mask != 0)[:, :, None]
        h = h + self.looks(state.sum(1, keepdim=True)) * (mask != 0)[:, :, None]
        return (
            torch.cat([state[:, CHUNK:], h], 1) * (mask != 0).any(1)[:, None, None]
            + state * ((mask == 0).all(1)[:, None, None])
        )


def texts(rows=120, seed=0):
    """Texts of 4 to 12 words, and their masks."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, T + 1, (rows,), generator=draw)
    mask = (torch.arange(T) < lengths[:, None]).long()
    words = torch.randint(2, WORDS, (rows, T), generator=draw) * mask
    return {"input_ids": words, "attention_mask": mask}


@made_once
def along(kind=Cell, gate="margin", exits=None):
    x = {name: value[:4] for name, value in texts().items()}
    state = (CHUNK * 2, WIDTH) if kind is Causal else WIDTH

    def make():
        head = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(state)), 3)).eval()
        reader = kind().eval()
        return off.along_time(
            reader, head, x, state=state, chunk=CHUNK, mask="attention_mask", gate=gate, exits=exits
        )

    return seeded(make, 0)


def by_hand(net, x):
    """The answers of the model, called as it is."""
    with torch.no_grad():
        return net.backbone(**x)


@pytest.mark.parametrize("kind", [Cell, Fused, Causal])
def test_only_what_has_ended_leaves_and_answers_as_in_the_end(kind):
    net = along(kind)
    x = texts()
    plan = off.Plan.by_hand(dict.fromkeys(GATES, FAR))
    y = off.run(net, plan, x)
    chunks = -(-x["attention_mask"].sum(1) // CHUNK)
    assert y.exit.tolist() == (chunks - 1).tolist()
    torch.testing.assert_close(y.logits, by_hand(net, x), atol=1e-5, rtol=1e-5)


def test_the_state_is_that_of_a_loop_over_words():
    net = along(Cell)
    x = texts(7)
    reader = net.backbone.reader
    head = net.backbone.head
    for row in range(7):
        state = torch.zeros(1, WIDTH)
        for word in x["input_ids"][row, : int(x["attention_mask"][row].sum())]:
            state = reader.cell(reader.words(word[None]), state)
        torch.testing.assert_close(by_hand(net, x)[row], head(state)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["margin", "max_prob"])
def test_it_is_trained_recorded_certified_and_replayed(gate):
    net = along(Fused, gate)
    x = texts()
    fresh = texts(300, seed=1)
    y = x["input_ids"].sum(1) % 3
    before = net.backbone.reader.words.weight.clone()
    off.fit(net, (x, y), recipe="joint?epochs=1", batch_size=32, progress=False)
    assert not torch.equal(net.backbone.reader.words.weight, before)
    assert torch.equal(net.exits["chunks.0"].head[1].weight, net.backbone.head[1].weight)
    trace = off.record(net, (fresh, fresh["input_ids"].sum(1) % 3), timed=False, progress=False)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.2)
    assert plan.promise is not None
    for some in (plan, off.calibrate(trace, budget=0.6), Plan.by_hand(dict.fromkeys(GATES, 0.6))):
        run = off.run(net, some, fresh)
        replay = trace.replay(some)
        assert run.exit.tolist() == replay.exit.tolist()
        assert run.logits.argmax(1).tolist() == replay.answer.tolist()
    assert len(set(replay.exit.tolist())) == 3


def test_a_sure_sample_is_read_no_further():
    net = along(Causal)
    x = texts()
    early = off.open(net, off.Plan.by_hand({"chunks.0": -1.0}))
    never = off.open(net, off.Plan.never_leave(net.topology))
    chunk = WIDTH * WIDTH  # `looks`, for a row
    head = 2 * CHUNK * WIDTH * 3  # three classes, from the state [2 CHUNK, WIDTH]
    assert macs(lambda: early(x)) == 120 * (chunk + head)
    assert macs(lambda: never(x)) == 120 * (3 * chunk + head)


def test_it_is_exported_saved_and_loaded(tmp_path):
    net = along(Causal)  # a loop over words takes several times as long to export
    x = texts(40)
    trace = off.record(net, x, timed=False, progress=False)
    plan = off.calibrate(trace, risk="disagreement", at_most=0.5, confidence=0.8)
    off.export(net, plan, tmp_path / "folder")
    assert (tmp_path / "folder" / "run.py").exists()
    off.save(net, tmp_path / "net")
    other = along(Causal)
    with torch.no_grad():
        other.backbone.head[1].bias.add_(1.0)
    again = off.load(
        tmp_path / "net", other.backbone, exits={name: other.exit_of(name) for name in GATES}
    )
    assert again.fingerprint() == net.fingerprint()


def test_sequences_without_a_mask():
    class Sums(nn.Module):
        def forward(self, state, chunk, mask):
            return state + (chunk * mask[:, :, None]).sum(1)

    x = torch.randn(5, 6, 3)
    net = off.along_time(Sums().eval(), nn.Linear(3, 2).eval(), x, state=3, chunk=2)
    with torch.no_grad():
        want = net.backbone.head(x.sum(1))
    torch.testing.assert_close(net.backbone(x), want)
    assert net.topology.exits == ("chunks.0", "chunks.1", "backbone")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk": 5}, "got 5 for sequences of length 12"),
        ({"chunk": 12}, "at least two parts"),
        ({"chunk": 0}, "chunk must be a whole number of at least 1, got 0"),
        ({"chunk": "4"}, "chunk must be a whole number of at least 1, got '4'"),
        ({"mask": None}, "mask must name one of the inputs"),
        ({"mask": "masks"}, "got 'masks'"),
        ({"mask": 3}, "mask must be the name of an input, got 3"),
        ({"state": 0}, "state must be a whole number of at least 1, got 0"),
        ({"state": "x"}, "state must be a whole number of at least 1, got 'x'"),
        ({"state": 2.5}, "state must be a whole number of at least 1, got 2.5"),
        ({"state": None}, "state must be a whole number of at least 1, got None"),
        ({"state": (8, "x")}, "each size in state must be a whole number of at least 1, got 'x'"),
        ({"state": ()}, "state must be a whole number or a shape, got an empty shape"),
    ],
)
def test_what_does_not_fit_is_refused(options, says):
    x = {name: value[:4] for name, value in texts().items()}
    given = {"state": WIDTH, "chunk": CHUNK, "mask": "attention_mask"} | options
    with pytest.raises(InvalidArgument, match=says):
        off.along_time(Cell().eval(), nn.Linear(WIDTH, 3).eval(), x, **given)
    with pytest.raises(BadNetwork, match=r"the head must be a .* got a function"):
        off.along_time(
            Cell().eval(), lambda h: h, x, state=WIDTH, chunk=CHUNK, mask="attention_mask"
        )


class Fading(nn.Module):
    """A reader whose state changes at positions that do not count."""

    def forward(self, state, chunk, mask):
        return 0.5 * state + (chunk * mask[:, :, None]).sum(1)


class Doubled(nn.Module):
    def forward(self, state, chunk, mask):
        return torch.cat([state, state], 1)


class Tupled(nn.Module):
    def forward(self, state, chunk, mask):
        return state, state


class Unmasked(nn.Module):
    def forward(self, state, chunk):
        return state


READERS = {
    "changes an ended row": (Fading, 3, r"reader must keep the state of a row whose mask is 0"),
    "a wider state": (
        Doubled,
        3,
        r"reader must give the next state, a tensor \[4, 3\], got \[4, 6\]",
    ),
    "a tuple": (Tupled, 3, r"the next state, a tensor \[4, 3\], got a tuple"),
    "no mask": (Unmasked, 3, r"reader must take state \[4, 3\], chunk .*, got TypeError"),
    "another width": (
        Fading,
        5,
        r"reader must take state \[4, 5\], chunk \[4, 4, 3\], mask \[4, 4\]",
    ),
}


@pytest.mark.parametrize("case", READERS)
def test_a_reader_that_does_not_fit_is_refused(case):
    kind, state, says = READERS[case]
    x = {"words": torch.randn(4, 8, 3), "mask": torch.ones(4, 8)}
    with pytest.raises(BadNetwork, match=says):
        off.along_time(kind().eval(), nn.Linear(3, 2).eval(), x, state=state, chunk=4, mask="mask")


def test_without_a_mask_nothing_ends_and_the_state_may_fade():
    x = torch.randn(4, 8, 3)
    net = off.along_time(Fading().eval(), nn.Linear(3, 2).eval(), x, state=3, chunk=4)
    assert net.topology.exits == ("chunks.0", "backbone")


def test_a_head_for_another_state_is_refused():
    x = torch.randn(4, 8, 3)
    with pytest.raises(BadNetwork, match=r"head must take state \[4, 3\], got RuntimeError"):
        off.along_time(Fading().eval(), nn.Linear(5, 2).eval(), x, state=3, chunk=4)
