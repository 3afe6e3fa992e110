"""Which nodes may follow each other, and how that is written."""

from __future__ import annotations

import json

import pytest

from offramp.errors import BadNetwork, InvalidArgument, UnknownName
from offramp.plans.topology import LEAVE, Default, Node, Topology
from topologies import FORK, PLAIN, READING, SKIP, TRUNK, chain


def test_names():
    assert PLAIN.exits == PLAIN.names == PLAIN.exit_labels == ("a", "b", "c")
    assert PLAIN.gates == PLAIN.gate_labels == ("a", "b")
    assert PLAIN.exit_index("b") == 1
    assert PLAIN.is_chain
    with pytest.raises(UnknownName, match="layer1"):
        chain("layer1", "layer2").exit_index("layer")


def test_a_fork_has_an_exit_or_a_gate_where_its_successors_say_so():
    assert not FORK.is_chain
    assert FORK.exits == ("size", "large", "head")
    assert FORK.gates == ("size", "large")
    assert (FORK.routes("size"), FORK.routes("large")) == (2, 1)
    with pytest.raises(UnknownName):
        FORK.exit_index("small")


def test_arms_that_re_join_share_the_name_of_their_tensor():
    assert FORK.node("head").source == "small|large"
    assert FORK.written_by("small") == ("small", "small|large")
    assert FORK.written_by("head") == ("head",)
    assert TRUNK.node("b").source == "a"
    assert PLAIN.node("b").source is None
    assert SKIP.written_by("a") == ("a", "a|b")


def test_every_path_has_columns_of_its_own():
    assert FORK.paths["head"] == (("size", "small", "head"), ("size", "large", "head"))
    assert FORK.exit_labels == ("size", "large", "head#0", "head#1")
    assert FORK.reference_path("head") == ("size", "large", "head")
    assert FORK.score_columns("size") == ("score/size@0", "score/size@1")
    assert FORK.score_columns("large") == ("score/large",)
    assert SKIP.reference_path("c") == ("a", "c")


def test_more_than_sixteen_paths_are_refused():
    nodes = []
    for index in range(6):
        after = (f"l{index - 1}", f"r{index - 1}") if index else ()
        nodes.append(
            Node(f"f{index}", (f"l{index}", f"r{index}") if index < 5 else (LEAVE,), after)
        )
        if index < 5:
            nodes += [Node(f"{arm}{index}", (f"f{index + 1}",), (f"f{index}",)) for arm in "lr"]
    with pytest.raises(BadNetwork, match="32 paths lead to 'f5'"):
        _ = Topology(tuple(nodes)).paths


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (Node("a", (LEAVE, "a")), Node("a", (LEAVE,))),
        (Node("a", (LEAVE,)), Node("b", (LEAVE,))),  # b cannot be reached
        (Node("a", (LEAVE, "c")), Node("b", (LEAVE, "c")), Node("c", (LEAVE,))),
        (Node("a", (LEAVE, "b")),),
        (Node("a", ("b", "b")), Node("b", (LEAVE,))),
        (Node("a", ()),),
        (Node("a", (LEAVE, "b")), Node("b", (LEAVE, "a"))),  # back
        (Node("a", (LEAVE, "a")),),
        (Node(LEAVE, (LEAVE,)),),
        (Node("a", (LEAVE, "b")), Node("b", (LEAVE,), after=("b",))),
        (Node("a", (LEAVE, "b")), Node("b", (LEAVE,), after=("x",))),
        (Node("a", (LEAVE, "b"), exit_reads=("b",)), Node("b", (LEAVE,))),
        (Node("a", (LEAVE, "b"), gate_reads=("z",)), Node("b", (LEAVE,))),
        # `c` continues from b, and a row may come straight from a
        (Node("a", ("b", "c")), Node("b", ("c",)), Node("c", (LEAVE,), after=("b",))),
        # b's exit is read by rows that did not pass it, and nothing says what they see
        (Node("a", ("b", "c")), Node("b", (LEAVE, "c")), Node("c", (LEAVE,), exit_reads=("b",))),
        (
            Node("a", ("b", "c")),
            Node("b", ("c",)),
            Node("c", (LEAVE,), exit_reads=("b",)),
        ),  # no exit stands at b
    ],
)
def test_what_is_no_topology(nodes):
    with pytest.raises(BadNetwork):
        Topology(nodes)


def test_a_default_is_of_an_exit():
    with pytest.raises(BadNetwork, match="a default must be declared of one of the exits"):
        Topology(FORK.nodes, (*FORK.defaults, Default("small", 0.0, (3,))))


@pytest.mark.parametrize("of", [PLAIN, TRUNK, READING, FORK, SKIP])
def test_it_comes_back_from_json(of):
    assert Topology.from_json(json.loads(json.dumps(of.to_json()))) == of


def test_a_chain_is_written_as_the_first_edition_wrote_it():
    """The fingerprints of networks depend on these very keys."""
    assert json.loads(json.dumps(READING.to_json()))[1:] == [
        {"name": "b", "successor": "c", "after": None, "exit_reads": [], "gate_reads": ["a"]},
        {
            "name": "c",
            "successor": None,
            "after": None,
            "exit_reads": ["b", "x/mask"],
            "gate_reads": [],
        },
    ]
    assert TRUNK.to_json()[1]["after"] == "a"


@pytest.mark.parametrize(
    "wrong", [None, 5, [5], [{}], [{"name": "a"}], [{"name": [], "successor": None}]]
)
def test_what_is_no_json_of_a_topology(wrong):
    with pytest.raises(InvalidArgument):
        Topology.from_json(wrong)


@pytest.mark.parametrize(
    "nodes",
    [
        (Node("a", ("a",)),),
        (Node("a", ("b",)), Node("b", ("c",)), Node("c", ("b", "leave"))),
        (Node("b", ("a",)), Node("a", ("b", "leave"))),
    ],
)
def test_a_circle_is_refused(nodes):
    with pytest.raises(BadNetwork, match=r"the successors of node '\w' must be later nodes, got"):
        Topology(nodes)
