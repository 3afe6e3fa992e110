"""L2W-DEN: weights, trial step, routing and the gradient of the weigher, against the formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.weighted import (
    Weighted,
    keys_of,
    losses_of,
    other_values,
    routed,
    trial,
    weigh,
)
from small import cut_of, images_of, ladder_of, seeded
from waves import toy, toy_rows, wave

X = images_of(12)
Y = torch.arange(12) % 3
HALVES = torch.arange(12).chunk(2)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def begun(recipe, steps=0):
    """A network in training mode after some plain steps, the recipe's optimizer, its memory, and a
    view.
    """
    net = cut_of(trained=False).train()
    net.backbone.drop.p = 0.0
    [phase] = recipe.phases(net)
    optimizer = phase.optimizer(phase.parameters)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(cross_entropy(logits, Y) for logits in net(X)).backward()
        optimizer.step()
    optimizer.zero_grad()
    memory = seeded(lambda: recipe._memory(optimizer, 3, torch.device("cpu")), 0)
    return (
        net,
        optimizer,
        memory,
        TrainingOutputs(dict.fromkeys(net.topology.exits), {}, {"x": X}, net),
    )


@pytest.mark.parametrize(("center", "axis"), [("mat", (0, 1)), ("col", 1), ("row", 0)])
def test_weights_are_one_on_average_along_the_axis(center, axis):
    recipe = Weighted(0.3, center=center, hidden=7)
    _, _, memory, _ = begun(recipe)
    losses = drawn(6, 3).abs() * 3
    weights = recipe.weights(memory, losses)
    torch.testing.assert_close(weights.mean(axis), torch.ones_like(weights.mean(axis)))
    assert weights.std() > 1e-3
    assert (weights - 1).abs().max() <= 0.6
    layers = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 3), nn.Tanh())
    layers.load_state_dict(
        {k: memory[n] for k, n in zip(layers.state_dict(), keys_of(memory), strict=True)}
    )
    torch.testing.assert_close(weigh(memory, losses), layers(losses))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_trial_step_is_a_step_of_the_real_optimizer(steps):
    recipe = Weighted(rate=0.1, decay=0.01)
    net, optimizer, _, _ = begun(recipe, steps)
    sum(cross_entropy(logits, Y) for logits in net(X)).backward()
    values = [value for value in optimizer.param_groups[0]["params"] if value.grad is not None]
    ahead = []
    for v in values:
        ahead.append(
            trial(
                v, v.grad, optimizer.state[v].get("momentum_buffer"), optimizer.param_groups[0]
            ).clone()
        )
    optimizer.step()
    for value, led in zip(values, ahead, strict=True):
        torch.testing.assert_close(value, led)


def test_only_the_weigher_gets_a_gradient_and_it_is_that_of_differences():
    recipe = Weighted(hidden=5, rate=0.5, momentum=0.5)
    net, optimizer, memory, outputs = begun(recipe, 1)
    net.double()
    outputs = TrainingOutputs(outputs.logits, {}, {"x": X.double()}, net)
    for index, value in enumerate(optimizer.param_groups[0]["params"]):
        assert value.dtype == torch.float64
        for key, kept in optimizer.state[value].items():
            optimizer.state[value][key] = kept.double()
        assert index or "weight1" in optimizer.state[value]
    memory = optimizer.state[optimizer.param_groups[0]["params"][0]]
    before = copy.deepcopy(net.state_dict())
    got = recipe.look_ahead(outputs, Y, HALVES, optimizer, memory)
    assert all(gradient.abs().max() > 0 for gradient in got)
    assert all(value.grad is None for value in net.parameters())
    # norms saw nothing
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())

    def objective(bias):
        """The routed loss after a step along the weighted loss, with a real copy of the network and
        its optimizer.
        """
        other = copy.deepcopy(net)
        [phase] = recipe.phases(other)
        stepping = phase.optimizer(phase.parameters)
        for mine, its in zip(phase.parameters, optimizer.param_groups[0]["params"], strict=True):
            stepping.state[mine]["momentum_buffer"] = optimizer.state[its][
                "momentum_buffer"
            ].clone()
        losses = losses_of(other(outputs.inputs["x"][HALVES[0]]), Y[HALVES[0]])
        (recipe.weights({**memory, "bias2": bias}, losses) * losses).mean(0).sum().backward()
        stepping.step()
        with torch.no_grad():
            return routed(other(outputs.inputs["x"][HALVES[1]]), Y[HALVES[1]], recipe.share)

    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    for index in range(3):
        slope = (
            objective(memory["bias2"] + step[index]) - objective(memory["bias2"] - step[index])
        ) / 2e-6
        torch.testing.assert_close(got[3][index], slope, atol=1e-6, rtol=1e-3)


def test_routing_sends_the_surest_that_are_left():
    y = torch.arange(20) % 3
    logits = [drawn(20, 3, seed=seed) * 2 for seed in range(3)]
    left = set(range(20))
    want = 0.0
    q = [0.75**k / sum(0.75**j for j in (1, 2, 3)) for k in (1, 2, 3)]
    for k in range(3):
        order = sorted(left, key=lambda row, k=k: -float(logits[k][row].softmax(0).max()))
        taken = order[: int(20 * q[k])] if k < 2 else order
        want += float(cross_entropy(logits[k][taken], y[taken]))
        left -= set(taken)
    assert float(routed(logits, y, 0.75)) == pytest.approx(want, rel=1e-5)
    # exits that nobody leaves at count nothing
    assert routed([one[:1] for one in logits], y[:1], 0.75).isfinite()


def test_the_weigher_takes_the_steps_of_torchs_adam():
    recipe = Weighted(hidden=4, meta_rate=0.01, decay=0.1)
    _, optimizer, memory, _ = begun(recipe)
    copies = [memory[key].clone().requires_grad_() for key in keys_of(memory)]
    adam = torch.optim.Adam(copies, 0.01, weight_decay=0.1)
    for seed in range(3):
        for value in copies:
            value.grad = drawn(*value.shape, seed=seed)
        recipe._learn(memory, [value.grad for value in copies], optimizer)
        adam.step()
    for key, value in zip(keys_of(memory), copies, strict=True):
        torch.testing.assert_close(memory[key], value.detach())


def test_a_real_step_has_the_weights_of_the_weigher_after_its_step():
    recipe = Weighted(hidden=6, rate=0.05, meta_rate=0.05)
    net, optimizer, memory, outputs = begun(recipe)
    outputs = TrainingOutputs(dict(zip(net.topology.exits, net(X), strict=True)), {}, {"x": X}, net)
    other, twin, its, seen = begun(recipe)
    other.load_state_dict(net.state_dict())
    its.update({key: value.clone() for key, value in memory.items()})
    got = recipe.update(outputs, TrainingBatch(Y, torch.arange(12), "weighted", 0.0), optimizer)
    plain = []
    for train, meta in (HALVES, HALVES[::-1]):
        recipe._learn(its, recipe.look_ahead(seen, Y, (train, meta), twin, its), twin)
        losses = losses_of(other(X[train]), Y[train])
        plain.append(losses.detach())
        twin.zero_grad()
        (recipe.weights(its, losses).detach() * losses).mean(0).sum().backward()
        twin.step()
    assert all(
        torch.equal(value, other.state_dict()[key]) for key, value in net.state_dict().items()
    )
    assert int(memory["learned"]) == 2
    assert [float(part) for part in got.values()] == pytest.approx(
        torch.cat(plain).mean(0).tolist()
    )


def test_batch_norms_see_the_halves_alone():
    net = cut_of(trained=False)
    norm = next(part for part in net.modules() if isinstance(part, nn.BatchNorm2d))
    off.fit(
        net, (X, Y), recipe=Weighted(epochs=1, rate=0.01, hidden=4), batch_size=12, progress=False
    )
    assert int(norm.num_batches_tracked) == 2


def test_a_longer_interval_learns_in_every_nth_batch_of_an_epoch_and_one_row_is_enough():
    recipe = Weighted(hidden=6, rate=0.05, every=2, epochs=2)
    _, optimizer, memory, outputs = begun(recipe)
    outputs = TrainingOutputs(
        dict(zip(outputs.logits, outputs.network(X), strict=True)), {}, {"x": X}, outputs.network
    )
    learned = []
    # two epochs of three batches, the first of each among those that are learned from
    for step in range(6):
        recipe.update(outputs, TrainingBatch(Y, torch.arange(12), "weighted", step, 6), optimizer)
        learned.append(int(memory["learned"]))
    assert learned == [2, 2, 4, 6, 6, 8]
    outputs.network.eval()
    one = TrainingOutputs(
        {name: v[:1] for name, v in outputs.logits.items()}, {}, {"x": X[:1]}, outputs.network
    )
    recipe.update(one, TrainingBatch(Y[:1], torch.arange(1), "weighted", 0, 6), optimizer)
    assert int(memory["learned"]) == 9


def test_four_batches_step_as_the_authors_code_does():
    """What `train` of tools/main_cifar_DDP.py makes of this toy in four batches, with a meta
    interval of 2.

    github.com/LeapLabTHU/L2W-DEN, c49d5753afaaf8b22f1adcfcae526b13396e6778, run on the CPU.
    """
    recipe = Weighted(hidden=6, epochs=1, rate=0.5, meta_rate=0.05, every=2)
    net = toy().train()
    [phase] = recipe.phases(net)
    optimizer = phase.optimizer(phase.parameters)
    schedule = phase.schedule(optimizer, 4)
    memory = recipe._memory(optimizer, 2, torch.device("cpu"))
    for number, key in enumerate(keys_of(memory)):
        wave(memory[key], 10 + number, 0.7)
    x, y = toy_rows()
    for step in range(4):
        outputs = TrainingOutputs(
            dict(zip(net.topology.exits, net(x[step]), strict=True)), {}, {"x": x[step]}, net
        )
        recipe.update(
            outputs, TrainingBatch(y[step], torch.arange(10), "weighted", step, 4), optimizer
        )
        schedule.step()
    near = {"atol": 1e-6, "rtol": 1e-5}
    first = [-0.4387674, 0.3482275, 0.9133591, 0.67798, 0.2299669, 1.3642844, 1.2662808, -0.0517826]
    torch.testing.assert_close(net.backbone[0].weight[:2].flatten(), torch.tensor(first), **near)
    shallow = [0.507225, 0.234268, 0.9751228, 0.6867438, -0.199061, 0.7078826]
    torch.testing.assert_close(net.exit_of("1").head[0].bias, torch.tensor(shallow), **near)
    deep = [-0.5325186, -0.0936396, -0.1250484, -0.4844581, -0.0306763, 0.2428222]
    torch.testing.assert_close(net.backbone[4].bias, torch.tensor(deep), **near)
    torch.testing.assert_close(memory["bias2"], torch.tensor([0.2678174, 0.5719844]), **near)
    weigher = [-0.2271474, 0.0025871, -0.0147822, 0.2137122, 0.5275815, 0.6423905]
    torch.testing.assert_close(memory["weight2"][0], torch.tensor(weigher), **near)


def test_other_values_are_gone_afterwards_also_after_an_error():
    net = cut_of().train()
    before = copy.deepcopy(net.state_dict())
    own = {id(value) for value in net.parameters()}
    head = net.backbone.head
    with other_values(net, {head.weight: torch.zeros_like(head.weight)}):
        assert not head.weight.any()
        net(X)
    assert head.weight.any()
    with (
        pytest.raises(BadNetwork, match="x"),
        other_values(net, {head.weight: torch.zeros_like(head.weight)}),
    ):
        raise BadNetwork("x")
    assert {id(value) for value in net.parameters()} == own
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"center": "odd"}, "center must be one of .*, got 'odd'"),
        ({"epsilon": 1.0}, "epsilon must be at least 0 and below 1, got 1.0"),
        ({"epsilon": -0.1}, "epsilon must be at least 0 and below 1, got -0.1"),
        ({"share": 0.0}, "share must be above 0, got 0.0"),
        ({"every": 0}, "every must be a whole number of at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, says):
    with pytest.raises(InvalidArgument, match=says):
        Weighted(**wrong).prepare(cut_of())


def test_the_weigher_is_thrown_away():
    net = cut_of(trained=False)
    keys = set(net.state_dict())
    off.fit(
        net, (X, Y), recipe=Weighted(epochs=1, rate=0.01, hidden=4), batch_size=6, progress=False
    )
    assert set(net.state_dict()) == keys
    with pytest.raises(BadNetwork, match="parameters to train"):
        Weighted().prepare(ladder_of(2))


def test_a_deeper_weigher_is_the_authors_network_of_as_many_layers():
    """LeapLabTHU/L2W-DEN c49d575, models/weight_predict.py: MLP_tanh with num_layers hidden
    layers.
    """
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3), nn.Tanh()
    )
    values = [value for layer in theirs[:5:2] for value in (layer.weight, layer.bias)]
    names = [f"{kind}{number}" for number in (1, 2, 3) for kind in ("weight", "bias")]
    losses = torch.rand(5, 3)
    torch.testing.assert_close(
        weigh(dict(zip(names, values, strict=True)), losses), theirs(losses), atol=1e-6, rtol=0
    )


def test_a_deeper_weigher_is_trained():
    net = cut_of("stem", "blocks.0")
    data = (images_of(32), torch.arange(32) % 3)
    history = off.fit(
        net,
        data,
        recipe="weighted?layers=3&hidden=8&epochs=2&rate=0.01",
        batch_size=16,
        progress=False,
    )
    assert len(history.epochs) == 2
    with pytest.raises(InvalidArgument, match="layers must be a whole number of at least 1, got 0"):
        off.fit(cut_of(), data, recipe="weighted", layers=0, hidden=8, progress=False)
