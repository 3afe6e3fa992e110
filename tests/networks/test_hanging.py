"""Other exits and gates on a network: its chain follows, and nobody writes where it cannot
follow.
"""

from __future__ import annotations

import ast

import pytest
import torch

import house
import offramp as off
from offramp.building.factories import make_gate
from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.exits.added import Added
from small import ladder_of, rows_of

# the network, the dict that holds modules, and a layer that copies a user's module with other norms
WRITERS = ("networks.network", "networks.members", "layers.switchable_norm")


def added(net, name, before):
    return Added(net.exit_of(name), before)


def test_another_exit_gives_another_network_whose_chain_knows_what_it_reads():
    net = ladder_of(3)
    x = rows_of(5)
    before = net.fingerprint()
    other = net.with_exit("large", added(net, "large", "small"))
    small, _, large = net(x)
    assert torch.allclose(other(x)[2], large + 0.5 * small)
    assert other.topology.nodes[2].exit_reads == ("small",)
    assert net.topology.nodes[2].exit_reads == ()
    assert net.fingerprint() == before != other.fingerprint()
    assert other.model_of(other.members[0]) is net.model_of(net.members[0])
    plan = off.Plan.by_hand({"small": torch.inf, "middle": torch.inf})
    # a closed exit that is read runs
    assert torch.allclose(off.run(other, plan, x).logits, large + 0.5 * small)


def test_other_gates_replace_those_that_are_named():
    net = ladder_of(3)
    other = net.with_gates({"middle": make_gate("patience", ("small",))})
    assert other.gate_of("small") is net.gate_of("small")
    assert other.gate_of("middle") is not net.gate_of("middle")
    assert [node.gate_reads for node in other.topology.nodes] == [(), ("small",), ()]
    assert [node.gate_reads for node in net.topology.nodes] == [(), (), ()]


def test_what_a_network_says_of_itself_goes_along():
    net = ladder_of(2)
    net.class_names = ("a", "b", "c")
    other = net.with_gates({})
    assert other.fingerprint() == net.fingerprint()
    assert other.class_names == net.class_names
    assert other.made == net.made
    assert other.auxiliary == {}


def test_what_is_hung_on_a_network_in_eval_mode_is_in_eval_mode():
    net = ladder_of(2)
    exit_ = added(net, net.topology.exits[-1], "small").train()
    net.with_exit(net.topology.exits[-1], exit_).require_eval()


def test_hanging_in_place_keeps_the_chain_right():
    net = ladder_of(3)
    net.hang_exit("middle", added(net, "middle", "small"))
    net.hang_gates({"middle": make_gate("patience", ("small",))})
    assert net.topology.nodes[1].exit_reads == net.topology.nodes[1].gate_reads == ("small",)


@pytest.mark.parametrize("hang", ["with_exit", "hang_exit"])
def test_an_exit_that_does_not_fit_is_refused_and_changes_nothing(hang):
    net = ladder_of(3)
    before = net.topology
    exits = dict(net.exits.items())
    for node, exit_, kind, says in (
        ("smal", net.exit_of("small"), UnknownName, "did you mean 'small'"),
        ("small", torch.nn.Linear(3, 3), InvalidArgument, "must be an Exit, got a Linear"),
        ("small", added(net, "small", "large"), BadNetwork, "not an earlier node"),
    ):
        with pytest.raises(kind, match=says):
            getattr(net, hang)(node, exit_)
    assert net.topology == before
    assert dict(net.exits.items()) == exits


@pytest.mark.parametrize("hang", ["with_gates", "hang_gates"])
def test_a_gate_that_does_not_fit_is_refused_and_no_other_is_hung(hang):
    net = ladder_of(3)
    before = net.topology
    gates = dict(net.gates.items())
    good = make_gate("max_prob")
    for node, gate, kind, says in (
        ("large", good, UnknownName, "gate of this network"),
        ("middle", net.exit_of("middle"), InvalidArgument, "must be a Gate"),
        ("middle", make_gate("patience", ("large",)), BadNetwork, "not an earlier node"),
    ):
        with pytest.raises(kind, match=says):
            getattr(net, hang)({"small": good, node: gate})
    assert net.topology == before
    assert dict(net.gates.items()) == gates


@pytest.mark.parametrize("module", [name for name in house.modules() if name not in WRITERS])
def test_nobody_else_writes_into_modules_or_the_chain(module):
    for node in ast.walk(house.parsed(house.modules()[module])):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AugAssign)
            else []
        )
        for target in map(ast.unparse, targets):
            assert "._modules" not in target, f"{module} writes {target}; use hang_exit, hang_gates"
            assert not target.endswith("network.chain"), (
                f"{module} writes {target}; use hang_exit, hang_gates"
            )
        if isinstance(node, ast.Call):
            told = ast.unparse(node.func)
            assert not told.endswith("_modules.update"), (
                f"{module} calls {told}; use hang_exit, hang_gates"
            )
            assert not told.endswith((".exits.hang", ".gates.hang")), (
                f"{module} calls {told}; the chain would not follow"
            )
