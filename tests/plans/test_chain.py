"""Which nodes run under which open gates."""

from __future__ import annotations

import json

import pytest

from offramp.errors import BadInput, BadNetwork, UnknownName
from offramp.plans.chain import Chain, Node, Step, passages


def chain(*names, **nodes) -> Chain:
    """A chain; keyword arguments give a node's other fields."""
    after = dict(zip(names, [*names[1:], None], strict=True))
    return Chain(tuple(Node(name, after[name], **nodes.get(name, {})) for name in names))


PLAIN = chain("a", "b", "c")
TRUNK = chain("a", "b", "c", b={"after": "a"}, c={"after": "b"})
READING = chain("a", "b", "c", b={"gate_reads": ("a",)}, c={"exit_reads": ("b",)})


def said(steps) -> str:
    """`a:xg` for a node that runs its exit and gate; `!` marks the last."""
    return " ".join(f"{s.name}:{'x' * s.exit}{'g' * s.gate}{'!' * s.last}" for s in steps)


def test_inputs_may_be_read_and_are_no_nodes():
    reading = chain("a", "b", b={"exit_reads": ("x/mask", "a")}, a={"gate_reads": ("x",)})
    assert said(reading.walk("a")) == "a:xg b:x!"
    assert Chain.from_json(json.loads(json.dumps(reading.to_json()))) == reading


@pytest.mark.parametrize(
    ("of", "gates", "deepest", "want"),
    [
        (PLAIN, "ab", None, "a:xg b:xg c:x!"),
        (PLAIN, "a", None, "a:xg c:x!"),
        (PLAIN, "b", None, "b:xg c:x!"),
        (PLAIN, "", None, "c:x!"),
        (PLAIN, "ab", "b", "a:xg b:x!"),
        (PLAIN, "ab", "a", "a:x!"),
        (PLAIN, "b", "a", "a:x!"),
        (TRUNK, "", None, "a: b: c:x!"),
        (TRUNK, "b", None, "a: b:xg c:x!"),
        (TRUNK, "a", "b", "a:xg b:x!"),
        (READING, "", None, "b:x c:x!"),
        (READING, "b", None, "a:x b:xg c:x!"),
        (READING, "a", None, "a:xg b:x c:x!"),
        (READING, "ab", "b", "a:xg b:x!"),
        (READING, "b", "b", "b:x!"),
    ],
)
def test_walk(of, gates, deepest, want):
    assert said(of.walk(gates, deepest)) == want


def test_a_step_is_plain():
    assert PLAIN.walk("", "a") == (Step("a", exit=True, gate=False, last=True),)


def test_names():
    assert PLAIN.exits == ("a", "b", "c")
    assert PLAIN.gates == ("a", "b")
    assert PLAIN.place("b") == 1
    with pytest.raises(UnknownName, match="layer1"):
        chain("layer1", "layer2").place("layer")


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (Node("a", "a"), Node("a", None)),
        (Node("a", None), Node("b", None)),
        (Node("a", "c"), Node("b", "c"), Node("c", None)),
        (Node("a", "b"),),
        (Node("a", "b"), Node("b", None, after="b")),
        (Node("a", "b", exit_reads=("b",)), Node("b", None)),
        (Node("a", "b", gate_reads=("z",)), Node("b", None)),
    ],
)
def test_what_is_no_chain(nodes):
    with pytest.raises(BadNetwork):
        Chain(nodes)


@pytest.mark.parametrize("of", [PLAIN, TRUNK, READING])
def test_it_comes_back_from_json(of):
    assert Chain.from_json(json.loads(json.dumps(of.to_json()))) == of


@pytest.mark.parametrize("wrong", [None, 5, [5], [{}], [{"name": "a"}], [{"name": [], "successor": None}]])
def test_what_is_no_json_of_a_chain(wrong):
    with pytest.raises(BadInput):
        Chain.from_json(wrong)


def test_where_a_plan_asks_nothing_no_group_ends():
    long = chain("a", "b", "c", "d", b={"after": "a"}, c={"after": "b"}, d={"after": "c", "exit_reads": ("b",)})
    assert [said(group) for group in passages(long.walk(""))] == ["a: b:x", "c: d:x!"]
    assert [said(group) for group in passages(long.walk("ac"))] == ["a:xg", "b:x", "c:xg", "d:x!"]
    assert passages(()) == ()
