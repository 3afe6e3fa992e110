"""Synergy of exits: the loss and the weights of layers by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from offramp.errors import InvalidArgument
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.synergy import Synergy, layer_weights
from small import cut_of, images_of

X = images_of(48)
Y = (X.mean((1, 2, 3)) > 0).long()
BATCH = TrainingBatch(Y, torch.arange(48), "all")


def outputs_of(net):
    seen = dict(net.look(X))
    return TrainingOutputs(
        {n: s.own for n, s in seen.items()}, {n: s.features for n, s in seen.items()}, {}, net
    )


def test_the_loss_by_hand():
    net = cut_of(exits="linear")
    outputs = outputs_of(net)
    p = {name: logits.detach().softmax(-1) for name, logits in outputs.logits.items()}
    losses = Synergy(beta=0.6).loss(outputs, BATCH)
    for name, others in (("stem", ("blocks.0", "backbone")), ("backbone", ("stem", "blocks.0"))):
        pull = sum(-(p[other] * p[name].log()).sum(1).mean() for other in others) / 6
        torch.testing.assert_close(
            losses[name].detach(), cross_entropy(outputs.logits[name], Y).detach() + 0.6 * pull
        )
    plain = Synergy(beta=0.0).loss(outputs, BATCH)
    torch.testing.assert_close(plain["stem"], cross_entropy(outputs.logits["stem"], Y))


def test_layers_weigh_by_the_deepest_exits_attention():
    net = cut_of("stem", "blocks.0", "blocks.1", exits="selective")
    outputs = outputs_of(net)
    weights = layer_weights(outputs)
    assert [*weights] == ["stem", "blocks.0", "blocks.1"]
    assert sum(weights.values()).item() == pytest.approx(3)
    deepest = net.exits["blocks.1"]
    layers = torch.stack(
        [net.exits[n].project(net.exits[n].pool(outputs.features[n])) for n in weights], 1
    )
    want = deepest.shares(layers).mean((0, 2)) * 3
    torch.testing.assert_close(torch.stack([*weights.values()]), want.detach())
    losses = Synergy(beta=0.0).loss(outputs, BATCH)
    torch.testing.assert_close(
        losses["stem"], weights["stem"] * cross_entropy(outputs.logits["stem"], Y)
    )
    assert layer_weights(outputs_of(cut_of(exits="linear"))) == {}


def test_a_negative_beta_is_refused():
    with pytest.raises(InvalidArgument, match="beta must be at least 0, got -1"):
        Synergy(beta=-1).prepare(cut_of())
