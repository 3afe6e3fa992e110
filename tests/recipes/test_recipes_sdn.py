"""Shallow-Deep Networks: growing weights, what reads what, and the surest answer at the end."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.sdn import Sdn, ramp
from small import cut_of, images_of

X = images_of(48)
Y = (X.mean((1, 2, 3)) > 0).long()


def outputs_of(net):
    seen = dict(net.look(X))
    return TrainingOutputs(
        {n: s.own for n, s in seen.items()}, {n: s.features for n, s in seen.items()}, {}, net
    )


def test_weights_grow_with_the_epochs_up_to_their_own():
    assert [ramp(0.9, epoch, 100) for epoch in (1, 50, 99)] == pytest.approx([0.019, 0.46, 0.9])
    assert ramp(0.15, 99, 100) == 0.15
    assert ramp(0.005, 1, 100) == 0.005


def test_by_default_six_exits_weigh_what_they_do_in_the_paper():
    class Six:
        class topology:
            exits = (*"abcdef", "backbone")

    assert [*Sdn().weights_of(Six()).values()] == pytest.approx(
        [0.15, 0.30, 0.45, 0.60, 0.75, 0.90]
    )


# counted from 1, as sdn_train does
@pytest.mark.parametrize(("step", "epoch"), [(0, 1), (14, 2), (99, 10)])
def test_losses_from_scratch(step, epoch):
    net = cut_of()
    recipe = Sdn([0.3, 0.6], backbone=True, epochs=10)
    outputs = outputs_of(net)
    losses = recipe.loss(outputs, TrainingBatch(Y, torch.arange(48), "all", step, 100))
    plain = [torch.nn.functional.cross_entropy(logits, Y).item() for logits in net(X)]
    weights = [min(0.3, 0.01 + epoch * 0.3 / 10), min(0.6, 0.01 + epoch * 0.6 / 10), 1]
    expected = [weight * loss for weight, loss in zip(weights, plain, strict=True)]
    assert [value.item() for value in losses.values()] == pytest.approx(expected)


def test_on_a_frozen_backbone_features_are_pooled_once_where_exits_pool():
    assert [phase.reads for phase in Sdn().phases(cut_of(exits="sdn"))] == ["pooled"]
    assert [phase.reads for phase in Sdn().phases(cut_of(exits="branch"))] == ["input"]
    history = off.fit(cut_of(exits="sdn"), (X, Y), recipe=Sdn(epochs=1), progress=False)
    assert history.notes == ("pooled features were computed once for exits",)


def test_the_rate_falls_where_the_paper_has_it_fall():
    history = off.fit(cut_of(), (X, Y), recipe=Sdn(epochs=5), batch_size=16, progress=False)
    assert [epoch.rate for epoch in history.epochs] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 1e-4])


def test_the_surest_answer_at_the_end(tmp_path):
    net = cut_of(trained=False, exits="sdn", gate="max_prob")
    off.fit(
        net, (X, Y), recipe=Sdn(epochs=8, rate=3e-2, surest=True), batch_size=16, progress=False
    )
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    x = images_of(60, 4)
    every = torch.stack((*again(x)[:-1], net.backbone(x))).detach()  # [E, B, C]
    sure = every.softmax(-1).amax(-1)
    expected = every[sure.argmax(0), torch.arange(60)]
    torch.testing.assert_close(again(x)[-1].detach(), expected)
    assert len(set(sure.argmax(0).tolist())) > 1
    trace = off.record(again, x, timed=False, progress=False)
    assert (trace.columns["answer/backbone"] == expected.argmax(1).numpy()).all()
    plan = off.Plan.by_hand({"stem": float(sure[0].median()), "blocks.0": float("inf")})
    y = off.run(again, plan, x)
    replayed = trace.replay(plan)
    assert (y.exit.numpy() == replayed.exit).all()
    stayed = y.exit == 2
    torch.testing.assert_close(y.logits[stayed], expected[stayed], atol=1e-4, rtol=1e-4)
    assert 0 < stayed.sum() < 60


def test_the_model_itself_is_what_learns_below_the_surest_answer():
    net = cut_of(exits="sdn")
    recipe = Sdn(backbone=True, surest=True)
    plain = torch.nn.functional.cross_entropy(net.backbone(X), Y)
    recipe.prepare(net)
    recipe.prepare(net)  # twice is once
    losses = recipe.loss(outputs_of(net), TrainingBatch(Y, torch.arange(48), "all"))
    torch.testing.assert_close(losses["backbone"], plain)


def test_what_does_not_fit_is_refused_and_nothing_changed():
    net = cut_of(exits="cascade")
    before = net.fingerprint()
    with pytest.raises(BadNetwork, match="exit 'stem' is something else"):
        off.fit(net, (X, Y), recipe=Sdn(surest=True), progress=False)
    with pytest.raises(
        InvalidArgument, match=r"weights must be a number of at least 0 for each of stem, blocks\.0"
    ):
        off.fit(net, (X, Y), recipe=Sdn([0.1], surest=True), progress=False)
    assert net.fingerprint() == before
