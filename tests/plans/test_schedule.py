"""Which stages run under which thresholds, what they carry, and where their rows go."""

from __future__ import annotations

import math

import pytest

from offramp.errors import InvalidArgument, UnknownName
from offramp.plans.plan import Plan
from offramp.plans.schedule import Edge, Stage, compiled, full_schedule
from offramp.plans.topology import LEAVE, Node, Topology
from topologies import FORK, PLAIN, READING, SKIP, TRUNK, chain


def schedule(topology, gates, max_exit=None):
    """The schedule of a plan. `gates` are the names of open gates, or thresholds by gate."""
    thresholds = gates
    if not isinstance(gates, dict):
        thresholds = dict.fromkeys(gates, (0.0,))
    return compiled(topology, thresholds, max_exit)


def in_short(stages) -> str:
    """`a:xg` for a stage that runs its exit and its gate, and `!` if all rows leave there."""
    words = []
    for stage in stages:
        word = f"{stage.name}:"
        if stage.exit:
            word += "x"
        if stage.gate:
            word += "g"
        if stage.last:
            word += "!"
        words.append(word)
    return " ".join(words)


def edges(stages) -> dict[str, list[str]]:
    """The ends of each stage's edges, by the name of the stage."""
    ends = {}
    for stage in stages:
        ends[stage.name] = [edge.to for edge in stage.edges]
    return ends


def nodes(stages) -> list[tuple[str, ...]]:
    """The nodes of each stage."""
    return [stage.nodes for stage in stages]


def last_carries(stages) -> list[tuple[str, ...]]:
    """The values on the last edge of each stage."""
    return [stage.edges[-1].carries for stage in stages]


@pytest.mark.parametrize(
    ("topology", "gates", "max_exit", "want"),
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
        # head reads large, which is on the only path that is left
        (FORK, {}, None, "size:x large:x head:x!"),
        (FORK, {"size": (0.0, math.inf)}, None, "size:xg small: large:x head:x!"),
        (FORK, {"size": (math.inf, 0.0)}, None, "size:xg large:x head:x!"),
        (FORK, {"size": (0.0, 0.0), "large": (1.0,)}, None, "size:xg small: large:xg head:x!"),
        (FORK, {"size": (0.0, 0.0)}, "large", "size:xg small: large:x! head:x!"),
        (FORK, {}, "size", "size:x!"),
        (SKIP, {"a": (math.inf, 0.0)}, None, "a:xg b: c:x!"),
        (SKIP, {}, None, "a: c:x!"),
    ],
)
def test_what_runs(topology, gates, max_exit, want):
    assert in_short(schedule(topology, gates, max_exit)) == want


def test_a_stage_is_plain():
    (stage,) = schedule(PLAIN, "", "a")
    edge = Edge(LEAVE, LEAVE)
    assert stage == Stage(
        "a", ("a",), True, False, (edge,), why="deepest", reads=("x",), writes=("a", "a/logits")
    )


def test_names_and_numbers_are_checked():
    with pytest.raises(UnknownName):
        schedule(PLAIN, "c")
    with pytest.raises(UnknownName):
        schedule(PLAIN, "", "d")
    with pytest.raises(InvalidArgument, match="gate 'size' must have 2 thresholds, one per score"):
        schedule(FORK, {"size": (1.0,)})


def test_where_rows_go():
    # b runs nothing and hands its rows on
    assert edges(schedule(PLAIN, "a")) == {"a": [LEAVE, "c"], "c": [LEAVE]}
    assert schedule(PLAIN, "a").stages[0].edges[1].via == ("b",)
    assert schedule(PLAIN, "").skipped == ("a", "b")
    both = schedule(FORK, {"size": (0.5, 2.0)})
    assert edges(both) == {
        "size": ["small", LEAVE, "large"],
        "small": ["head"],
        "large": ["head"],
        "head": [LEAVE],
    }
    assert both.stages[0].thresholds == (0.5, 2.0)
    one_open = schedule(FORK, {"size": (math.inf, 2.0)})
    first = one_open.stages[0]
    assert first.routes == (1,)
    assert first.thresholds == (2.0,)
    assert edges(one_open)["size"] == [LEAVE, "large"]


def test_what_is_carried():
    size, small, large, head = schedule(FORK, {"size": (0.0, 0.0)})
    to_small, leaving, to_large = size.edges
    # large does not run on this way, so its logits are a default
    assert to_small.carries == ("size", "size/logits", "large/logits")
    assert leaving.carries == ()
    assert to_large.carries == ("size", "size/logits")
    for arm in (small, large):
        assert last_carries([arm]) == [("small|large", "size/logits", "large/logits")]
        assert len(arm.edges) == 1
    assert last_carries([head]) == [()]
    assert len(head.edges) == 1

    trunk = full_schedule(TRUNK)
    assert last_carries(trunk) == [("a",), ("b",), ()]
    reads_and_writes = {
        "a": (("x",), ("a", "h")),
        "b": (("a",), ("b",)),
        "c": (("b", "h"), ("c",)),
    }
    assert last_carries(trunk.linked(reads_and_writes)) == [("a", "h"), ("b", "h"), ()]


def test_where_a_plan_asks_nothing_no_stage_ends():
    long = chain(
        "a",
        "b",
        "c",
        "d",
        b={"after": ("a",)},
        c={"after": ("b",)},
        d={"after": ("c",), "exit_reads": ("b",)},
    )
    closed = schedule(long, "").joined()
    assert nodes(closed) == [("a", "b"), ("c", "d")]
    assert [stage.writes for stage in closed] == [("b", "b/logits"), ("d", "d/logits")]
    assert nodes(schedule(long, "ac").joined()) == [("a",), ("b",), ("c",), ("d",)]


def test_stages_are_not_joined_across_a_fork():
    opened = schedule(FORK, {"size": (0.0, math.inf)}).joined()
    assert nodes(opened) == [("size",), ("small",), ("large",), ("head",)]
    line = Topology(
        (
            Node("stem", ("size",)),
            Node("size", ("small", "large"), ("stem",)),
            Node("small", ("more",), ("size",)),
            Node("large", ("head",), ("size",)),
            Node("more", ("head",), ("small",)),
            Node("head", (LEAVE,), ("more", "large")),
        )
    )
    joined = schedule(line, {"size": (0.0,)}).joined()
    assert nodes(joined) == [("stem", "size"), ("large",), ("small", "more"), ("head",)]
    assert edges(joined)["size"] == ["more", "large"]
    skipping = schedule(SKIP, {"a": (0.0, math.inf)}).joined()
    assert nodes(skipping) == [("a",), ("c",)]
    # a and b would both write a|b in one graph
    going_on = schedule(SKIP, {"a": (math.inf, 0.0)}, None).joined()
    assert nodes(going_on) == [("a",), ("b",), ("c",)]


def test_it_prints_what_will_run():
    fork = Topology(
        (
            Node("stem", ("size",)),
            Node("size", ("small", "large"), ("stem",)),
            Node("small", ("head",), ("size",)),
            Node("large", ("head",), ("size",)),
            Node("head", (LEAVE,), ("small", "large")),
        )
    )
    plan = Plan.by_hand({"size": 1.3})
    lines = str(plan.schedule(fork)).splitlines()
    assert lines[0] == "Schedule of 5 stages"
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "stem reads x carries stem every row",
        "size reads stem carries size gate; >= 1.3 small, else large rows of stem",
        "small reads size carries small|large rows of size/small",
        "large reads size carries small|large rows of size/large",
        "head reads small|large exit; answers rows of small and large, together",
    ]
