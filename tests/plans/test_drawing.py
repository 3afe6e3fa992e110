"""A topology as a tree of text."""

from __future__ import annotations

from offramp.plans.drawing import tree
from offramp.plans.topology import LEAVE, Node, Topology
from topologies import FORK, PLAIN, SKIP


def test_a_chain_is_a_list():
    assert tree(PLAIN).splitlines() == ["a: rows may leave", "b: rows may leave", "c: answers"]


def test_a_fork_with_an_answer_of_its_own():
    assert tree(FORK).splitlines() == [
        "size: rows may leave, one of 3 ways",
        "├─ small",
        "└─ large: rows may leave",
        "head: answers",
    ]


def test_a_skip():
    assert tree(SKIP).splitlines() == [
        "a: rows may leave, one of 3 ways",
        "├─ b",
        "└─ (skips)",
        "c: answers",
    ]


def test_nested_forks_and_an_arm_that_ends():
    nested = Topology(
        (
            Node("a", ("stop", "b", "c")),
            Node("stop", (LEAVE,), ("a",)),
            Node("b", ("b1", "b2"), ("a",)),
            Node("b1", ("d",), ("b",)),
            Node("b2", ("d",), ("b",)),
            Node("d", ("e",), ("b1", "b2")),
            Node("c", ("e",), ("a",)),
            Node("e", (LEAVE,), ("d", "c"), reads=("a",)),
        )
    )
    assert tree(nested, lambda node: "").splitlines() == [
        "a",
        "├─ stop",
        "├─ b",
        "│  ├─ b1",
        "│  └─ b2",
        "│  d",
        "└─ c",
        "e (reads a too)",
    ]
