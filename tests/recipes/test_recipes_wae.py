"""Training a WAE: its losses, what each stage moves, the controls, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers.preprocess import Preprocess
from offramp.models.wae import wae
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.wae import WaveletLike
from small import cut_of, images_of, made_once, seeded

X = images_of(48)
Y = (X.mean((1, 2, 3)) > 0).long()


class Tiny(nn.Module):
    """A classifier of images of one channel with two convolutions and global pooling."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3)
        )
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.body(x).relu().mean((2, 3)))


@made_once
def net_of(preprocess=None, **options):
    model = seeded(lambda: wae(Tiny().eval(), X[:2], thin=2, **options), 0)
    return seeded(
        lambda: off.cut(model, X[:4], at=model.cuts, exits="own", preprocess=preprocess), 0
    )


def outputs_of(net, x=X):
    seen = dict(net.look(x))
    logits = {name: one.own for name, one in seen.items()}
    return TrainingOutputs(logits, {}, {"x": x}, net)


def batch(phase):
    return TrainingBatch(Y, torch.arange(len(Y)), phase)


def changed(net, before):
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    return {key.split(".")[1] for key in moved}


def test_stage_one_is_reconstruction_and_energy():
    net = net_of()
    recipe = WaveletLike(balance=0.3, anchor=2.0)
    recipe.prepare(net)
    low, high = net.backbone.transform(X)
    again = net.auxiliary["decoder"](low, high)
    optimizer = torch.optim.SGD(net.backbone.transform.parameters(), lr=0.0)
    found = recipe.update(outputs_of(net), batch("images"), optimizer)
    expected = {
        "reconstruction": ((X - again) ** 2).mean(),
        "energy": 0.3 * (high**2).mean(),
        "anchor": 2 * ((low - avg_pool2d(X, 2)) ** 2).mean(),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach())


def test_classes_are_trained_at_the_sum_and_at_each_head():
    net = net_of()
    recipe = WaveletLike(sum_weight=1.0, low_weight=0.25, both_weight=0.75, gamma=0.1)
    recipe.prepare(net)
    outputs = outputs_of(net)
    model = net.backbone
    low, high = model.transform(X)
    features = model.low(model.low_norm(low))
    both = torch.cat([features, model.high(model.high_norm(high))], 1)
    head_a = model.head_low(features)
    head_f = model.head_both(both)
    classes = {
        "sum": cross_entropy(head_a + head_f, Y),
        "low": 0.25 * cross_entropy(head_a, Y),
        "both": 0.75 * cross_entropy(head_f, Y),
    }
    assert_close(recipe.loss(outputs, batch("classes")), classes)
    again = net.auxiliary["decoder"](low, high)
    images = {"reconstruction": 0.1 * ((X - again) ** 2).mean(), "energy": 0.1 * (high**2).mean()}
    assert_close(recipe.loss(outputs, batch("joint")), {**classes, **images})


