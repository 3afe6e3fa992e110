"""Gates that look at earlier exits: against slow references, hung on by name, run and replayed like
any other.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import offramp as off
from offramp.building.factories import make_gate
from offramp.errors import InvalidArgument
from offramp.gates.agreement import Agreement
from offramp.gates.confidence import margin
from offramp.gates.ensemble import Ensemble
from offramp.gates.patience import Patience
from offramp.gates.uncertainty import Uncertainty
from offramp.networks.nodes import Scorer, Seen
from small import cut_of, images_of, ladder_of, rows_of
from waves import wave_of

READING = ("patience", "agreement", "ensemble", "uncertainty")
NAMES = ("a", "b", "c")


def answering(*classes, count=4):
    """Logits [1, C] whose largest is the given one, per exit."""
    return [
        torch.nn.functional.one_hot(torch.tensor([each]), count).float() * 3 for each in classes
    ]


def counter(classes):
    """PABEE's counter at each exit, as a loop."""
    found = [0]
    count = 0
    for before, here in pairwise(classes):
        count = count + 1 if here == before else 0
        found.append(count)
    return found


def scores(classes):
    every = answering(*classes)
    names = [f"exit{index}" for index in range(len(classes))]
    earlier = dict(zip(names, every, strict=True))
    return [
        Patience(names[:index]).score(Seen(own, earlier, own)).item()
        for index, own in enumerate(every)
    ]


@pytest.mark.parametrize(
    "classes", [(1,), (2, 2, 2, 2), (0, 1, 1, 1), (0, 0, 1, 1, 1, 0, 0), (3, 2, 3, 2)]
)
def test_patience_counts_as_the_loop_does(classes):
    assert scores(classes) == counter(classes)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_constant_answers_leave_at_exit_patience_plus_one(patience):
    counted = scores((1, 1, 1, 1, 1))
    assert [score >= patience for score in counted].index(True) + 1 == patience + 1


def test_agreement_is_the_probability_of_drawing_the_same_class():
    own = torch.tensor([[2.0, -1.0, 0.5]])
    before = torch.tensor([[0.0, 1.0, 3.0]])
    p = own.softmax(-1)[0].tolist()
    q = before.softmax(-1)[0].tolist()
    expected = sum(one * other for one, other in zip(p, q, strict=True))
    assert Agreement("a").score(Seen(own, {"a": before}, own)).item() == pytest.approx(expected)
    assert Agreement().score(Seen(own, {}, own)).item() == pytest.approx(
        sum(one * one for one in p)
    )


def test_the_ensemble_is_the_margin_of_the_mean_log_probabilities():
    own, a, b = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = margin((own.log_softmax(-1) + a.log_softmax(-1) + b.log_softmax(-1)) / 3)
    torch.testing.assert_close(
        Ensemble(("a", "b")).score(Seen(own, {"a": a, "b": b}, own)), expected
    )
    torch.testing.assert_close(Ensemble().score(Seen(own, {}, own)), margin(own))


def test_an_ensemble_hands_its_inner_gate_what_that_reads():
    gate = Ensemble(("a",), Patience(("a", "b")))
    assert gate.reads == ("a", "b")
    assert make_gate(gate.config()).config() == gate.config()


def test_the_four_numbers_of_uncertainty():
    p = torch.tensor([0.5, 0.3, 0.2])
    squares = p**2 / (p**2).sum()
    expected = [0.5, -(p * p.log()).sum().item(), 0.2, -(squares * squares.log()).sum().item()]
    own = p.log()[None].requires_grad_()
    gate = Uncertainty()
    for index, value in enumerate(expected):
        with torch.no_grad():
            gate.unit.weight.copy_(torch.eye(4)[index : index + 1])
            gate.unit.bias.zero_()
        assert gate.score(Seen(own, {}, own)).item() == pytest.approx(value, abs=1e-6)
    gate.score(Seen(own, {}, own)).sum().backward()
    assert own.grad is None
    assert gate.unit.weight.grad is not None


def test_an_untrained_uncertainty_gate_ranks_by_the_margin_of_probabilities():
    own = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    two = own.softmax(-1).topk(2).values
    torch.testing.assert_close(Uncertainty().score(Seen(own, {}, own)), two[:, 0] - two[:, 1] - 0.5)


# Twelve rows of logits for three exits, and what ClassifierTrainingHelper makes of them under these
# units: activations at each exit, and where rows leave (3 would be the model's own answer).
# github.com/networkslab/dynn, 8dd598d48f50f61fbea584e951db17952f456964.
UNITS = [
    ([1.0, -0.4, 0.8, 0.2], -1.0),
    ([0.5, -0.3, 1.2, -0.2], -0.9),
    ([0.8, -0.6, 0.4, 0.3], -0.5),
]
ACTIVATIONS = [
    [
        *(0.2537864, 0.2701522, 0.2913879, 0.2718428, 0.3333414, 0.3546369),
        *(0.3350847, 0.3955793, 0.4770325, 0.5209019, 0.4109314, 0.5435186),
    ],
    [
        *(0.2363728, 0.3112018, 0.4855372, 0.6362326, 0.7338446, 0.6337685),
        *(0.3777255, 0.7263499, 0.8780166, 0.8102972, 0.4652523, 0.8564469),
    ],
    [
        0.5476279,
        0.6434239,
        0.9083003,
        1.0,
        0.9999998,
        0.9999999,
        0.9884911,
        1.0,
        0.9999989,
        0.9999998,
        1.0,
        1.0,
    ],
]
LEAVE = [2, 2, 2, 1, 1, 1, 2, 1, 1, 0, 2, 0]


