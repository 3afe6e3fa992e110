"""IMTA: collaboration and distillation on a frozen model, and models and exits together before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.inline import Inline
from offramp.exits.pooled import Pooled
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes._equilibrium import equilibrium
from offramp.recipes.imta import Imta
from small import cut_of, images_of, ladder_of, seeded

X = images_of(24)
Y = torch.arange(24) % 3


def outputs_of(net):
    seen = dict(net.look(X))
    logits = {name: one.own for name, one in seen.items()}
    features = {name: one.features for name, one in seen.items()}
    return TrainingOutputs(logits, features, {"x": X}, net)


def batch(phase):
    return TrainingBatch(Y, torch.arange(24), phase)


def with_head(**options):
    """Cut before the model's last layer too, with a linear exit there on what that layer reads."""
    net = cut_of("stem", "blocks.0", "blocks.1", **options)
    net.hang_exit("blocks.1", seeded(lambda: Pooled("flat", 64, 3), 0).eval())
    return net


def changed(net, before):
    return {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize(("gamma", "temperature"), [(0.1, 1.0), (0.9, 3.0), (0.0, 1.0)])
def test_the_loss_is_that_of_the_authors(gamma, temperature):
    """gamma T^2 mean_{b,c} q (log q - log p) + (1 - gamma) CE, q the model's own answer and p the
    exit's at T.
    """
    net = cut_of()
    recipe = Imta(gamma=gamma, temperature=temperature)
    recipe.prepare(net)
    outputs = outputs_of(net)
    found = recipe.loss(outputs, batch("collaboration"))
    assert list(found) == ["stem", "blocks.0"]
    q = (outputs.logits["backbone"] / temperature).softmax(1)
    for name, got in found.items():
        p = (outputs.logits[name] / temperature).softmax(1)
        apart = (q * (q.log() - p.log())).mean()
        hard = cross_entropy(outputs.logits[name], Y)
        torch.testing.assert_close(got, (1 - gamma) * hard + gamma * temperature**2 * apart)


def test_the_teacher_learns_nothing_from_its_students():
    net = cut_of()
    recipe = Imta(gamma=1.0)
    recipe.prepare(net)
    outputs = outputs_of(net)
    last = outputs.logits["backbone"].detach().requires_grad_()
    outputs = replace(outputs, logits={**outputs.logits, "backbone": last})
    sum(recipe.loss(outputs, batch("collaboration")).values()).backward()
    assert last.grad is None


def test_only_new_layers_and_blocks_are_trained():
    net = with_head()
    recipe = Imta(epochs=1)
    recipe.prepare(net)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    off.fit(net, (X, Y), recipe=recipe, batch_size=8, progress=False)
    moved = changed(net, before)
    new = {
        key
        for key in before
        if key.startswith("exits.") and (".linear." in key or ".block." in key)
    }
    assert moved == new
    blocks = {key.split(".block.")[0] for key in moved if ".block." in key}
    assert blocks == {"exits.blocks.0", "exits.blocks.1"}  # the first exit has none


def test_steps_and_rates_are_those_of_the_scripts():
    net = cut_of()
    recipe = Imta(together=3, epochs=6)
    recipe.prepare(net)
    together, collaboration = recipe.phases(net)
    assert (together.epochs, collaboration.epochs) == (3, 6)
    for phase in (together, collaboration):
        optimizer = phase.optimizer(phase.parameters)
        (group,) = optimizer.param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 1e-4)
        schedule = phase.schedule(optimizer, 6)
        rates = []
        for _ in range(6):
            rates.append(group["lr"])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([0.1] * 2 + [0.01] * 2 + [0.001] * 2)


