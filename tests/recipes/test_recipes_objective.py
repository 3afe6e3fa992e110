"""JEI-DNN: probabilities of leaving, losses and targets by hand, turns, and what a price buys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import offramp as off
from offramp.errors import BadInput, BadNetwork
from offramp.recipes.objective import (
    PRICES,
    Objective,
    activations,
    costs_by,
    exit_losses,
    gate_losses,
    leaving,
    targets,
)
from small import cut_of, images_of, ladder_of

X = images_of(72)
Y = (X.mean((1, 2, 3)) > 0).long()
GATES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6)


@given(GATES)
def test_leaving_is_a_distribution_whose_chain_is_that_of_the_activations(g):
    p = leaving(torch.tensor([g]))
    assert p.shape == (1, len(g) + 1)
    assert (p >= 0).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    a, left = activations(p)[0].tolist(), 1.0
    assert all(0 <= each <= 1 for each in a)
    for each, expected in zip(a, p[0].tolist(), strict=True):
        assert each * left == pytest.approx(expected, abs=1e-5)
        left *= 1 - each


def test_leaving_by_hand():
    g = torch.tensor([[0.2, 0.3, 0.1], [0.7, 0.6, 0.5], [1.0, 0.9, 0.0]])
    expected = torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.7, 0.3, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(leaving(g), expected)


def test_weighted_losses_of_a_row_add_up_to_its_unweighted_sum_and_teach_where_it_leaves():
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 0.5]], requires_grad=True)
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    found = exit_losses(losses, p)
    scale = torch.tensor([6 / 1.5, 5.5 / 0.625])
    torch.testing.assert_close(found, (scale[:, None] * p * losses).mean(0))
    assert found.sum().item() == pytest.approx((6 + 5.5) / 2)
    found.sum().backward()
    torch.testing.assert_close(losses.grad, scale[:, None] * p / 2)


def test_targets_are_one_from_the_best_exit_on():
    losses = torch.tensor([[0.1, 0.1, 0.0], [2.0, 0.3, 0.1], [2.0, 1.5, 0.1]])
    costs = torch.tensor([0.2, 0.5, 1.0])
    assert targets(losses + 0.7 * costs).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert targets(losses + 0.0 * costs).tolist() == [[0, 0], [0, 0], [0, 0]]  # for nothing, the last exit is best
    assert targets(losses + 9.0 * costs).tolist() == [[1, 1], [1, 1], [1, 1]]


def test_positives_weigh_as_much_as_the_negatives_to_each():
    logits, wanted = torch.tensor([[0.3, -1.0], [2.0, 0.0], [0.5, 1.0]]), torch.tensor([[1.0, 0], [0, 0], [0, 0]])
    weights = [3 / 2, 4 / 1]
    g = logits.sigmoid()
    each = -(torch.tensor(weights) * wanted * g.log() + (1 - wanted) * (1 - g).log())
    torch.testing.assert_close(gate_losses(logits, wanted), each.mean(0))


def test_costs_are_measured_or_given_and_the_last_is_one():
    net = cut_of(gate="uncertainty")
    measured = costs_by(None, net)
    trace = off.record(net, (X, Y), timed=False, progress=False)
    every = trace.prices.to_exit(net.chain.gates, None)
    assert measured == pytest.approx((every / every[-1]).tolist())
    assert measured[0] < measured[1] < measured[2] == 1
    assert costs_by([2, 3, 4], net) == [0.5, 0.75, 1]
    assert costs_by({"backbone": 4, "stem": 1, "blocks.0": 2}, net) == [0.25, 0.5, 1]
    with pytest.raises(BadInput, match="for each of stem, blocks"):
        costs_by([1, 2], net)
    with pytest.raises(BadNetwork, match="give costs="):
        costs_by(None, ladder_of(2))


def taught(price=0.7, **options):
    net = cut_of(taught=False, gate="uncertainty")
    off.fit(net, (X, Y), recipe=Objective(price, **options), batch_size=24, progress=False)
    return net


def test_exits_and_gates_take_turns():
    class Watched(Objective):
        def update(self, view, lesson, optimiser):
            net = view.network
            before = [[v.clone() for v in part.parameters()] for part in (net.exits, net.gates)]
            found = super().update(view, lesson, optimiser)
            after = [[*part.parameters()] for part in (net.exits, net.gates)]
            moved = [
                any(not torch.equal(one, other) for one, other in zip(*both, strict=True))
                for both in zip(before, after, strict=True)
            ]
            seen.append(moved)
            assert set(found) == {"stem", "blocks.0", "backbone", "gate/stem", "gate/blocks.0"}
            return found

    seen: list[list[bool]] = []
    net = cut_of(taught=False, gate="uncertainty")
    off.fit(net, (X, Y), recipe=Watched(warm=0, epochs=4, every=2), batch_size=24, progress=False)
    assert seen == ([[True, False]] * 2 + [[False, True]] * 2) * 3
    assert net.aids == {}


def test_the_warm_up_teaches_exits_alone():
    net = cut_of(gate="uncertainty")
    Objective().prepare(net)
    warm, both = Objective().phases(net)
    assert len(warm.parameters) == 4
    assert len(both.parameters) == 8
    assert net.aids[PRICES].costs[-1] == 1
    assert [phase.reads for phase in (warm, both)] == ["pooled", "pooled"]
    assert len(Objective(warm=0).phases(net)) == 1


def test_a_higher_price_makes_more_rows_leave_early():
    x, shares = images_of(300, 7), []
    for price in (0.0, 0.3, 5.0):
        net = taught(price, warm=5, epochs=20, every=5, costs=[0.2, 0.6, 1.0])
        shares.append(({n: s for n, _, s in net.walk(x)}["stem"] >= 0).float().mean().item())
    assert shares[0] < shares[1] < shares[2]


@pytest.mark.parametrize(
    ("net", "recipe", "error", "says"),
    [
        (lambda: cut_of(), Objective(), BadNetwork, "gate='uncertainty'"),
        (lambda: ladder_of(2), Objective(), BadNetwork, "parameters"),
        (lambda: cut_of(gate="uncertainty"), Objective(every=0), BadInput, "every is 0"),
        (lambda: cut_of(gate="uncertainty"), Objective(costs=[1]), BadInput, "the costs are"),
    ],
)
def test_what_does_not_fit_is_refused(net, recipe, error, says):
    made = net()
    before = made.fingerprint()
    with pytest.raises(error, match=says):
        off.fit(made, (X, Y), recipe=recipe, progress=False)
    assert made.fingerprint() == before
    assert made.aids == {}