def jei():
    """The gates of three exits, with what each sees."""
    z = wave_of(12, 4, 5, step=1.9, scale=3.0) * torch.linspace(0.1, 1.6, 12)[:, None, None]
    names = ("a", "b", "c")
    gates = [Uncertainty(names[:index]) for index in range(3)]
    for gate, (weight, bias) in zip(gates, UNITS, strict=True):
        with torch.no_grad():
            gate.unit.weight.copy_(torch.tensor([weight]))
            gate.unit.bias.fill_(bias)
    for index, gate in enumerate(gates):
        gate.follow(gates[:index])
    earlier = {name: z[:, index] for index, name in enumerate(names)}
    return gates, [Seen(z[:, index], earlier, z[:, index]) for index in range(3)]


def test_uncertainty_scores_activations_as_the_authors_code_does():
    gates, seen = jei()
    scores = torch.stack([gate.score(one) for gate, one in zip(gates, seen, strict=True)]).detach()
    torch.testing.assert_close(scores.sigmoid(), torch.tensor(ACTIVATIONS), atol=1e-6, rtol=0)
    fires = torch.cat([scores >= 0, torch.ones(1, 12, dtype=torch.bool)])
    assert fires.int().argmax(0).tolist() == LEAVE
    alone = torch.stack([gate.logit(one.own) for gate, one in zip(gates, seen, strict=True)])
    assert (alone >= 0).any(0).sum() == 2  # by its own g alone a row would hardly ever leave


def test_two_gates_of_four_tenths_let_a_row_leave_at_the_second():
    own = torch.tensor([[1.0, 0.0, -1.0]])
    gates = [Uncertainty(), Uncertainty(("a",)), Uncertainty(("a", "b"))]
    for gate in gates:
        with torch.no_grad():
            gate.unit.weight.zero_()
            gate.unit.bias.fill_(torch.logit(torch.tensor(0.4)))
    seen = Seen(own, {"a": own, "b": own}, own)
    for index, gate in enumerate(gates):
        gate.follow(gates[:index])
    assert [gate.score(seen).sigmoid().item() for gate in gates] == pytest.approx(
        [0.4, 2 / 3, 1], abs=2e-6
    )
    with torch.no_grad():  # nobody is left at the third
        gates[2].earlier_bias.fill_(2.0)
    assert gates[2].score(seen).item() == pytest.approx(math.log(2**20 - 1))
    halved = gates[2].half().score(Seen(own.half(), {"a": own.half(), "b": own.half()}, own.half()))
    assert halved.item() == pytest.approx(math.log(2**20 - 1))


def test_a_first_gate_and_one_of_the_first_edition_score_their_own_logit():
    for gate in (make_gate({"name": "Uncertainty"}), make_gate("uncertainty", ())):
        assert (gate.reads, gate.config()) == ((), {"name": "Uncertainty"})
        own = torch.tensor([[40.0, 0.0, -1.0]])
        assert gate.score(Seen(own, {}, own)).item() == gate.logit(own).item() == 0.5
    later = make_gate("uncertainty", ("a",))
    assert (
        make_gate(later.config()).config()
        == later.config()
        == {"name": "Uncertainty", "earlier": ["a"]}
    )


@pytest.mark.parametrize("gate", READING)
def test_they_hang_on_by_name_and_run_as_their_trace_says(gate, tmp_path):
    net = cut_of("stem", "blocks.0", "blocks.1", gate=gate)
    x = images_of(60, 3)
    y = torch.arange(60) % 3
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", net.backbone)
    trace = off.record(again, (x, y), timed=False, progress=False)
    plan = off.calibrate(trace, budget=0.9)
    thresholds = {
        name: float(trace.columns[f"score/{name}"].mean()) + 1e-3 for name in net.topology.gates
    }
    for some in (plan, off.Plan.by_hand(thresholds)):
        replayed = trace.replay(some)
        run = off.run(again, some, x)
        assert (run.exit.numpy() == replayed.exit).all()
    assert len(set(replayed.exit.tolist())) > 1
    if gate == "patience":
        assert net.gate_of("blocks.1").reads == ("stem", "blocks.0")


def test_they_hang_on_members_of_a_ladder():
    net = ladder_of(3, gate="patience")
    assert [net.gate_of(name).reads for name in net.topology.gates] == [(), ("small",)]
    x = rows_of(30)
    logits = dict(zip(net.topology.exits, net(x), strict=True))
    found = {name: score for name, _, score in net.walk(x)}
    agree = logits["small"].argmax(1) == logits["middle"].argmax(1)
    assert torch.equal(found["middle"], agree.float())
    assert 0 < agree.sum() < 30


def test_a_gate_that_reads_is_not_made_where_no_exit_is_known():
    with pytest.raises(InvalidArgument, match="reads earlier exits"):
        make_gate("patience")


def test_a_function_of_logits_is_still_a_score():
    assert isinstance(make_gate(margin), Scorer)
    assert isinstance(make_gate(torch.amax), Scorer)  # has no signature
