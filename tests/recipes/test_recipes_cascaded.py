"""QuickNets: which rows train a block, what stays still, and what a commitment does to a score."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.gates.commitment import Commitment
from offramp.networks.nodes import Seen
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes._together import seen_of
from offramp.recipes.cascaded import Cascaded, blocks_of
from small import cut_of, images_of, ladder_of

X = images_of(200)
Y = (X.mean((1, 2, 3)) > 0).long()
ROW = torch.arange(200)


def test_a_block_learns_what_the_earlier_ones_did_not_settle():
    recipe = Cascaded(0.8, held=4, replay=7)
    net = cut_of(trained=False)
    recipe.prepare(net)
    blocks = {phase.name: phase for phase in recipe.phases(net)}
    assert [*blocks] == [
        "block stem",
        "commitment stem",
        "block blocks.0",
        "commitment blocks.0",
        "block backbone",
    ]
    draw = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(200, 3, generator=draw) * 3 for name in net.topology.exits}
    outputs = TrainingOutputs(logits, {}, {"x": X}, net)
    batch = TrainingBatch(Y, ROW, "", 0.0)
    kept = {name: phase.rows(outputs, batch) for name, phase in blocks.items()}
    held = kept["commitment stem"]
    assert torch.equal(kept["commitment blocks.0"], held)
    assert torch.equal(kept["block stem"], ~held)
    settled = torch.zeros(200, dtype=torch.bool)
    for before, name in (("stem", "block blocks.0"), ("blocks.0", "block backbone")):
        p = logits[before].softmax(1)
        settled |= (p.argmax(1) == Y) & (p.amax(1) >= 0.8)
        assert kept[name][~settled & ~held].all()
        assert not kept[name][held].any()
        replayed = kept[name][settled & ~held].float().mean()
        assert 0.04 < replayed < 0.3
        assert settled.sum() > 30


@pytest.mark.parametrize("held", [2, 3, 5])
def test_rows_are_chosen_evenly_and_by_their_numbers_alone(held):
    recipe = Cascaded(held=held)
    rows = torch.arange(10_000)
    first = recipe._held(None, TrainingBatch(None, rows, "", 0.0))
    assert first.float().mean() == pytest.approx(1 / held, rel=0.05)
    assert first[:1000].float().mean() == pytest.approx(1 / held, rel=0.1)
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(recipe._held(None, TrainingBatch(None, rows[order], "", 0.0)), first[order])
    settled = TrainingOutputs({"a": torch.tensor([[9.0, 0.0]]).repeat(10_000, 1)}, {}, {}, None)
    kept = recipe._unsettled(
        ["a"], settled, TrainingBatch(torch.zeros(10_000).long(), rows, "", 0.0)
    )
    # replay does not follow the held rows
    assert kept[~first].float().mean() == pytest.approx(0.1, rel=0.15)


def test_every_parameter_belongs_to_one_block_and_the_others_stay():
    net = cut_of(trained=False)
    blocks = blocks_of(net)
    every = [id(value) for own in blocks.values() for value in own]
    assert sorted(every) == sorted(id(value) for value in net.backbone.parameters())
    assert [*blocks["blocks.0"]] == [*net.backbone.blocks[0].parameters()]
    changed = {}
    recipe = Cascaded(epochs=1, rate=0.01)
    ended = type(recipe).loss

    class Watched(Cascaded):
        def loss(self, outputs, batch):
            state = {key: value.clone() for key, value in net.state_dict().items()}
            changed[batch.phase] = (changed.get(batch.phase, (state, state))[0], state)
            modes[batch.phase] = (net.backbone.stem[1].training, net.backbone.blocks[1].training)
            return ended(self, outputs, batch)

    modes = {}
    off.fit(net, (X, Y), recipe=Watched(epochs=1, rate=0.01), batch_size=20, progress=False)
    own = {
        "block stem": ("backbone.stem.", "exits.stem."),
        "commitment stem": ("gates.stem.",),
        "block blocks.0": ("backbone.blocks.0.", "exits.blocks.0."),
        "commitment blocks.0": ("gates.blocks.0.",),
        "block backbone": ("backbone.blocks.1.", "backbone.head."),
    }
    for phase, (first, last) in changed.items():
        moved = {key for key in first if not torch.equal(first[key], last[key])}
        assert moved, phase
        assert all(key.startswith(own[phase]) for key in moved), (phase, moved)
    assert modes["block stem"][0]
    assert modes["block backbone"] == (False, True)


def test_the_score_is_the_smaller_of_two_log_odds():
    gate = Commitment(2, 3)
    with torch.no_grad():
        gate.linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
        gate.linear.bias.zero_()
    own = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [120.0, 0.0, 0.0]])
    features = torch.tensor([[9.0, 0.0], [-2.0, 0.0], [500.0, 0.0]])
    p = own[0].double().softmax(0)[0]
    got = gate.score(Seen(features, {}, own))
    assert got.tolist() == pytest.approx(
        [float((p / (1 - p)).log()), -2.0, 120 - 0.6931472], rel=1e-5
    )


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 4), (2, 3, 4, 5)])
def test_features_of_any_kind_are_averaged(shape):
    features = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    count = 5 if len(shape) == 2 else 2
    gate = Commitment(count, 3)
    places = {1: (), 2: (1,), 3: (2, 3), 4: (2, 3, 4)}[len(shape)]
    mean = features.mean(places) if places else features
    own = torch.zeros(4, 3)
    torch.testing.assert_close(
        gate.odds(features, own), gate.linear(torch.cat([mean, own], 1))[:, 0]
    )


def test_commitments_stop_the_over_confident():
    torch.manual_seed(0)
    net = cut_of(trained=False)
    x = images_of(600)
    noisy = torch.Generator().manual_seed(2)
    y = (x.mean((1, 2, 3)) > 0).long()
    # here the label is a coin toss: an exit may be sure of it, and is half right
    spoilt = x[:, 0, 0, 0] > 0.8
    y[spoilt] = torch.randint(0, 2, (int(spoilt.sum()),), generator=noisy)
    off.fit(net, (x, y), recipe=Cascaded(epochs=15, rate=1e-2), progress=False)
    fresh = images_of(1000, 3)
    with torch.no_grad():
        seen = dict(net.look(fresh))["stem"]
        odds = net.gates["stem"].odds(seen.features, seen.own)
    sure = seen.own.argmax(1) == (fresh.mean((1, 2, 3)) > 0)
    assert odds[sure].mean() > odds[~sure].mean()
    assert odds.std() > 0.1


def test_gates_are_hung_on_once_and_always_alike():
    one = cut_of()
    other = cut_of()
    for net in (one, other):
        Cascaded().prepare(net)
    gate = one.gates["stem"]
    Cascaded().prepare(one)
    assert one.gates["stem"] is gate
    assert one.fingerprint() == other.fingerprint()
    assert (gate.features, gate.classes) == (4, 3)
    assert {name: tuple(seen.own.shape) for name, seen in seen_of(one).items()}["stem"] == (2, 3)


def test_networks_that_cannot_carry_it_are_refused_as_they_were():
    stacked = off.ladder({"one": cut_of(), "two": cut_of(seed=1)})
    for net, recipe, error, says in (
        (stacked, Cascaded(), BadNetwork, "ladder of 2"),
        (ladder_of(2), Cascaded(), BadNetwork, "parameters to train"),
        (cut_of(), Cascaded(0.0), InvalidArgument, "confidence must be above 0 and at most 1"),
        (cut_of(), Cascaded(held=1), InvalidArgument, "held must be a whole number of at least 2"),
        (
            cut_of(),
            Cascaded(replay=0),
            InvalidArgument,
            "replay must be a whole number of at least 1",
        ),
    ):
        before = net.config()
        with pytest.raises(error, match=says):
            recipe.prepare(net)
        assert net.config() == before
        assert not any(isinstance(gate, Commitment) for gate in nn.ModuleList(net.gates.children()))
