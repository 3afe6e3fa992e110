"""Be Your Own Teacher: the loss by hand, adapters that do not stay, and a frozen teacher."""

from __future__ import annotations

import pytest
import torch

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.networks.nodes import Exit
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.distill import Distill, soft_cross_entropy
from offramp.recipes.patience import PatienceRecipe, depth_weights
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
    recipe = Distill(alpha=0.2, hints=0.5, temperature=2.0)
    torch.manual_seed(1)
    recipe.prepare(net)
    outputs = outputs_of(net)
    logits = outputs.logits
    features = outputs.features
    (adapter,) = net.auxiliary.values()
    p, q = ((logits[name].detach() / 2).softmax(-1) for name in ("stem", "backbone"))
    kl_and_entropy = -(q * p.log()).sum(1).mean()
    ce = -logits["stem"].log_softmax(-1)[torch.arange(48), Y].mean()
    own, target = (features[name].mean((2, 3)) for name in ("stem", "blocks.0"))
    norm = (adapter(own) - target).square().sum().sqrt()
    losses = recipe.loss(outputs, BATCH)
    torch.testing.assert_close(losses["stem"], 0.2 * kl_and_entropy + 0.8 * ce + 0.5 * norm)
    torch.testing.assert_close(
        losses["backbone"], torch.nn.functional.cross_entropy(logits["backbone"], Y)
    )


def test_the_teacher_gets_no_gradient_from_its_pupils():
    net = cut_of(exits="linear")
    recipe = Distill(alpha=1.0)
    recipe.prepare(net)
    outputs = outputs_of(net)
    for name in ("stem", "blocks.0"):
        outputs.features[name].retain_grad()
    recipe.loss(outputs, BATCH)["stem"].backward(retain_graph=True)
    assert net.backbone.head.weight.grad is None
    assert outputs.features["blocks.0"].grad is None
    assert outputs.features["stem"].grad.any()


def test_soft_cross_entropy_is_least_where_pupil_and_teacher_agree():
    teacher = torch.randn(5, 4)
    same = teacher.clone().requires_grad_()
    soft_cross_entropy(same, teacher, 3.0).backward()
    torch.testing.assert_close(same.grad, torch.zeros(5, 4), atol=1e-7, rtol=0)


def test_adapters_train_and_do_not_stay():
    before = cut_of(trained=False)
    Distill().prepare(before)
    assert [*before.auxiliary] == ["adapter/stem"]
    widths = [
        before.exit_of(name).pool(f).shape[1] for name, f in outputs_of(before).features.items()
    ]
    assert before.auxiliary["adapter/stem"].weight.shape == (widths[1], widths[0])
    net = cut_of(trained=False)
    plain = cut_of(trained=False)
    off.fit(net, (X, Y), recipe=Distill(epochs=1, rate=0.01), batch_size=16, progress=False)
    off.fit(
        plain, (X, Y), recipe=Distill(epochs=1, rate=0.01, hints=0.0), batch_size=16, progress=False
    )
    assert net.auxiliary == {}
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert not torch.equal(net.backbone.stem[0].weight, plain.backbone.stem[0].weight)


def test_heads_give_features_of_their_own():
    net = cut_of(trained=False, exits={"stem": "attentive", "blocks.0": "linear"})
    recipe = Distill(epochs=1, rate=0.01)
    recipe.prepare(net)
    head = net.exits["stem"]
    assert net.auxiliary["adapter/stem"].weight.shape == (4, head.linear.in_features)
    outputs = outputs_of(net)
    own = head.feature(outputs.features["stem"])
    target = outputs.features["blocks.0"].mean((2, 3))
    plain = Distill(hints=0.0).loss(outputs, BATCH)["stem"]
    norm = torch.linalg.vector_norm(net.auxiliary["adapter/stem"](own) - target)
    torch.testing.assert_close(recipe.loss(outputs, BATCH)["stem"], plain + 0.03 * norm)
    before = head.mask[0].weight.clone()
    off.fit(net, (X, Y), recipe=recipe, batch_size=24, progress=False)
    assert not torch.equal(net.exits["stem"].mask[0].weight, before)


def test_another_hint():
    net = cut_of()
    Distill(hint="stem").prepare(net)
    assert [*net.auxiliary] == ["adapter/blocks.0"]
    with pytest.raises(UnknownName, match="stem"):
        Distill(hint="stam").prepare(net)


def test_a_frozen_teacher_needs_no_labels_for_its_answers_alone():
    net = cut_of(trained=False)
    x = images_of(200, 3)
    before = (net(x)[0].argmax(1) == net.backbone(x).argmax(1)).float().mean()
    weights = [value.clone() for value in net.backbone.parameters()]
    recipe = Distill(backbone=False, alpha=1.0, epochs=60, rate=1e-2)
    history = off.fit(net, X, recipe=recipe, batch_size=16, progress=False)
    assert history.notes == ("pooled features were computed once for exits",)
    assert all(
        torch.equal(one, other)
        for one, other in zip(net.backbone.parameters(), weights, strict=True)
    )
    assert (net(x)[0].argmax(1) == net.backbone(x).argmax(1)).float().mean() > before + 0.1


class Learner(Exit):
    """Logits of a model, and a scale that learns."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, seen):
        return seen.features.flatten(1)[:, :3] * self.scale

    def config(self):
        return {"name": "tests:Learner"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(InvalidArgument, match="alpha must be between 0 and 1, got 2"):
        Distill(alpha=2).prepare(cut_of())
    net = cut_of("stem", exits=Learner())
    net.exits._modules["stem"], net.exits._modules["backbone"] = (
        net.exits["backbone"],
        net.exits["stem"],
    )
    with pytest.raises(BadNetwork, match="train itself"):
        Distill(backbone=False).prepare(net)


def test_patience_weighs_by_depth():
    net = cut_of("stem", "blocks.0", "blocks.1")
    outputs = outputs_of(net)
    losses = [value.item() for value in PatienceRecipe().loss(outputs, BATCH).values()]
    plain = [
        torch.nn.functional.cross_entropy(logits, Y).item() for logits in outputs.logits.values()
    ]
    assert losses == pytest.approx([j * loss / 10 for j, loss in enumerate(plain, 1)])
    assert sum(depth_weights(12)) == pytest.approx(1)
