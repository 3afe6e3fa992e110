"""The cascade of Zero Time Waste: what flows from exit to exit, and the ensemble."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.building.factories import make_exit
from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.cascade import Cascade, CascadeConv
from offramp.networks.nodes import Seen
from offramp.recipes.ztw import Ztw
from small import cut_of, images_of, ladder_of
from waves import wave, wave_of


def three(norm=False):
    """Three exits in a cascade on five features, and features for each."""
    torch.manual_seed(0)
    before = (None, "a", "b")
    made = [
        Cascade("flat", 5, 4, before=name, place=place, norm=norm)
        for place, name in enumerate(before, 1)
    ]
    return dict(zip("abc", made, strict=True)), dict(zip("abc", torch.randn(3, 6, 5), strict=True))


def run(exits, features):
    logits = {}
    handed = {}
    for name, exit_ in exits.items():
        logits[name], handed[name] = exit_.both(Seen(features[name], handed))
    return logits, handed


@torch.no_grad()
def voted(exits, a=None, b=None):
    for exit_ in exits.values():
        if a is not None:
            exit_.tail.a.fill_(a)
        if b is not None:
            exit_.tail.b.copy_(b)


def test_with_a_and_b_zero_the_ensemble_is_the_normalized_geometric_mean():
    exits, features = three()
    voted(exits, a=0.0)
    logits, handed = run(exits, features)
    p = handed["c"].softmax(-1)  # [B, 3, C]
    product = p.prod(1) ** (1 / 3)
    torch.testing.assert_close(logits["c"].softmax(-1), product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(logits["c"].exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(logits["a"], handed["a"][:, 0].log_softmax(-1))


def test_the_weights_of_an_ensemble():
    exits, features = three()
    bias = torch.tensor([0.5, -1.0, 0.0, 2.0])
    voted(exits, b=bias)
    with torch.no_grad():
        exits["b"].tail.a.copy_(torch.tensor([0.3, -0.7]))
    logits, handed = run(exits, features)
    p = handed["b"].softmax(-1)
    product = p[:, 0] ** (math.exp(0.3) / 2) * p[:, 1] ** (math.exp(-0.7) / 2) * bias.exp()
    torch.testing.assert_close(logits["b"].softmax(-1), product / product.sum(-1, keepdim=True))


def test_an_ensemble_starts_near_the_geometric_mean():
    values = torch.cat([Cascade("flat", 5, 4, before="a", place=200).tail.a for _ in range(20)])
    assert values.std().item() == pytest.approx(0.01, rel=0.1)
    assert not Cascade("flat", 5, 4).tail.b.any()


def test_no_gradient_reaches_the_head_before_through_the_cascade():
    exits, features = three()
    _, handed = run(exits, features)
    cross_entropy(handed["c"][:, -1], torch.zeros(6).long()).backward()
    assert all(
        value.grad is None or not value.grad.any()
        for name in "ab"
        for value in exits[name].parameters()
    )
    assert exits["c"].tail.linear.weight.grad[:, 5:].any()  # though it reads what that head says


@pytest.mark.parametrize("norm", [False, True])
def test_the_cascade_reads_the_raw_logits_of_the_one_before(norm):
    exits, features = three(norm)
    _, handed = run(exits, features)
    before = handed["b"][:, -1]
    if norm:
        before = (before - before.mean(-1, keepdim=True)) / (
            before.var(-1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
    expected = exits["c"].tail.linear(torch.cat([features["c"], before], 1))
    torch.testing.assert_close(handed["c"][:, -1], expected)
    assert torch.equal(handed["c"][:, :2], handed["b"])


def test_the_convolution_of_the_paper():
    exit_ = CascadeConv((3, 16, 16), 4, stride=2, padding=1)
    x = torch.randn(2, 3, 16, 16)
    map_ = torch.nn.functional.conv2d(
        x, exit_.convolution.weight, exit_.convolution.bias, 2, 1
    ).relu()
    cells = map_.unflatten(3, (4, 2)).unflatten(2, (4, 2)).movedim(3, 4)  # [B, C, 4, 4, 2, 2]
    share = exit_.mixed.share
    mixed = share * cells.amax((4, 5)) + (1 - share) * cells.mean((4, 5))
    torch.testing.assert_close(
        exit_.both(Seen(x, {}))[1][:, 0], exit_.tail.linear(mixed.flatten(1))
    )


# Raw logits of their InternalClassifier (variant conv, sdn_pool; dataset tinyimagenet) at 2
# channels and 3 classes, weights and features being waves: github.com/gmum/Zero-Time-Waste,
# 8341f3a6215a88171427472534ef53a9385f8cd8.
TINY = {
    16: [[0.6499231, 0.4117351, 0.1132366], [0.8002478, 0.4811848, 0.091715]],
    8: [[-1.0495101, -1.1019747, -0.9946936], [0.2635475, -0.1967881, -0.6289697]],
}


@pytest.mark.parametrize(("side", "padding"), [(16, 2), (8, 1)])
def test_the_head_for_tiny_imagenet_computes_as_the_authors_code_does(side, padding):
    exit_ = CascadeConv((2, side, side), 3, before="a", place=2, stride=2)
    assert exit_.padding == padding
    wave(exit_.convolution.weight, 0, 18**-0.5)
    wave(exit_.convolution.bias, 1, 0.2)
    wave(exit_.tail.linear.weight, 2, 35**-0.5)
    wave(exit_.tail.linear.bias, 3, 0.2)
    if exit_.mixed.share is not None:
        torch.nn.init.constant_(exit_.mixed.share, 0.3)
    before = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, -0.5]])
    members = exit_.both(Seen(wave_of(2, 2, side, side), {"a": before}))[1]
    torch.testing.assert_close(members[:, -1], torch.tensor(TINY[side]), atol=1e-6, rtol=1e-5)


def test_the_stride_is_an_argument_of_the_name():
    assert make_exit("cascade_conv?stride=2", (2, 16, 16), 3, ()).padding == 2
    assert make_exit("cascade_conv", (2, 16, 16), 3, ()).padding == 1


def test_cut_chains_them_by_place():
    net = cut_of("stem", "blocks.0", "blocks.1", exits="cascade")
    assert [net.exit_of(name).reads for name in net.topology.exits] == [
        (),
        ("stem",),
        ("blocks.0",),
        (),
    ]
    assert [net.exit_of(name).tail.place for name in net.topology.gates] == [1, 2, 3]


def test_a_cascade_with_a_hole_says_so():
    with pytest.raises(BadNetwork, match="must hand on the logits of 2 exits, got 1"):
        cut_of(
            "stem",
            "blocks.0",
            "blocks.1",
            exits={"stem": "cascade", "blocks.0": "linear", "blocks.1": "cascade"},
        )
    with pytest.raises(BadNetwork, match="before must be None at place 1"):
        Cascade("flat", 5, 4, place=2)


def test_a_closed_exit_still_hands_on(tmp_path):
    """Rows that leave elsewhere are compacted, and what was handed on with them."""
    net = cut_of("stem", "blocks.0", "blocks.1", exits="cascade")
    x = images_of(50, 2)
    trace = off.record(net, x, timed=False, progress=False)
    middle = {name: float(trace.columns[f"score/{name}"].mean()) for name in net.topology.gates}
    for closed in ("stem", "blocks.0", None):
        plan = off.Plan.by_hand(middle | ({closed: float("inf")} if closed else {}))
        y = off.run(net, plan, x)
        replayed = trace.replay(plan)
        assert (y.exit.numpy() == replayed.exit).all()
        chosen = torch.stack(net(x)).detach()[y.exit.clone(), torch.arange(50)]
        torch.testing.assert_close(y.logits, chosen, atol=1e-4, rtol=1e-4)
    assert len(set(replayed.exit.tolist())) > 2


def test_a_ladder_refuses_a_member_with_a_cascade():
    with pytest.raises(BadNetwork, match="reads exits by names"):
        off.ladder({"one": cut_of(exits="cascade"), "two": ladder_of(2).backbone["small"]})


# ztw_cv_original/architectures/weighted_avg_model.py, gmum/Zero-Time-Waste 8341f3a, then
# log_softmax
GOLDEN = {
    "additive": [[-1.3623695, -1.3351176, -0.7322636], [-0.6875016, -1.7676287, -1.119534]],
    "mean": [[-1.1901236, -1.224395, -0.9115995], [-0.5672885, -1.8231032, -1.304105]],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_ensembles_of_the_ablations_answer_as_the_authors(kind):
    exit_ = Cascade("flat", 5, 3, before="a", place=3, ensemble=kind)
    if kind == "additive":
        with torch.no_grad():
            exit_.tail.a.copy_(torch.tensor([0.3, -0.7, 0.2]))
            exit_.tail.b.copy_(torch.tensor([0.1, -0.4, 0.5]))
    members = torch.arange(18.0).reshape(2, 3, 3).sin() * 2
    torch.testing.assert_close(
        exit_.tail.ensemble(members), torch.tensor(GOLDEN[kind]), atol=1e-6, rtol=0
    )
    assert exit_.config()["ensemble"] == kind
    # files that do not name one have the paper's
    assert "ensemble" not in Cascade("flat", 5, 3).config()


@pytest.mark.parametrize("kind", ["additive", "mean"])
def test_ensembles_of_the_ablations_are_trained_and_kept(kind, tmp_path):
    net = cut_of(trained=False, exits=f"cascade?ensemble={kind}")
    x = images_of(24)
    y = torch.arange(24) % 3
    history = off.fit(net, (x, y), recipe=Ztw(epochs=1, ensembles=1), progress=False)
    phases = ["exits"] if kind == "mean" else ["exits", "ensembles"]
    assert [epoch.phase for epoch in history.epochs] == phases
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    for before, after in zip(net(x), again(x), strict=True):
        assert torch.equal(before, after)


def test_another_ensemble_is_refused():
    with pytest.raises(
        InvalidArgument, match="ensemble must be one of geometric, additive, mean, got 'sum'"
    ):
        Cascade("flat", 5, 3, ensemble="sum")
