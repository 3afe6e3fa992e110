"""Places tried on models: one where only one place can pay, one where none can, and the digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.placement.measure import _ProbePass, placed
from offramp.errors import BadData, BadNetwork, InvalidArgument, OverlappingRows
from offramp.networks.inputs import as_inputs
from offramp.networks.nodes import Exit
from paying import WIDTH, Heavy, Lift, lifted, parity, signs, with_identity_first
from texts import encoder, texts


def test_only_the_place_that_pays_is_taken():
    x, y = signs()
    found = placed(lifted(), None, as_inputs(x[:4]), (x, y), exits="linear")
    share = {candidate.name: candidate.share for candidate in found.candidates}
    assert share["0"] < 0.1
    assert share["1"] == 1
    assert found.names == ("1",)
    assert found.mean < 0.5 * found.full


@pytest.mark.slow
def test_the_rows_that_placed_exits_promise_nothing():
    model = lifted()
    x, y = signs()
    net = off.cut(model, x[:4], at="auto", labelled=(x, y), exits="linear", parts=2)
    assert net.topology.exits == ("1", "backbone")
    off.fit(net, (x, y), recipe="cross_entropy", progress=False)
    trace = off.record(net, (x, y), timed=False, progress=False)
    with pytest.raises(OverlappingRows):
        off.calibrate(trace, at_most=0.1)


def test_no_exit_pays_where_nothing_is_known_before_the_end():
    model = with_identity_first(parity(Heavy(WIDTH), Lift()))
    x, y = signs()
    with pytest.raises(
        BadNetwork, match=r"no exit pays .* could leave, and the exit costs as much as it saves at"
    ):
        off.cut(model, x[:4], at="auto", labelled=(x, y), exits="linear")


def test_global_randomness_stays_as_it_was():
    model = lifted()
    x, y = signs(80)
    torch.manual_seed(5)
    placed(model, None, as_inputs(x[:4]), (x, y), exits="linear")
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


SMALL = nn.Sequential(
    nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
).eval()
X, Y = signs(60)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"at": "auto"}, InvalidArgument, "labelled must be labelled rows"),
        ({"at": ["0"], "labelled": (X, Y)}, InvalidArgument, "labelled must be None unless"),
        ({"parts": 2, "labelled": (X, Y)}, InvalidArgument, "labelled must be None unless"),
        (
            {"at": "auto", "parts": 1, "labelled": (X, Y)},
            InvalidArgument,
            "parts must be a whole number of at least 2, got 1",
        ),
        ({"at": "auto", "labelled": X}, BadData, "at least 40 labelled rows, got no labels"),
        (
            {"at": "auto", "labelled": (X[:30], Y[:30])},
            BadData,
            "at least 40 labelled rows, got 30 rows",
        ),
        ({"at": "auto", "labelled": (X, Y + 5)}, BadData, "between 0 and 1, got"),
        ({"at": "auto", "labelled": (X[:, :3], Y)}, BadData, "fails on the labelled rows"),
        ({"at": "auto", "labelled": (X * np.float32(np.nan), Y)}, BadData, "must be finite"),
        (
            {"at": "auto", "labelled": (X, Y), "exits": {"0": "linear"}},
            InvalidArgument,
            "a name or a function",
        ),
        ({"at": "auto", "labelled": (X, Y), "exits": "linaer"}, InvalidArgument, "linear"),
        ({"at": "auto", "labelled": (X, Y), "exits": "branch"}, BadNetwork, "convolutional"),
        ({"at": "auto", "labelled": 5}, BadData, "int as data"),
    ],
)
def test_what_is_refused(given, error, says):
    with pytest.raises(error, match=says):
        off.cut(SMALL, X[:4], **given)


def test_a_model_of_one_layer_has_no_place():
    with pytest.raises(BadNetwork, match="no legal cut"):
        off.cut(nn.Sequential(nn.Linear(WIDTH, 2)).eval(), X[:4], at="auto", labelled=(X, Y))


@pytest.mark.slow
def test_digits():
    pytest.importorskip("sklearn")
    from offramp.building.factories import make_model, preprocess_of
    from offramp.cli import demonstration as demo

    torch.manual_seed(0)
    model = make_model("offramp:digits_large")
    preprocess = preprocess_of("offramp:digits_large")
    demo.fit(model, preprocess, demo.all_of("digits[0:700]"), epochs=4)
    example = demo.all_of("digits[0:4]").x
    net = off.cut(model, example, at="auto", labelled="digits[0:700]", preprocess=preprocess)
    taken = net.topology.exits[:-1]
    assert taken
    assert "14" not in taken  # the last place saves next to nothing
    off.fit(net, "digits[0:700]", recipe="cross_entropy", progress=False)
    trace = off.record(net, "digits[700:1797]", timed=False, progress=False)
    plan = off.calibrate(trace, at_most=0.05)
    assert trace.evaluate(plan).prices[0].mean < 0.9 * trace.evaluate(plan).prices[0].plain


def test_masks_and_exits_that_do_not_pool():
    model = encoder()
    inputs = as_inputs(texts(6, 9))
    masked = _ProbePass(model, None, ["blocks.0", "blocks.1"], "linear_masked")
    masked.add(inputs)
    by_hand = model.words(inputs["x/input_ids"]).shape[2]
    assert [(name, value.shape) for name, value in masked.features()] == [
        ("blocks.0", (6, by_hand)),
        ("blocks.1", (6, by_hand)),
    ]
    full, reach, heads = masked.times(inputs)
    assert 0 < reach["blocks.0"] <= reach["blocks.1"] <= full
    assert min(heads.values()) > 0
    own = _ProbePass(model, None, ["blocks.0"], lambda shape, classes: Flat(shape, classes))
    own.add(inputs)
    assert own.features()[0][1].shape == (6, by_hand)


class Flat(Exit):
    """An exit that pools nothing beforehand."""

    def __init__(self, shape, classes) -> None:
        super().__init__()
        self.layer = nn.Linear(shape[0] * shape[1], classes)

    def forward(self, seen):
        return self.layer(seen.features.flatten(1))

    def config(self):
        return {"name": "Flat"}
