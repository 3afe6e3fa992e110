"""Which stages run under which thresholds, what they carry, and where their rows go."""

from __future__ import annotations

import math

import pytest

from offramp.errors import InvalidArgument, UnknownName
from offramp.plans.plan import Plan
from offramp.plans.schedule import Edge, Stage, compiled, full_schedule
from offramp.plans.topology import LEAVE, Node, Topology
from topologies import FORK, PLAIN, READING, SKIP, TRUNK, chain


def schedule(of, gates, max_exit=None):
    """Of a plan with these gates open; a mapping gives thresholds."""
    thresholds = gates if isinstance(gates, dict) else dict.fromkeys(gates, (0.0,))
    return compiled(of, thresholds, max_exit)


def said(stages) -> str:
    """`a:xg` for a stage that runs its exit and gate; `!` where all rows are answered."""
    return " ".join(f"{s.name}:{'x' * s.exit}{'g' * s.gate}{'!' * s.last}" for s in stages)


def edges(of) -> dict[str, list[str]]:
    return {stage.name: [edge.to for edge in stage.edges] for stage in of}


@pytest.mark.parametrize(
    ("of", "gates", "max_exit", "want"),
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
        (
            FORK,
            {},
            None,
            "size:x large:x head:x!",
        ),  # head reads large, which is on the only path that is left
        (FORK, {"size": (0.0, math.inf)}, None, "size:xg small: large:x head:x!"),
        (FORK, {"size": (math.inf, 0.0)}, None, "size:xg large:x head:x!"),
        (FORK, {"size": (0.0, 0.0), "large": (1.0,)}, None, "size:xg small: large:xg head:x!"),
        (FORK, {"size": (0.0, 0.0)}, "large", "size:xg small: large:x! head:x!"),
        (FORK, {}, "size", "size:x!"),
        (SKIP, {"a": (math.inf, 0.0)}, None, "a:xg b: c:x!"),
        (SKIP, {}, None, "a: c:x!"),
    ],
)
def test_what_runs(of, gates, max_exit, want):
    assert said(schedule(of, gates, max_exit)) == want


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
    assert edges(schedule(PLAIN, "a")) == {
        "a": [LEAVE, "c"],
        "c": [LEAVE],
    }  # b runs nothing and hands its rows on
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
    one = schedule(FORK, {"size": (math.inf, 2.0)}).stages[0]
    assert (one.routes, one.thresholds, [edge.to for edge in one.edges]) == (
        (1,),
        (2.0,),
        [LEAVE, "large"],
    )


def test_what_is_carried():
    carries = [
        [edge.carries for edge in stage.edges] for stage in schedule(FORK, {"size": (0.0, 0.0)})
    ]
    assert carries[0][0] == (
        "size",
        "size/logits",
        "large/logits",
    )  # a default stands for what small has not
    assert carries[0][1:] == [(), ("size", "size/logits")]
    assert carries[1:] == [[("small|large", "size/logits", "large/logits")]] * 2 + [[()]]
    trunk = full_schedule(TRUNK)
    assert [stage.edges[-1].carries for stage in trunk] == [("a",), ("b",), ()]
    known = trunk.linked(
        {"a": (("x",), ("a", "h")), "b": (("a",), ("b",)), "c": (("b", "h"), ("c",))}
    )
    assert [stage.edges[-1].carries for stage in known] == [("a", "h"), ("b", "h"), ()]


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
    assert [stage.nodes for stage in closed] == [("a", "b"), ("c", "d")]
    assert [stage.writes for stage in closed] == [("b", "b/logits"), ("d", "d/logits")]
    assert [stage.nodes for stage in schedule(long, "ac").joined()] == [
        ("a",),
        ("b",),
        ("c",),
        ("d",),
    ]


def test_stages_are_not_joined_across_a_fork():
    opened = {"size": (0.0, math.inf)}
    assert [stage.nodes for stage in schedule(FORK, opened).joined()] == [
        ("size",),
        ("small",),
        ("large",),
        ("head",),
    ]
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
    assert [stage.nodes for stage in joined] == [
        ("stem", "size"),
        ("large",),
        ("small", "more"),
        ("head",),
    ]
    assert edges(joined)["size"] == ["more", "large"]
    assert [stage.nodes for stage in schedule(SKIP, {"a": (0.0, math.inf)}).joined()] == [
        ("a",),
        ("c",),
    ]
    # a and b would both write a|b in one graph
    assert [stage.nodes for stage in schedule(SKIP, {"a": (math.inf, 0.0)}, None).joined()] == [
        ("a",),
        ("b",),
        ("c",),
    ]


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
