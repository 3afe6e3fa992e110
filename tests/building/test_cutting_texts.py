"""Models of text that are cut: masks, exits that read them, answers in a dataclass, and texts of
any length.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadData, BadNetwork, InvalidArgument
from offramp.exits.pooled import Pooled, linear_masked
from offramp.fitting.forward import TrainingForward, pooled_of
from offramp.networks.nodes import Gate
from offramp.networks.recipe import poolable
from offramp.plans.plan import Plan
from texts import CLASSES, WIDTH, encoder, texts

AT = ["blocks.0", "blocks.1"]


def half(net, x):
    """A plan under which some rows leave at each gate, and the logits of every exit [E, B, C]."""
    with torch.no_grad():
        walked = list(net.walk(x))
    thresholds = {name: (float(score.median()) + 1e-3,) for name, _, score in walked[:-1]}
    return Plan.by_hand(thresholds), torch.stack([logits for _, logits, _ in walked])


def agrees(net, x, atol=1e-5):
    plan, logits = half(net, x)
    answers = off.run(net, plan, x)
    assert len(set(answers.exit.tolist())) > 1
    expected = logits[answers.exit, torch.arange(len(answers.exit))]
    torch.testing.assert_close(answers.logits, expected, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def net():
    return off.cut(encoder(), texts(6, 9), at=AT, exits="linear_masked")


def test_the_answer_in_a_dataclass_is_found_by_name(net):
    x = texts(5, 9, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[-1], net.backbone(**x).logits)
    agrees(net, x)


def test_an_exit_may_read_a_mask(net):
    assert [node.exit_reads for node in net.topology.nodes] == [
        ("x/attention_mask",),
        ("x/attention_mask",),
        (),
    ]
    x = texts(5, 9, seed=2)
    with torch.no_grad():
        first = net(x)[0]
        padded = {name: value.clone() for name, value in x.items()}
        padded["input_ids"][x["attention_mask"] == 0] = 7  # other words where there are none
        torch.testing.assert_close(net(padded)[0], first)
    plain = off.cut(encoder(), texts(6, 9), at=AT, exits="linear")
    with torch.no_grad():
        assert not torch.allclose(plain(padded)[0], plain(x)[0])


def test_a_mask_is_carried_where_no_later_segment_needs_it():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 2)

        def forward(self, words, mask):
            return self.two(self.one(self.words(words) * mask[:, :, None]).tanh()).amax(1)

    x = {"words": torch.arange(35).reshape(7, 5) % 9, "mask": texts(7, 5)["attention_mask"]}
    net = off.cut(
        Bare().eval(),
        x,
        at=["words", "one"],
        exits=lambda shape, c: linear_masked(shape, c, "x/mask"),
    )
    agrees(net, x)


def test_it_is_stored_and_recorded(net, tmp_path):
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", encoder())
    assert again.fingerprint() == net.fingerprint()
    agrees(again, texts(5, 9, seed=3))
    with torch.no_grad():
        for exit_ in map(net.exit_of, AT):
            exit_.head[0].bias += 0.1
    trace = off.record(
        net, [(texts(20, 9, seed=4), torch.arange(20) % CLASSES)], timed=False, progress=False
    )
    plan = off.calibrate(trace, risk="disagreement", at_most=0.99)
    assert (off.run(net, plan, texts(20, 9, seed=4)).exit.numpy() == trace.replay(plan).exit).all()


def test_it_is_trained_from_pooled_features():
    """What an exit makes of pooled features is what it makes of the text and its mask."""
    net = off.cut(encoder(), texts(6, 9), at=AT, exits="linear_masked")
    x = texts(5, 9, seed=6)
    state = {f"x/{name}": value for name, value in texts(5, 9, seed=6).items()}
    assert poolable(net) == (*AT, "backbone")
    with torch.no_grad():
        looked = TrainingForward(net)(pooled_of(net, state, poolable(net)), True)["logits"]
        for name, logits in zip(net.topology.exits, net(x), strict=True):
            torch.testing.assert_close(looked[name], logits)
    data = (texts(30, 9, seed=7), torch.arange(30) % CLASSES)
    off.fit(net, data, recipe="cross_entropy", progress=False)
    assert not net.untrained()


def test_gradients_reach_everything():
    net = off.cut(encoder(), texts(6, 9), at=AT, exits="linear_masked")
    sum(logits.square().sum() for logits in net(texts(6, 9))).backward()
    assert not [name for name, value in net.named_parameters() if value.grad is None]


def test_an_input_that_is_not_there_is_refused():
    with pytest.raises(
        InvalidArgument, match=r"inputs of the model, which are .*'x/attention_mask'.* got 'x/mask'"
    ):
        off.cut(
            encoder(), texts(6, 9), at=AT, exits=lambda shape, c: linear_masked(shape, c, "x/mask")
        )
    with pytest.raises(InvalidArgument, match="a mask needs pool 'mean' and the name of an input"):
        Pooled("grid", WIDTH, 3, mask="x/attention_mask")


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(
        BadNetwork, match=r"shapes \[B, T\] and \[B, T, F\], got \(6, 9\) and \(6, 5, 8\)"
    ):
        off.cut(encoder(halves=True), texts(6, 9), at=["blocks.1"], exits="linear_masked")


def test_a_cut_text_model_may_be_a_member(net):
    small = off.cut(encoder(halves=True), texts(6, 9), at=["blocks.0"], exits="linear_masked")
    both = off.ladder({"small": small, "large": net}).eval()
    assert both.topology.exits == (
        "small/blocks.0",
        "small",
        "large/blocks.0",
        "large/blocks.1",
        "large",
    )
    agrees(both, texts(6, 9, seed=5))


@pytest.fixture(scope="module")
def free():
    return off.cut(
        encoder(halves=True),
        texts(6, 9),
        at=AT,
        exits="linear",
        length=("input_ids", "x/attention_mask"),
    )


@pytest.mark.parametrize("length", [3, 8, 12, 31, 32])
def test_text_of_any_length(free, length):
    agrees(free, texts(7, length, seed=length))


def test_the_length_is_made_again_from_what_is_carried(free):
    from offramp.partition.segmenting import segments_of

    first, second, last = segments_of(free).values()
    assert first.reads == ("x/input_ids", "x/attention_mask")
    assert "x/input_ids" not in second.reads  # T / 2 stands in what is carried
    assert last.name == "backbone"


def test_any_length_is_stored(free, tmp_path):
    off.save(free, tmp_path / "net")
    again = off.load(tmp_path / "net", encoder(halves=True))
    assert again.members == free.members
    agrees(again, texts(5, 14, seed=9))


def test_any_length_under_a_plan_with_a_probe(free):
    with torch.no_grad():
        for exit_ in map(free.exit_of, AT):
            exit_.head[0].bias += 0.1
    trace = off.record(
        free, [(texts(20, 9, seed=4), torch.arange(20) % CLASSES)], timed=False, progress=False
    )
    plan = off.calibrate(trace, risk="disagreement", at_most=0.99)
    assert len(off.run(free, plan, texts(5, 14)).logits) == 5


def test_texts_that_do_not_fit_are_refused(free, net):
    def run(network, x):
        return off.run(network, Plan.never_leave(network.topology), x)

    with pytest.raises(BadData, match=r"must satisfy T <= 32 .*, got T = 33"):
        run(free, texts(3, 33))
    with pytest.raises(BadData, match=r"must satisfy T >= 3 .*, got T = 2"):
        run(free, texts(3, 2))
    with pytest.raises(BadData, match=r"must have the same length, got \[8, 9\]"):
        run(free, {**texts(3, 9), "attention_mask": texts(3, 8)["attention_mask"]})
    with pytest.raises(
        BadData, match=r"rows of 'x/input_ids' must have shape \(9,\), got \(8,\).*length="
    ):
        run(net, texts(3, 8))
    with pytest.raises(
        InvalidArgument, match=r"length must name inputs \[B, T, ...\] of .*, got 'mask'; 'x/mask'"
    ):
        off.cut(encoder(), texts(6, 9), at=AT, length="mask")


def test_a_model_that_fixes_the_length_is_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4)
            self.head = nn.Linear(36, 2)

        def forward(self, input_ids):
            return self.head(self.words(input_ids).flatten(1))

    x = {"input_ids": texts(4, 9)["input_ids"] % 9}
    assert off.cut(Fixed().eval(), x, at="words").topology.exits == ("words", "backbone")
    with pytest.raises(BadNetwork, match="length"):
        off.cut(Fixed().eval(), x, at="words", length="input_ids")


def test_a_length_at_which_the_model_itself_fails():
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30, 4)
            self.places = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, input_ids):
            h = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
            return self.head(h.tanh().mean(1))

    net = off.cut(
        Looked().eval(), {"input_ids": texts(4, 9)["input_ids"]}, at="words", length="input_ids"
    )
    agrees(net, {"input_ids": texts(6, 7)["input_ids"]})
    with pytest.raises(BadData, match=r"cannot run on .*index out of range"):
        off.run(net, Plan.never_leave(net.topology), {"input_ids": texts(4, 10)["input_ids"]})


def test_as_many_rows_as_words():
    net = off.cut(encoder(), texts(9, 9), at=AT, length=("input_ids", "attention_mask"))
    agrees(net, texts(4, 6))


def test_a_gate_may_read_an_input():
    class Short(Gate):
        reads = ("x/attention_mask",)

        def score(self, seen):
            return -seen.inputs["x/attention_mask"].sum(1).float()

        def config(self):
            return {"name": "tests:Short"}

    net = off.cut(
        encoder(),
        texts(6, 9),
        at=AT,
        exits="linear",
        gate={"blocks.0": Short(), "blocks.1": "margin"},
    )
    plan = Plan.by_hand({"blocks.0": (-4.5,), "blocks.1": (float("inf"),)})
    assert off.run(net, plan, texts(9, 9)).exit.tolist() == [2, 2, 2, 2, 2, 0, 0, 0, 0]


def test_outputs_among_which_the_logits_are_not_clear():
    class Two(nn.Module):
        def __init__(self, *names):
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.one = nn.Linear(4, 3)
            self.other = nn.Linear(4, 3)
            self.names = names

        def forward(self, x):
            h = self.body(x)
            return dict(
                zip(self.names, (self.one(h), self.other(h.tanh()), h[:, None]), strict=True)
            )

    x = torch.randn(5, 4)
    named = off.cut(Two("logits", "pooled", "hidden").eval(), x, at="body", exits="linear")
    with torch.no_grad():
        torch.testing.assert_close(named(x)[-1], named.backbone(x)["logits"])
        answers = off.run(named, Plan.never_leave(named.topology), x)
        torch.testing.assert_close(answers.logits, named.backbone(x)["logits"])
    with pytest.raises(BadNetwork, match=r"must give logits .* got a dict"):
        off.cut(Two("a", "b", "hidden").eval(), x, at="body", exits="linear")


def test_words_with_coordinates_stay_whole():
    """Made-up rows of the self-check keep what stands together: a box is no box when its corners
    change places.
    """

    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.sizes = nn.Embedding(40, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, boxes):
            return self.head(self.sizes(boxes[:, :, 1] - boxes[:, :, 0]).mean(1))

    boxes = torch.stack([torch.arange(9), torch.arange(9) + 5], 1).expand(3, 9, 2)
    assert off.cut(Boxes().eval(), boxes.clone(), at="sizes").topology.exits == (
        "sizes",
        "backbone",
    )


def test_numbers_of_tokens_that_the_model_does_not_know():
    rows = {**texts(6, 9), "input_ids": torch.full((6, 9), 10**6)}
    with pytest.raises(BadData, match="fails on the example: index out of range"):
        off.cut(encoder(), rows, parts=2, exits="linear_masked")
    with pytest.raises(BadData, match="fails on the example: index out of range"):
        off.cut(encoder(), rows, at=AT, exits="linear_masked")
