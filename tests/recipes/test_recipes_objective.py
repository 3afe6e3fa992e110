"""JEI-DNN: probabilities of leaving, losses and targets by hand, turns, and what a price buys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.recipe import TrainingBatch, TrainingOutputs
from offramp.recipes.objective import (
    AIMS,
    BALANCE,
    PRICES,
    Balance,
    Objective,
    activations,
    costs_by,
    exit_losses,
    gate_losses,
    leaving,
    targets,
)
from small import cut_of, images_of, ladder_of
from waves import toy_rows, wave

X = images_of(72)
Y = (X.mean((1, 2, 3)) > 0).long()
GATES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6)


@given(GATES)
def test_leaving_is_a_distribution_whose_chain_is_that_of_the_activations(g):
    p = leaving(torch.tensor([g]))
    assert p.shape == (1, len(g) + 1)
    assert (p >= 0).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    a = activations(p)[0].tolist()
    left = 1.0
    assert all(0 <= each <= 1 for each in a)
    for each, expected in zip(a, p[0].tolist(), strict=True):
        assert each * left == pytest.approx(expected, abs=1e-5)
        left *= 1 - each


def test_leaving_by_hand():
    g = torch.tensor([[0.2, 0.3, 0.1], [0.7, 0.6, 0.5], [1.0, 0.9, 0.0]])
    expected = torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.7, 0.3, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(leaving(g), expected)


@pytest.mark.parametrize("detach", [False, True])
def test_weighted_losses_of_a_row_add_up_to_its_unweighted_sum(detach):
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 0.5]], requires_grad=True)
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    found = exit_losses(losses, p, detach=detach)
    scale = torch.tensor([6 / 1.5, 5.5 / 0.625])
    torch.testing.assert_close(found, (scale[:, None] * p * losses).mean(0) / 3)
    assert found.sum().item() == pytest.approx((6 + 5.5) / 2 / 3)
    found.sum().backward()
    # with a gradient, as in the authors' code, exits learn from the plain mean
    slope = scale[:, None] * p / 6 if detach else torch.full((2, 3), 1 / 6)
    torch.testing.assert_close(losses.grad, slope)


def test_targets_are_one_from_the_best_exit_on():
    losses = torch.tensor([[0.1, 0.1, 0.0], [2.0, 0.3, 0.1], [2.0, 1.5, 0.1]])
    costs = torch.tensor([0.2, 0.5, 1.0])
    assert targets(losses + 0.7 * costs).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert targets(losses + 0.0 * costs).tolist() == [
        [0, 0],
        [0, 0],
        [0, 0],
    ]  # for nothing, the last exit is best
    assert targets(losses + 9.0 * costs).tolist() == [[1, 1], [1, 1], [1, 1]]


def test_ones_weigh_as_they_are_told():
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.0], [0.5, 1.0]])
    wanted = torch.tensor([[1.0, 1], [0, 0], [0, 1]])
    weights = torch.tensor([1.5, 4.0])
    g = logits.sigmoid()
    each = -(weights * wanted * g.log() + (1 - wanted) * (1 - g).log())
    torch.testing.assert_close(gate_losses(logits, wanted, weights), each.mean(0) / 2)


def test_the_weights_of_ones_follow_the_rows_that_were_optimal_exactly_there():
    balance = Balance(3)
    assert balance.weight.tolist() == [1, 1, 1]
    balance.count(torch.tensor([0, 0, 2, 3, 0]))
    balance.count(torch.tensor([2, 3, 3, 0, 2]))
    balance.end_epoch()
    # nobody was optimal at the second: at most 5
    assert balance.weight.tolist() == pytest.approx([6 / 4, 5, 7 / 3])
    assert (balance.optimal.sum(), balance.rows) == (0, 0)


def test_costs_are_measured_or_given_and_the_last_is_one():
    net = cut_of(gate="uncertainty")
    measured = costs_by(None, net)
    trace = off.record(net, (X, Y), timed=False, progress=False)
    every = trace.prices.to_exit(net.topology.gates, None)
    assert measured == pytest.approx((every / every[-1]).tolist())
    assert measured[0] < measured[1] < measured[2] == 1
    assert costs_by([2, 3, 4], net) == [0.5, 0.75, 1]
    assert costs_by({"backbone": 4, "stem": 1, "blocks.0": 2}, net) == [0.25, 0.5, 1]
    with pytest.raises(InvalidArgument, match="for each of stem, blocks"):
        costs_by([1, 2], net)
    with pytest.raises(BadNetwork, match="Give costs="):
        costs_by(None, ladder_of(2))


def trained(price=0.7, **options):
    net = cut_of(trained=False, gate="uncertainty")
    off.fit(net, (X, Y), recipe=Objective(price, **options), batch_size=24, progress=False)
    return net


def test_gates_and_exits_take_turns():
    class Watched(Objective):
        def update(self, outputs, batch, optimizer):
            net = outputs.network
            before = [[v.clone() for v in part.parameters()] for part in (net.exits, net.gates)]
            found = super().update(outputs, batch, optimizer)
            after = [[*part.parameters()] for part in (net.exits, net.gates)]
            moved = []
            for both in zip(before, after, strict=True):
                moved.append(
                    any(not torch.equal(one, other) for one, other in zip(*both, strict=True))
                )
            seen.append(moved)
            assert set(found) == {"stem", "blocks.0", "backbone", "gate/stem", "gate/blocks.0"}
            return found

    seen: list[list[bool]] = []
    net = cut_of(trained=False, gate="uncertainty")
    off.fit(net, (X, Y), recipe=Watched(warm=0, epochs=4, every=2), batch_size=24, progress=False)
    # every epoch begins with the gates
    assert seen == [[False, True], [True, False], [False, True]] * 4
    assert net.auxiliary == {}


def turns(recipe, batches, epochs):
    return "".join(
        "g" if recipe._gates_turn(step, batches) else "e" for step in range(batches * epochs)
    )


def test_turns_are_shorter_in_short_epochs():
    assert turns(Objective(every=2), 7, 2) == "ggeegge" * 2
    assert turns(Objective(every=200), 4, 2) == "ggee" * 2
    assert turns(Objective(every=200), 1, 4) == "gege"


def test_the_warm_up_trains_exits_alone():
    net = cut_of(gate="uncertainty")
    Objective().prepare(net)
    warm, both = Objective().phases(net)
    assert len(warm.parameters) == 4
    assert len(both.parameters) == 8
    assert both.continues == warm.parameters
    assert net.auxiliary[PRICES].costs[-1] == 1
    assert net.auxiliary[BALANCE].weight.tolist() == [1, 1]
    assert [phase.reads for phase in (warm, both)] == ["pooled", "pooled"]
    [alone] = Objective(warm=0).phases(net)
    assert alone.continues == ()


def gated():
    """Three exits with gates before the model's own, all weights being waves."""
    layers = [nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)]
    body = [part for layer in layers for part in (layer, nn.Tanh())]
    at = ["1", "3", "5"]
    net = off.cut(
        nn.Sequential(*body, nn.Linear(5, 6)).eval(),
        torch.zeros(2, 4),
        at=at,
        exits="linear",
        gate="uncertainty",
    )
    heads = [net.exit_of(name).head[0] for name in at]
    for number, layer in enumerate((*layers, net.backbone[8], *heads)):
        wave(layer.weight, 2 * number, 0.6)
        wave(layer.bias, 2 * number + 1, 0.6)
    for number, name in enumerate(at):
        unit = net.gate_of(name).unit
        wave(unit.weight, 20 + 2 * number, 0.5)
        wave(unit.bias, 21 + 2 * number, 0.5)
        unit.bias.data.sub_(0.7)
    return net