def assert_close(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


def test_the_original_trains_besides_the_labels():
    """(1 - soft) CE + soft T^2 CE(z / T, original / T) at every head."""
    original = seeded(Tiny, 3).eval()
    net = net_of()
    recipe = WaveletLike(original=original, soft=0.3, temperature=2.0, low_weight=1.0)
    recipe.prepare(net)
    outputs = replace(outputs_of(net), teacher=original(X).detach())
    found = recipe.loss(outputs, batch("classes"))
    low = outputs.logits["head_low"]
    q = (original(X) / 2).softmax(1)
    soft = 4 * -(q * (low / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found["low"], 0.7 * cross_entropy(low, Y) + 0.3 * soft)
    assert [phase.teacher for phase in recipe.phases(net)] == [None, "original", "original"]
    before = {key: value.clone() for key, value in original.state_dict().items()}
    short = WaveletLike(original=original, soft=1.0, images=0, classes=0, joint=40, joint_rate=0.05)
    other = 1 - original(X).argmax(1)  # labels that count for nothing
    off.fit(net, (X, other), recipe=short, batch_size=16, progress=False)
    assert (net(X)[-1].argmax(1) == original(X).argmax(1)).float().mean() > 0.8
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


def test_losses_of_images_are_of_preprocessed_ones():
    net = net_of(Preprocess(mean=(1.0,), std=(2.0,), scale=3.0))
    recipe = WaveletLike()
    recipe.prepare(net)
    x = (X / 3 - 1) / 2
    low, high = net.backbone.transform(x)
    optimizer = torch.optim.SGD(net.backbone.transform.parameters(), lr=0.0)
    found = recipe.update(outputs_of(net), batch("images"), optimizer)
    torch.testing.assert_close(found["energy"], (high**2).mean().detach())
    again = net.auxiliary["decoder"](low, high)
    torch.testing.assert_close(found["reconstruction"], ((x - again) ** 2).mean().detach())


@pytest.mark.parametrize(
    ("epochs", "moves"),
    [
        ({"images": 1}, {"transform", "low_norm", "high_norm"}),
        (
            {"images": 1, "classes": 1},
            {"transform", "low_norm", "high_norm", "low", "high", "head_low", "head_both"},
        ),
    ],
)
def test_what_the_stages_move(epochs, moves):
    net = net_of()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    stages = {"images": 0, "classes": 0, "joint": 0} | epochs
    off.fit(net, (X, Y), recipe=WaveletLike(**stages), batch_size=16, progress=False)
    assert changed(net, before) == moves
    assert net.auxiliary == {}


def test_the_encoder_is_frozen_and_the_norms_stay_in_the_second_stage():
    net = net_of()
    off.fit(
        net, (X, Y), recipe=WaveletLike(images=1, classes=0, joint=0), batch_size=16, progress=False
    )
    after_one = {key: value.clone() for key, value in net.state_dict().items()}
    again = net_of()
    history = off.fit(
        again,
        (X, Y),
        recipe=WaveletLike(images=1, classes=2, joint=0),
        batch_size=16,
        progress=False,
    )
    assert [epoch.phase for epoch in history.epochs] == ["images", "classes", "classes"]
    assert changed(again, after_one) == {"low", "high", "head_low", "head_both"}


def test_the_norms_learn_the_mean_and_variance_of_both_images():
    net = net_of(start="xavier")
    off.fit(
        net,
        (X, Y),
        recipe=WaveletLike(images=40, images_rate=1e-9, classes=0, joint=0),
        batch_size=48,
        progress=False,
    )
    for image, norm in zip(
        net.backbone.transform(X), (net.backbone.low_norm, net.backbone.high_norm), strict=True
    ):
        torch.testing.assert_close(
            norm.running_mean, image.mean((0, 2, 3)).detach(), atol=0.02, rtol=0.02
        )
        torch.testing.assert_close(
            norm.running_var, image.var((0, 2, 3)).detach(), atol=0.02, rtol=0.05
        )


def test_the_last_stage_moves_everything():
    net = net_of()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    off.fit(
        net, (X, Y), recipe=WaveletLike(images=1, classes=0, joint=1), batch_size=16, progress=False
    )
    parts = {
        name
        for name, part in net.backbone.named_children()
        if [*part.parameters(), *part.buffers()]
    }
    assert changed(net, before) == parts


def test_decomposition_learns_from_the_classes_alone():
    net = net_of()
    recipe = WaveletLike(images=0, classes=0, joint=2, gamma=0.0)
    recipe.prepare(net)
    (phase,) = recipe.phases(net)
    trained = {id(value) for value in phase.parameters}
    assert {id(value) for value in net.backbone.transform.parameters()} <= trained
    assert not {id(value) for value in net.auxiliary["decoder"].parameters()} & trained
    assert set(recipe.loss(outputs_of(net), batch("joint"))) == {"sum", "low", "both"}


def test_the_wavelet_control_has_no_images_to_learn():
    net = net_of(transform="wavelet")
    history = off.fit(
        net, (X, Y), recipe=WaveletLike(images=3, classes=1, joint=1), batch_size=16, progress=False
    )
    assert [epoch.phase for epoch in history.epochs] == ["classes", "joint"]
    assert net.backbone.low_norm.running_var.item() != 1.0  # learned as any batch norm does


def test_it_learns_and_keeps_what_it_learned(tmp_path):
    net = net_of()
    recipe = "wae?images=5&classes=12&joint=3&rate=0.05"
    off.fit(net, (X, Y), recipe=recipe, batch_size=16, progress=False)
    answers = [logits.argmax(1) for logits in net(X)]
    assert all((answer == Y).float().mean() > 0.8 for answer in answers)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    assert again.fingerprint() == net.fingerprint()


@pytest.mark.parametrize(
    ("net", "recipe", "error", "says"),
    [
        (
            cut_of,
            WaveletLike(),
            BadNetwork,
            "of a model made by offramp.wae, got a Stages",
        ),
        (net_of, WaveletLike(gamma=-1.0), InvalidArgument, "gamma must be at least 0, got -1.0"),
        (net_of, WaveletLike(images=0, classes=0, joint=0), InvalidArgument, "0 epochs in all"),
        (
            net_of,
            WaveletLike(original="resnet56"),
            InvalidArgument,
            "original must be a torch.nn.Module, got a str",
        ),
        (
            net_of,
            WaveletLike(soft=1.5),
            InvalidArgument,
            "soft must be a share from 0 to 1, got 1.5",
        ),
        (net_of, WaveletLike(temperature=0), InvalidArgument, "temperature must be above 0, got 0"),
        (
            net_of,
            WaveletLike(sum_weight=0, low_weight=0, both_weight=0),
            InvalidArgument,
            "must be above 0",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(net, recipe, error, says):
    made = net()
    with pytest.raises(error, match=says):
        recipe.prepare(made)


def test_a_wae_that_is_cut_elsewhere_is_refused():
    model = seeded(lambda: wae(Tiny().eval(), X[:2], thin=2), 0)
    net = off.cut(model, X[:4], at=["low"], exits="linear")
    with pytest.raises(BadNetwork, match="needs head A's logits"):
        WaveletLike().prepare(net)
