"""Ladders: what is stacked, what is refused, and that nothing of the user's is changed."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from offramp.building.cutting import check_classes, ladder
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.gates.tempered import Tempered
from offramp.layers.preprocess import Preprocess
from small import dense, ladder_of, rows_of


def test_names_and_order():
    assert ladder([dense(0), dense(1), dense(2)]).topology.exits == (
        "member1",
        "member2",
        "member3",
    )
    net = ladder({"a-1": dense(0), "b_2": (dense(1), None)}, sources={"a-1": "offramp:resnet20"})
    assert net.topology.exits == ("a-1", "b_2")
    assert [member.spec for member in net.members] == ["offramp:resnet20", None]
    assert [node.successors for node in net.topology.nodes] == [("leave", "b_2"), ("leave",)]


def test_nothing_is_copied_or_changed():
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(), dense(1)]
    before = copy.deepcopy([model.state_dict() for model in models])
    net = ladder(models, example=rows_of(8))
    assert net.backbone["member1"] is models[0]
    assert [model.training for model in models] == [True, False]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_trained_models_make_a_network_that_can_be_used_at_once():
    net = ladder(
        [(dense(0), Preprocess()), dense(1)], gate=Tempered(ladder_of(2).gates["small"], 2.0)
    )
    net.require_eval()
    assert not net.training
    assert ladder([dense(0), dense(1).train()]).training


def test_the_logits_are_those_of_the_models():
    models = [dense(index) for index in range(3)]
    x = rows_of(6)
    for model, logits in zip(models, ladder(models)(x), strict=True):
        assert torch.equal(model(x), logits)


def test_each_member_has_a_front_of_its_own():
    x = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    flat = [nn.Sequential(nn.Flatten(), dense(index)).eval() for index in range(2)]
    net = ladder([(flat[0], Preprocess()), (flat[1], Preprocess((0.5,), (0.1,)))]).eval()
    first, second = net(x)
    assert torch.equal(first, flat[0](x / 255))
    torch.testing.assert_close(second, flat[1]((x / 255 - 0.5) / 0.1))


def test_a_mean_is_the_log_of_mean_probabilities():
    models = [dense(index) for index in range(3)]
    x = rows_of(6)
    probabilities = torch.stack([model(x).softmax(-1) for model in models])
    for index, logits in enumerate(ladder(models, answer="mean")(x)):
        torch.testing.assert_close(logits.exp(), probabilities[: index + 1].mean(0))


def test_a_gate_for_each_member():
    net = ladder(
        [dense(0), dense(1), dense(2)],
        gate={"member1": "max_prob", "member2": lambda logits: logits[:, 0]},
    )
    assert net.gates["member1"].config() == {"name": "max_prob"}
    (_, _, _), (_, own, score), (_, _, none) = net.walk(rows_of(4))
    assert torch.equal(score, own[:, 0])
    assert none is None


@pytest.mark.parametrize(
    ("members", "options", "error", "says"),
    [
        ([], {}, BadNetwork, "at least two"),
        ([dense(0)], {}, BadNetwork, "at least two"),
        ([dense(0), "resnet"], {}, BadNetwork, "must be a torch.nn.Module"),
        ([dense(0), (dense(0), 5)], {}, BadNetwork, "must be a torch.nn.Module"),
        ({"a.b": dense(0), "c": dense(1)}, {}, InvalidArgument, "letters"),
        ({"": dense(0), "c": dense(1)}, {}, InvalidArgument, "letters"),
        ({"keys": dense(0), "c": dense(1)}, {}, InvalidArgument, "torch module"),
        ({"x": dense(0), "c": dense(1)}, {}, InvalidArgument, "meaning"),
        ({"last": dense(0), "c": dense(1)}, {}, InvalidArgument, "meaning"),
        ({"a": dense(0), "backbone": dense(1)}, {}, InvalidArgument, "meaning"),
        ([dense(0), dense(1)], {"answer": "median"}, InvalidArgument, "own"),
        ([dense(0), dense(1)], {"gate": "margn"}, UnknownName, "margin"),
        ([dense(0), dense(1)], {"gate": {}}, InvalidArgument, "member1"),
        (
            [dense(0), dense(1)],
            {"gate": {"member1": "margin", "member2": "margin"}},
            InvalidArgument,
            "none for the last",
        ),
        ([dense(0), dense(1, classes=5)], {"example": rows_of(2)}, BadNetwork, "classes"),
        ([dense(0), dense(1, classes=1)], {"example": rows_of(2)}, BadNetwork, "two classes"),
        ([nn.Identity(), nn.Flatten(0)], {"example": rows_of(2)}, BadNetwork, "logits"),
    ],
)
def test_what_is_refused(members, options, error, says):
    with pytest.raises(error, match=says):
        ladder(members, **options)


def test_check_classes():
    assert check_classes(ladder_of(3), rows_of(2)) == 3


def test_a_network_keeps_nothing_alive():
    net = ladder_of(2)
    gone = weakref.ref(net)
    del net
    assert gone() is None