# Per epoch after a warm-up of one: the rate, the weights of ones, the first exit's bias, the first
# row of the third exit's weight, the three gates' weights and the last one's bias.
EPOCHS = [
    (
        *(0.1, [1.0, 1.0, 1.0]),
        [0.1716071, -0.2338471, -1.0669158, 0.1986807, 0.3001968, -1.1161436],
        [0.5714254, 0.5243664, 0.4658973, 0.3668132, 0.126357],
        [0.454026, 0.4726931, 0.474981, 0.358431],
        [0.0052058, -0.0923876, -0.3402098, -0.3578971],
        [-0.4436817, -0.2693188, -0.1912984, 0.0619006],
        [-0.7229978],
    ),
    (
        *(0.08538462838120872, [0.739130437374115, 5.0, 5.0]),
        [0.3647136, -0.1837436, -1.216042, 0.3182591, 0.3785611, -1.4073561],
        [0.5648769, 0.5146359, 0.4634458, 0.3702189, 0.122639],
        [0.4441347, 0.4023594, 0.473747, 0.2934059],
        [0.0481561, 0.247616, -0.336712, -0.0328973],
        [-0.4016623, 0.1259177, -0.1907031, 0.4516942],
        [-0.5011446],
    ),
    (
        *(0.0501, [1.105263113975525, 5.0, 3.444444417953491]),
        [0.4519432, -0.1659201, -1.2794759, 0.3732284, 0.4132808, -1.5381112],
        [0.5615659, 0.511454, 0.4636117, 0.3707753, 0.1204233],
        [0.436985, 0.3541415, 0.4723963, 0.2493655],
        [0.0944067, 0.5769204, -0.3307808, 0.2728188],
        [-0.3676708, 0.4499336, -0.1900092, 0.7723691],
        [-0.3195103],
    ),
]


