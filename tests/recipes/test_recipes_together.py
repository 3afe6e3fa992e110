"""Recipes that train models and exits together, against the formulas of their papers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits.added import Added
from offramp.exits.pooled import Pooled
from offramp.networks.nodes import Exit
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes._equilibrium import equilibrium
from offramp.recipes._schedules import cosine, dropped
from offramp.recipes._together import last_layer, soft_cross_entropy
from offramp.recipes.boosted import AVERAGES, Boosted, add_up, pieces_of
from offramp.recipes.decorrelated import Decorrelated, divergence, mean_log, own_logs
from offramp.recipes.joint import Joint
from small import cut_of, dense, images_of, ladder_of, rows_of
from waves import toy

X = images_of(12)
Y = torch.arange(12) % 3
NODES = ("stem", "blocks.0", "backbone")


def batch():
    return TrainingBatch(Y, torch.arange(12), "phase", 0.0)


def outputs_of(net):
    seen = dict(net.look(X))
    return TrainingOutputs(
        {n: s.own for n, s in seen.items()}, {n: s.features for n, s in seen.items()}, {"x": X}, net
    )


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight", [0.5, 0.8, 1.0])
def test_boosted_sums_are_the_sums_of_the_paper(weight):
    net = cut_of()
    raw = [one.clone() for one in net(X)]
    Boosted(weight).prepare(net)
    for n, got in enumerate(net(X)):
        torch.testing.assert_close(got, sum(weight ** (n - k) * raw[k] for k in range(n + 1)))
    running = torch.zeros_like(raw[0])  # P_1 = 0, P_{n+1} = w (f_n + P_n), F_n = f_n + P_n
    for f, got in zip(raw, net(X), strict=True):
        torch.testing.assert_close(got, f + running)
        running = weight * (f + running)


def test_boosted_weights_that_change_are_the_authors_of_training():
    net = cut_of()
    raw = [one.clone() for one in net(X)]
    weights = (0.2, 0.6, 1.0)  # linspace of their "0.2,1.0"
    Boosted((0.2, 1.0)).prepare(net)
    # forward_all of models/dynamic_net.py, SHI-Labs/Boosted-Dynamic-Networks 17995bb: the same sums
    # to the last bit
    running = torch.zeros_like(raw[0])
    for f, weight, got in zip(raw, weights, net(X), strict=True):
        torch.testing.assert_close(got, f + running)
        running = (f + running) * weight


def test_boosted_equal_losses_follow_their_moving_averages():
    net = cut_of()
    recipe = Boosted(equal=True)
    recipe.prepare(net)
    averages = [None, None, None]
    for scale in (1.0, 3.0, 0.5):
        outputs = outputs_of(net)
        outputs = replace(
            outputs, logits={name: scale * own for name, own in outputs.logits.items()}
        )
        plain = [cross_entropy(own, Y).item() for own in outputs.logits.values()]
        averages = [
            p if a is None else a * 0.9 + p * 0.1 for a, p in zip(averages, plain, strict=True)
        ]
        mean = sum(averages) / 3
        expected = [p / a * mean for a, p in zip(averages, plain, strict=True)]
        with torch.no_grad():
            recipe.loss(outputs, batch())  # looking moves nothing
        got = [part.item() for part in recipe.loss(outputs, batch()).values()]
        assert got == pytest.approx(expected, rel=1e-5)
    assert net.auxiliary[AVERAGES].values.tolist() == pytest.approx(averages, rel=1e-5)


def test_boosted_decays_each_piece_and_its_exit_alike():
    net = cut_of()
    recipe = Boosted(decay=(1e-4, 5e-4))
    recipe.prepare(net)
    flags = [value.requires_grad for value in net.parameters()]
    pieces = pieces_of(net)
    assert [value.requires_grad for value in net.parameters()] == flags
    phase = recipe.phases(net)[0]
    groups = phase.optimizer(phase.parameters).param_groups
    assert [group["weight_decay"] for group in groups] == pytest.approx([1e-4, 3e-4, 5e-4])
    stem = net.backbone.stem
    block = net.backbone.blocks[0]
    for group, piece, modules in zip(
        groups, pieces, ((stem, net.exits["stem"]), (block, net.exits["blocks.0"])), strict=False
    ):
        wanted = {id(value) for module in modules for value in module.parameters()}
        assert {id(value) for value in group["params"]} == wanted
        assert {id(value) for value in piece} == wanted
    assert sum(len(group["params"]) for group in groups) == len(phase.parameters)


@pytest.mark.parametrize("name", ["weight", "decay"])
def test_boosted_refuses_another_count_of_numbers(name):
    refused(
        cut_of(),
        Boosted(**{name: (0.1, 0.2, 0.3, 0.4)}),
        InvalidArgument,
        "must have 1, 2 or 3 numbers .*, got 4",
    )


def test_boosted_trains_an_exit_nothing_through_a_deeper_one():
    net = cut_of()
    Boosted().prepare(net)
    losses = Boosted().loss(outputs_of(net), batch())
    heads = [list(net.exits[name].parameters()) for name in NODES[:2]]
    for name, part in losses.items():
        for index, head in enumerate(heads):
            found = torch.autograd.grad(part, head, retain_graph=True, allow_unused=True)
            assert all((gradient is not None) == (NODES.index(name) == index) for gradient in found)


def test_boosted_hangs_itself_on_once_and_a_new_weight_replaces_the_old():
    net = cut_of(trained=False)
    Boosted(0.5).prepare(net)
    Boosted(0.25).prepare(net)
    assert [type(net.exits[name]) for name in NODES] == [Pooled, Added, Added]
    assert isinstance(net.exits["blocks.0"].exit, Pooled)
    assert [net.exits[name].weight for name in NODES[1:]] == [0.25, 0.25]
    assert [node.exit_reads for node in net.topology.nodes] == [(), ("stem",), ("blocks.0",)]
    assert net.untrained() == NODES[:2]


def refused(network, recipe, error, says):
    before = network.config()
    with pytest.raises(error, match=says):
        recipe.prepare(network)
    assert network.config() == before


def test_boosted_refuses_what_cannot_add():
    other = cut_of()
    other.exits._modules["blocks.0"] = Pooled("flat", 144, 4).eval()
    refused(other, Boosted(), BadNetwork, "same number of classes")
    refused(cut_of(), Boosted(0.0), InvalidArgument, "above 0")
    refused(ladder_of(2), Boosted(), BadNetwork, "parameters to train")
    stacked = off.ladder({"one": cut_of(), "two": cut_of(seed=1)})
    refused(stacked, Boosted(), BadNetwork, "ladder of 2")
    refused(stacked, Joint(equilibrium=True), BadNetwork, "ladder of 2")
    add_up(other, 0.5)
    with pytest.raises(BadNetwork, match="'stem', to which it adds, must have"):
        other(X)


def gradients_of(net, loss):
    values = [
        *net.backbone.stem.parameters(),
        *net.backbone.blocks[0].parameters(),
        net.backbone.head.weight,
    ]
    found = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(values, found, strict=True)]


def test_equilibrium_gives_the_mean_over_the_exits_behind():
    net = cut_of()
    parts = [cross_entropy(logits, Y) for logits in net(X)]
    alone = [gradients_of(net, part) for part in parts]
    with equilibrium(net):
        shared = [cross_entropy(logits, Y) for logits in net(X)]
        balanced = gradients_of(net, sum(shared))
        heads = torch.autograd.grad(sum(shared), list(net.exits.parameters()), retain_graph=True)
    assert torch.equal(torch.stack(parts), torch.stack(shared))
    behind = [
        3,
        3,
        3,
        2,
        2,
        1,
    ]  # exits behind the stem's three parameters, the block's two, and the model's own head
    for index, (got, count) in enumerate(zip(balanced, behind, strict=True)):
        torch.testing.assert_close(
            got, sum(one[index] for one in alone) / count, atol=1e-6, rtol=1e-4
        )
    for got, plain in zip(
        heads, torch.autograd.grad(sum(parts), list(net.exits.parameters())), strict=True
    ):
        torch.testing.assert_close(got, plain)


def test_equilibrium_is_gone_afterwards_also_after_an_error():
    net = cut_of()
    plain = gradients_of(net, sum(cross_entropy(logits, Y) for logits in net(X)))
    with pytest.raises(RuntimeError, match="some"), equilibrium(net):
        raise RuntimeError("some")
    again = gradients_of(net, sum(cross_entropy(logits, Y) for logits in net(X)))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_equilibrium_changes_what_joint_trains_the_model():
    nets = [cut_of(trained=False) for _ in range(2)]
    for net, choice in zip(nets, (False, True), strict=True):
        off.fit(
            net, (X, Y), recipe=Joint(epochs=1, equilibrium=choice), batch_size=6, progress=False
        )
    one, other = (net.state_dict() for net in nets)
    assert not torch.equal(one["backbone.stem.0.weight"], other["backbone.stem.0.weight"])
    assert not any(part._forward_hooks for part in nets[1].modules())


def test_joint_by_sgd_is_the_training_of_msdnets_port():
    """Momentum 0.9 without Nesterov's, weight decay 1e-4, 0.1 that falls tenfold at a half and
    three quarters.
    """
    net = cut_of(trained=False)
    (phase,) = Joint(optimizer="sgd").phases(net)
    step = phase.optimizer(phase.parameters)
    assert isinstance(step, torch.optim.SGD)
    (group,) = step.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (
        0.1,
        0.9,
        1e-4,
        False,
    )
    schedule = phase.schedule(step, 8)
    rates = []
    for _ in range(8):
        rates.append(step.param_groups[0]["lr"])
        step.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert isinstance(Joint().phases(net)[0].optimizer(phase.parameters), torch.optim.Adam)
    assert (Joint().rate, Joint(rate=0.5, optimizer="sgd").rate) == (1e-3, 0.5)
    refused(net, Joint(optimizer="lbfgs"), InvalidArgument, "adam, sgd")


def test_rates_fall_elsewhere_on_imagenet():
    net = cut_of(trained=False)
    [phase] = Joint(optimizer="sgd", falls=[1 / 3, 2 / 3], epochs=90).phases(net)
    step = phase.optimizer(phase.parameters)
    schedule = phase.schedule(step, 90)
    rates = []
    for _ in range(90):
        rates.append(step.param_groups[0]["lr"])
        step.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30)  # 0.1 ** (epoch // 30)
    refused(net, Joint(falls=[2.0]), InvalidArgument, "each of falls must be between 0 and 1")


# First rows of weights, and biases, after two epochs of the trunk alone and three of all exits:
# BranchyNet's train_main and train (github.com/kunglab/branchynet,
# a33d136af511a4852715fcf189ee9405543056d7) written out on Chainer 7.8.1 and its Adam, in float64,
# for their own 1.17 needs Python 2.
TRUNK = (
    [-0.04675058, 0.21823074, 0.44859834, 0.54607119],
    [0.5058946, 0.58982111, 0.5949988, 0.51628208, 0.36675674],
)
MIDDLE = [0.59483352, 0.36822399, 0.28142602, 0.06782915, -0.14988549]
HEAD = (
    [-0.42408929, -0.59516021, -0.62963622, -0.52315406, -0.46161502],
    [-0.54551298, -0.44494549, -0.28052064, -0.13310637, 0.08765313, 0.29213658],
)
BRANCH = (
    [-0.13765167, 0.08202197, 0.23465433, 0.41145779, 0.58853515],
    [0.42327706, 0.50112105, 0.62608632, 0.61039666, 0.45627791, 0.35614778],
)


def joined(**options):
    """The toy after two epochs of the model alone and three of all exits, on all rows at once."""
    net = toy().double()
    x = (1.3 * torch.arange(160).double()).sin().reshape(40, 4)
    y = torch.arange(40) * 7 % 6
    recipe = Joint(alone=2, epochs=3, rate=1e-2, **options)
    off.fit(net, (x, y), recipe=recipe, batch_size=40, progress=False)
    return net


def test_both_phases_step_as_branchynets_code_does():
    net = joined()
    first = net.backbone[0]
    middle = net.backbone[2]
    head = net.backbone[4]
    branch = net.exit_of("1").head[0]
    near = {"atol": 1e-6, "rtol": 0}
    for layer, (row, bias) in ((first, TRUNK), (head, HEAD), (branch, BRANCH)):
        torch.testing.assert_close(layer.weight[0].detach(), torch.tensor(row).double(), **near)
        torch.testing.assert_close(layer.bias.detach(), torch.tensor(bias).double(), **near)
    torch.testing.assert_close(middle.weight[0].detach(), torch.tensor(MIDDLE).double(), **near)


def test_the_head_may_be_kept():
    kept = joined(keep_head=True)
    dropped = joined()
    assert (kept.backbone[4].weight - dropped.backbone[4].weight).abs().max() > 1e-3
    assert kept.auxiliary == dropped.auxiliary == {}


def test_only_a_cut_models_last_layer_starts_anew():
    assert last_layer(toy()) is not None
    net = cut_of(trained=False)
    assert last_layer(net) is net.backbone.head
    before = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh()).eval()
    # nothing to start anew behind the cut
    assert last_layer(off.cut(before, torch.zeros(2, 4), at=["2"])) is None
    assert Joint(alone=1)._dropped_head(ladder_of(2)) is None
    assert Joint()._dropped_head(net) is None


def test_the_dncc_identity():
    logits = {str(m): drawn(40, 5, seed=m).double() * 6 for m in range(4)}
    y = torch.arange(40) % 5
    own = own_logs(logits, y)
    p = own.exp()
    torch.testing.assert_close(-p.mean(0).log(), -own.mean(0) - divergence(own).mean(0))
    torch.testing.assert_close(mean_log(own), p.mean(0).log())
    q = p.mean(0)
    torch.testing.assert_close(divergence(own), -p.log() + q.log() + (p - q) / q)
    assert (divergence(own) >= 0).all()


@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
def test_decorrelated_mixes_the_exits_and_their_mean(amount):
    logits = {name: drawn(12, 3, seed=index).requires_grad_() for index, name in enumerate(NODES)}
    got = sum(Decorrelated(amount).loss(TrainingOutputs(logits, {}, {}, None), batch()).values())
    own = own_logs(logits, Y)
    q = own.exp().mean(0)
    want = (1 - amount) * -own.mean(1).sum() + amount * 3 * -q.log().mean()
    torch.testing.assert_close(got, want)
    held = q.detach()
    fixed = -own - amount * (-own + held.log() + (own.exp() - held) / held)
    for one, other in zip(
        torch.autograd.grad(got, list(logits.values()), retain_graph=True),
        torch.autograd.grad(fixed.mean(1).sum(), list(logits.values())),
        strict=True,
    ):
        # holding the mean fixed changes no gradient
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_decorrelated_refuses_amounts_that_have_no_lower_end():
    for amount in (-0.1, 1.1, math.nan):
        refused(cut_of(), Decorrelated(amount), InvalidArgument, "amount must be between 0 and 1")


def test_schedules():
    model = dense(0)
    rates = {}
    tenths = dropped(1 / 2, 3 / 4)
    for schedule in (tenths, cosine):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        falling = schedule(optimizer, 8)
        rates[schedule] = []
        for _ in range(8):
            rates[schedule].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            falling.step()
    assert rates[tenths] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)
    assert rates[cosine] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    )


def test_a_boosted_network_remembers_what_it_adds(tmp_path):
    net = cut_of()
    Boosted(0.75).prepare(net)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    assert again.fingerprint() == net.fingerprint()
    assert isinstance(again.exits["backbone"], Added)
    assert again.topology == net.topology
    trace = off.record(net, (X, Y), timed=False, progress=False)
    assert torch.equal(torch.from_numpy(trace.columns["logits/backbone"]), net(X)[-1].detach())
    # not those of the model alone
    assert trace.columns["answer/backbone"].tolist() == net(X)[-1].argmax(1).tolist()
    assert (net.backbone(X).argmax(1) != net(X)[-1].argmax(1)).any()


def test_a_wrapped_exit_of_the_users_own_is_not_built_from_a_file(tmp_path):
    class Mine(nn.Module):
        pass

    net = cut_of()
    net.exits._modules["blocks.0"] = Pooled("flat", 144, 3).eval()
    Boosted().prepare(net)
    net.exits["blocks.0"].exit.config = lambda: {"name": "my.exits:Mine"}
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match=r"my\.exits:Mine.*give it again"):
        off.load(tmp_path / "net", net.backbone)


def test_keep_takes_the_answers_from_before_beside_the_labels():
    net = cut_of()
    recipe = Joint((1.0, 2.0, 0.5), keep=0.25, temperature=3.0)
    recipe.prepare(net)
    before = net(X)[-1].detach()
    torch.testing.assert_close(net.auxiliary["before"](X)[-1], before)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.1)
    outputs = outputs_of(net)
    found = recipe.loss(replace(outputs, teacher=before), batch())
    soft = (before / 3).softmax(1)
    for name, weight in zip(NODES, (1.0, 2.0, 0.5), strict=True):
        own = (outputs.logits[name] / 3).log_softmax(1)
        expected = weight * (
            0.75 * cross_entropy(outputs.logits[name], Y) - 0.25 * 9 * (soft * own).sum(1).mean()
        )
        torch.testing.assert_close(found[name], expected)
    # a copy: it does not move with the network
    torch.testing.assert_close(net.auxiliary["before"](X)[-1], before)


def test_a_model_that_only_keeps_what_it_answers_does_not_change_and_needs_no_labels():
    sgd = {
        "keep": 1.0,
        "epochs": 2,
        "rate": 0.02,
        "optimizer": "sgd",
    }  # Adam would make steps of mere rounding
    net = cut_of()
    recipe = Joint((0.0, 0.0, 1.0), norm="frozen", **sgd)
    net.backbone.drop.p = 0.0
    models = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    off.fit(net, X, recipe=recipe, batch_size=6, progress=False)
    for key, value in net.backbone.state_dict().items():
        torch.testing.assert_close(value, models[key], atol=1e-4, rtol=0)
    assert net.auxiliary == {}
    # exits train the models as well
    off.fit(net, X, recipe=Joint(**sgd), batch_size=6, progress=False)
    assert not torch.allclose(net.backbone.stem[0].weight, models["stem.0.weight"], atol=1e-3)


def test_keep_in_a_ladder_is_what_its_last_model_answers():
    ladder = ladder_of(2)
    Joint(keep=0.5).prepare(ladder)
    torch.testing.assert_close(ladder.auxiliary["before"](rows_of(5))[-1], ladder(rows_of(5))[-1])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep": 1.5}, "keep must be between 0 and 1, got 1.5"),
        ({"keep": 0.5, "temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"keep": 0.5, "alone": 1}, "alone must be 0 where keep is above 0, got 1"),
    ],
)
def test_keep_refuses_what_makes_no_sense(wrong, says):
    refused(cut_of(), Joint(**wrong), InvalidArgument, says)


class OwnHead(Exit):
    """An exit that answers by the model's own head, as some do that share it."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, seen):
        return self.head(seen.features)

    def config(self):
        return {"name": "OwnHead"}


