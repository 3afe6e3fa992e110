"""A Runner refuses a network that changed, and rows that do not fit."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import ladder
from offramp.errors import BadData, BadNetwork, StaleRunner
from offramp.plans.plan import Plan
from small import dense, ladder_of, rows_of


def add_in_place(net):
    with torch.no_grad():
        net.backbone["small"].weight.add_(1)


def add_in_inference_mode(net):
    with torch.inference_mode():
        net.backbone["small"].weight.add_(1)


def new_parameter(net):
    net.backbone["small"].weight = nn.Parameter(torch.zeros(3, 4))


def new_data(net):
    net.backbone["small"].weight.data = torch.zeros(3, 4)


def new_model(net):
    net.backbone["small"] = nn.Linear(4, 3).eval()


def new_layer(net):
    net.backbone["middle"][0] = nn.Linear(4, 16).eval()


def new_gate(net):
    net.gates["small"] = (
        off.ladder({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, gate="max_prob").gates["a"].eval()
    )


CHANGES = {
    "half": lambda net: net.half(),
    "to double": lambda net: net.to(torch.float64),
    "in place": add_in_place,
    "in inference mode": add_in_inference_mode,
    "load_state_dict": lambda net: net.load_state_dict(net.state_dict()),
    "load_state_dict, assigned": lambda net: net.load_state_dict(
        {key: value.clone() for key, value in net.state_dict().items()}, assign=True
    ),
    "train": lambda net: net.train(),
    "train a member": lambda net: net.backbone["small"].train(),
    "parameter": new_parameter,
    "data": new_data,
    "model": new_model,
    "layer": new_layer,
    "gate": new_gate,
    "containers": lambda net: setattr(net, "gates", nn.ModuleDict(net.gates.items())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_runner_refuses_after_a_change(change):
    net = ladder_of(2)
    x = rows_of(9)
    plan = Plan.by_hand({"small": 0.4})
    runner = off.open(net, plan)
    runner(x)
    CHANGES[change](net)
    with pytest.raises(StaleRunner, match="open again"):
        runner(x)
    with pytest.raises(StaleRunner):
        list(runner.anytime(x))
    with pytest.raises(StaleRunner):
        runner.check()


def test_a_runner_outlives_the_network():
    net = ladder_of(2)
    runner = off.open(net, Plan.by_hand({}))
    want = net(rows_of(5))[-1]
    del net
    gc.collect()
    torch.testing.assert_close(runner(rows_of(5)).logits, want)


def test_rows_of_another_shape_are_refused(two):
    trace = off.record(two, rows_of(30).numpy(), timed=False)
    runner = off.open(two, Plan(thresholds={}, origin=trace.header.origin))
    with pytest.raises(BadData, match="shape"):
        runner(torch.zeros(2, 5))
    for wrong in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64), "rows", None, 3.0):
        with pytest.raises(BadData):
            off.run(two, Plan.by_hand({"small": 0.4}), wrong)


def test_members_with_different_classes_are_refused():
    net = ladder({"small": dense(0), "large": dense(1, classes=5)})
    with pytest.raises(BadNetwork, match="classes"):
        off.run(net, Plan.by_hand({"small": 0.4}), rows_of(20))


GATES = {
    "a number": (lambda logits: 3, "got an int"),
    "a flag": (lambda logits: True, "got a bool"),
    "nothing": (lambda logits: None, "got None"),
    "a list": (lambda logits: logits.max(1).values.tolist(), "got a list"),
    "values and places": (lambda logits: logits.max(1), "got a max"),
    "one for the batch": (lambda logits: logits.max(), r"got a tensor of shape \[\]"),
    "one for each class": (lambda logits: logits, r"got a tensor of shape \[4, 3\]"),
}


@pytest.mark.parametrize("case", GATES)
def test_a_gate_must_give_a_score_for_each_row(case):
    gate, got = GATES[case]
    net = ladder_of(2, gate=gate)
    with pytest.raises(BadNetwork, match=rf"a gate must give scores \[4\], one per row, {got}"):
        off.run(net, Plan.by_hand({"small": 0.5}), rows_of(4))