def test_it_steps_as_the_authors_code_does():
    """get_warmup_loss, train_single_epoch and set_from_validation on this toy, whose batches come
    in order.

    github.com/networkslab/dynn, 8dd598d48f50f61fbea584e951db17952f456964. Rows that are optimal at
    an exit were counted there as here, on the batches that came by.
    """
    net = gated()
    recipe = Objective(0.1, costs=[0.2, 0.5, 0.8, 1.0], warm=1, epochs=3, every=2, rate=0.1)
    recipe.prepare(net)
    warm, joint = recipe.phases(net)
    x, y = toy_rows()

    def outputs_of(rows):
        seen = dict(net.look(rows))
        return TrainingOutputs(
            {n: s.own for n, s in seen.items()}, {n: s.features for n, s in seen.items()}, {}, net
        )

    first, second = (phase.optimizer(phase.parameters) for phase in (warm, joint))
    for step in range(4):
        first.zero_grad()
        sum(
            recipe.loss(
                outputs_of(x[step]), TrainingBatch(y[step], torch.arange(10), "warm-up", step, 4)
            ).values()
        ).backward()
        first.step()
    near = {"atol": 1e-6, "rtol": 1e-5}
    warmed = [-0.1118128, -0.3206331, -0.8393487, 0.0240564, 0.181604, -0.6810549]
    torch.testing.assert_close(net.exit_of("1").head[0].bias.detach(), torch.tensor(warmed), **near)
    for value in joint.continues:
        second.state[value] = first.state[value]
    schedule = joint.schedule(second, 12)
    for epoch, (rate, weight, bias, row, *gates) in enumerate(EPOCHS):
        for step in range(4):
            assert second.param_groups[0]["lr"] == pytest.approx(rate)
            recipe.update(
                outputs_of(x[step]),
                TrainingBatch(y[step], torch.arange(10), "both", 4 * epoch + step, 12),
                second,
            )
            schedule.step()
        assert net.auxiliary[BALANCE].weight.tolist() == pytest.approx(weight)
        units = [net.gate_of(name).unit for name in ("1", "3", "5")]
        found = [net.exit_of("1").head[0].bias, net.exit_of("5").head[0].weight[0]]
        found += [unit.weight[0] for unit in units] + [units[2].bias]
        for got, expected in zip(found, (bias, row, *gates), strict=True):
            torch.testing.assert_close(got.detach(), torch.tensor(expected), **near)
    assert torch.equal(
        net.gate_of("5").earlier_weight, torch.cat([unit.weight for unit in units[:2]])
    )
    assert torch.equal(net.gate_of("3").earlier_bias, units[0].bias)


def test_a_higher_price_makes_more_rows_leave_early():
    x = images_of(300, 7)
    shares = []
    for price in (0.0, 0.3, 5.0):
        net = trained(price, warm=5, epochs=40, every=5, rate=0.3, costs=[0.2, 0.6, 1.0])
        shares.append(({n: s for n, _, s in net.walk(x)}["stem"] >= 0).float().mean().item())
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize(
    ("net", "recipe", "error", "says"),
    [
        (lambda: cut_of(), Objective(), BadNetwork, "gate='uncertainty'"),
        (lambda: ladder_of(2), Objective(), BadNetwork, "parameters"),
        (
            lambda: cut_of(gate="uncertainty"),
            Objective(every=0),
            InvalidArgument,
            "every must be a whole number of at least 1, got 0",
        ),
        (
            lambda: cut_of(gate="uncertainty"),
            Objective(costs=[1]),
            InvalidArgument,
            "costs must be",
        ),
    ],
)
def test_what_does_not_fit_is_refused(net, recipe, error, says):
    made = net()
    before = made.fingerprint()
    with pytest.raises(error, match=says):
        off.fit(made, (X, Y), recipe=recipe, progress=False)
    assert made.fingerprint() == before
    assert made.auxiliary == {}


def test_what_a_gate_weighs_against_cost():
    """networkslab/dynn 8dd598d, gate_training_helper.py: cross-entropy, -correct, and -probability
    where correct.
    """
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0]]])
    y = torch.tensor([1, 2])
    p = logits.softmax(2)
    want = {
        "cross_entropy": -torch.stack([p[0, :, 1], p[1, :, 2]]).log(),
        "zero_one": torch.tensor([[0.0, -1.0], [-1.0, -1.0]]),
        "probability": -torch.stack([torch.stack([torch.tensor(0.0), p[0, 1, 1]]), p[1, :, 2]]),
    }
    for name, expected in want.items():
        torch.testing.assert_close(AIMS[name](logits, y), expected, atol=1e-6, rtol=0)


def test_an_aim_that_is_none_is_refused():
    with pytest.raises(
        InvalidArgument,
        match="aim must be one of cross_entropy, zero_one, probability, got 'accuracy'",
    ):
        Objective(aim="accuracy").prepare(cut_of("stem"))