def test_together_trains_by_the_layers_from_before_with_gradients_averaged():
    """What the first phase sends into the model is what `joint` with equilibrium would on the
    network as it was.
    """
    plain = cut_of()
    net = cut_of()
    recipe = Imta(together=1)
    recipe.prepare(net)
    phase = recipe.phases(net)[0]
    with equilibrium(plain):
        losses = [cross_entropy(logits, Y) for logits in plain(X)]
        expected = torch.autograd.grad(sum(losses), list(plain.backbone.parameters()))
    with phase.during():
        found = recipe.loss(outputs_of(net), batch("together"))
        got = torch.autograd.grad(sum(found.values()), list(net.backbone.parameters()))
    torch.testing.assert_close(list(found.values()), losses)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    inside = {id(value) for layer in net.auxiliary.values() for value in layer.parameters()}
    assert inside < {id(value) for value in phase.parameters}


def test_the_last_classifier_of_the_authors_is_an_exit():
    """It learns from labels alone, and takes no part while models and exits learn together."""
    net = with_head()
    recipe = Imta(together=1, final=True)
    recipe.prepare(net)
    phases = recipe.phases(net)
    with phases[0].during():
        assert list(recipe.loss(outputs_of(net), batch("together"))) == [
            "stem",
            "blocks.0",
            "backbone",
        ]
    outputs = outputs_of(net)
    found = recipe.loss(outputs, batch("collaboration"))
    torch.testing.assert_close(found["blocks.1"], cross_entropy(outputs.logits["blocks.1"], Y))
    assert not torch.equal(found["blocks.0"], cross_entropy(outputs.logits["blocks.0"], Y))
    assert id(net.exit_of("blocks.1").linear.weight) in {
        id(value) for value in phases[1].parameters
    }
    assert net.exit_of("blocks.1").reads == ("blocks.0",)


def test_trained_exits_collaborate_and_are_kept(tmp_path):
    y = (X.mean((1, 2, 3)) > 0).long()
    net = cut_of(trained=False)
    history = off.fit(
        net, (X, y), recipe=Imta(together=20, epochs=20, rate=0.03), batch_size=12, progress=False
    )
    phases = [epoch.phase for epoch in history.epochs]
    assert phases == ["together"] * 20 + ["collaboration"] * 20
    first = history.epochs[20].figures["loss"]
    last = history.epochs[-1].figures["loss"]
    assert last < first
    assert net.auxiliary == {}
    assert net.untrained() == ()
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    assert again.fingerprint() == net.fingerprint()
    assert all(isinstance(again.exit_of(name), Inline) for name in ("stem", "blocks.0"))
    for one, other in zip(net(X), again(X), strict=True):
        assert torch.equal(one, other)


def test_a_second_time_goes_on_with_the_same_exits():
    net = cut_of()
    Imta().prepare(net)
    exits = [net.exit_of(name) for name in net.topology.exits]
    Imta().prepare(net)
    assert [net.exit_of(name) for name in net.topology.exits] == exits


@pytest.mark.parametrize(
    ("net", "recipe", "error", "says"),
    [
        (cut_of, Imta(gamma=1.5), InvalidArgument, "gamma must be between 0 and 1, got 1.5"),
        (cut_of, Imta(temperature=0.0), InvalidArgument, "temperature must be above 0"),
        (cut_of, Imta(falls=(0.5, 2.0)), InvalidArgument, "falls must be shares"),
        (lambda: ladder_of(3), Imta(), BadNetwork, "parameters|ladder"),
        (
            lambda: cut_of(exits="cascade"),
            Imta(),
            BadNetwork,
            "must end in a linear layer on features",
        ),
        (lambda: cut_of(exits="mlp"), Imta(final=True), BadNetwork, "layers before its linear one"),
        (lambda: cut_of(exits="mlp", trained=False), Imta(), BadNetwork, "never trained"),
    ],
)
def test_what_cannot_collaborate_is_refused_and_stays(net, recipe, error, says):
    made = net()
    before = made.fingerprint()
    with pytest.raises(error, match=says):
        recipe.prepare(made)
    assert made.fingerprint() == before