def test_a_head_that_is_an_exit_too_is_stepped_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    net = off.cut(model, rows_of(4), at=["1"], exits=lambda shape, classes: OwnHead(model[2]))
    x = rows_of(6)
    y = torch.arange(6) % 3
    before = model[2].bias.detach().clone()
    sum(cross_entropy(logits, y) for logits in net(x)).backward()
    expected = before - 0.1 * model[2].bias.grad
    sgd = Joint(optimizer="sgd", epochs=1, rate=0.1, decay=True)
    off.fit(net, (x, y), recipe=sgd, batch_size=6, progress=False)
    torch.testing.assert_close(model[2].bias.detach(), expected, atol=1e-4, rtol=1e-3)


def test_alone_every_model_of_a_ladder_learns():
    net = ladder_of(3)
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    (first, _) = Joint(alone=1).phases(net)
    losses = Joint(alone=1).loss(
        TrainingOutputs({n: s.own for n, s in net.look(rows_of(12))}, {}, {}, net),
        replace(batch(), phase=first.name),
    )
    assert set(losses) == set(net.topology.exits)
    off.fit(net, (rows_of(12), Y), recipe=Joint(alone=1, epochs=1), batch_size=6, progress=False)
    assert all(
        not torch.equal(value, before[key]) for key, value in net.backbone.state_dict().items()
    )


def test_a_teacher_of_other_classes_is_refused():
    logits = torch.zeros(4, 10)
    assert soft_cross_entropy(logits, torch.zeros(4, 10), 1.0) == pytest.approx(math.log(10))
    with pytest.raises(BadNetwork, match="must have the student's 10 classes, got 7"):
        soft_cross_entropy(logits, torch.zeros(4, 7), 1.0)
