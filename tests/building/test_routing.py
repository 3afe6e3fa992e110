"""`route`: what a list of steps becomes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadData, BadNetwork, InvalidArgument, UnknownName
from offramp.exits.whole import Own
from offramp.gates.controller import Controller
from offramp.plans.topology import LEAVE, Default, Node, Topology


def linear(width_in: int = 4, width: int = 4) -> nn.Module:
    return nn.Linear(width_in, width).eval()


X = torch.randn(6, 4)
STEPS = [
    ("stem", linear()),
    off.Fork(
        "size", {"small": linear(), "large": [("wide", linear(4, 8)), ("narrow", linear(8, 4))]}
    ),
    ("head", linear(4, 3)),
]


def test_a_fork_that_re_joins():
    net = off.route(STEPS, example=X)
    assert net.topology == Topology(
        (
            Node("stem", ("size",)),
            Node("size", ("small", "wide"), ("stem",)),
            Node("small", ("head",), ("size",)),
            Node("wide", ("narrow",), ("size",)),
            Node("narrow", ("head",), ("wide",)),
            Node("head", (LEAVE,), ("small", "narrow")),
        )
    )
    assert isinstance(net.gate_of("size"), Controller)
    assert [tuple(logits.shape) for logits in net(X)] == [(6, 3), (6, 3)]
    assert net.model_of(net.members[0]) is STEPS[0][1]
    assert str(net).splitlines() == [
        "Network of 5 segments, 1 gate and 1 exit",
        "stem",
        "size: chooses by controller",
        "├─ small",
        "└─ wide",
        "   narrow",
        "head: answers",
    ]


def test_an_empty_arm_skips():
    net = off.route(
        [
            ("stem", linear()),
            off.Fork("skip", {"none": [], "unit": linear()}),
            ("head", linear(4, 3)),
        ],
        example=X,
    )
    assert net.topology.node("skip").successors == ("head", "unit")
    assert net.topology.node("head").after == ("skip", "unit")
    plain = off.run(net, off.Plan.by_hand({"skip": -float("inf")}), X)
    stem = net.backbone["stem"]
    head = net.backbone["head"]
    with torch.no_grad():
        torch.testing.assert_close(plain.logits, head(stem(X)))


def test_a_fork_at_the_entrance_whose_arms_answer():
    arms = {"small": (linear(4, 3), linear()), "large": linear(4, 3)}
    net = off.route([off.Fork("first", arms)], example=X)
    assert net.topology.exits == ("small", "large")
    assert net.topology.node("small").after == ()
    assert net.preprocess_of(net.members[1]) is arms["small"][1]
    with torch.no_grad():
        torch.testing.assert_close(net(X)[0], arms["small"][0](arms["small"][1](X)))


def test_exits_inside_arms_and_arms_that_answer():
    steps = [
        ("stem", linear()),
        off.Leave("early", "linear"),
        off.Fork(
            "way",
            {
                "stop": [off.Leave("reject", "linear", None)],
                "on": [("unit", linear()), off.Leave("mid", "linear"), ("more", linear())],
            },
        ),
        ("head", linear(4, 3)),
    ]
    net = off.route(steps, example=X)
    assert net.topology.exits == ("early", "reject", "mid", "head")
    assert net.topology.gates == ("early", "way", "mid")
    assert net.topology.node("reject").successors == (LEAVE,)
    assert net.untrained() == ("early", "reject", "mid")


class Both(nn.Module):
    """Adds two tensors."""

    def forward(self, x, other):
        return x + other


def test_an_output_is_read_by_default_where_it_did_not_run():
    steps = [
        ("stem", linear()),
        off.Fork("way", {"none": [], "detail": linear()}),
        ("both", Both().eval(), {"detail": 0.5}),
        ("head", linear(4, 3)),
    ]
    net = off.route(steps, example=X)
    assert net.topology.defaults == (Default("detail", 0.5, (4,), True),)
    assert net.topology.node("both").reads == ("detail",)
    skipping = off.run(net, off.Plan.by_hand({"way": -float("inf")}), X)
    running = off.run(net, off.Plan.by_hand({}), X)
    with torch.no_grad():
        stem = steps[0][1](X)
        detail = steps[1].arms["detail"](stem)
        torch.testing.assert_close(skipping.logits, steps[3][1](stem + 0.5))
        torch.testing.assert_close(running.logits, steps[3][1](detail + detail))
    again = Topology.from_json(net.topology.to_json())
    assert again == net.topology


def test_what_always_ran_needs_no_default():
    steps = [
        ("stem", linear()),
        ("unit", linear()),
        ("both", Both().eval(), {"stem": None}),
        ("head", linear(4, 3)),
    ]
    net = off.route(steps)
    assert net.topology.defaults == ()
    with torch.no_grad():
        stem = steps[0][1](X)
        torch.testing.assert_close(net(X)[0], steps[3][1](steps[1][1](stem) + stem))


CIRCLE: list = [("stem", linear())]
CIRCLE.append(off.Fork("again", {"a": CIRCLE, "b": linear()}))
LEAVING = [off.Leave("all", Own(), None)]


@pytest.mark.parametrize(
    ("steps", "problem", "says"),
    [
        ([], InvalidArgument, "steps must have at least one"),
        ([("a", linear()), ("a", linear(4, 3))], InvalidArgument, "got 'a' twice"),
        (
            [("a", linear()), off.Fork("a", {"b": linear(), "c": linear()})],
            InvalidArgument,
            "got 'a' twice",
        ),
        ([("a b", linear())], InvalidArgument, "letters, digits"),
        ([("a", 3)], InvalidArgument, "must be a torch.nn.Module, got a int"),
        ([linear()], InvalidArgument, r"step 1 of the list must be \(name, module\)"),
        (CIRCLE, InvalidArgument, "contains itself: rows would go in a circle"),
        ([off.Fork("f", {"a": linear()})], InvalidArgument, "at least two arms"),
        (
            [("s", linear()), off.Fork("f", {"a": [], "b": []}), ("h", linear(4, 3))],
            InvalidArgument,
            "are both empty",
        ),
        (
            [("s", linear()), off.Fork("f", {"a": [], "b": linear(4, 3)})],
            BadNetwork,
            "'a' of the last fork 'f'",
        ),
        (
            [("s", linear(4, 3)), off.Leave("e", Own())],
            BadNetwork,
            "nothing follows the exit 'e'",
        ),
        (
            [("s", linear(4, 3)), *LEAVING, ("h", linear(4, 3))],
            InvalidArgument,
            "no row comes to step 3",
        ),
        (
            [("s", linear()), ("h", linear(4, 3), {"z": 0.0})],
            UnknownName,
            "segment before 'h' called 'z'",
        ),
        (
            [("s", linear()), ("h", (linear(4, 3), linear()))],
            InvalidArgument,
            "does not read the input",
        ),
        (
            [
                ("s", linear()),
                off.Fork("f", {"a": linear(4, 5), "b": linear()}),
                ("h", linear(4, 3)),
            ],
            BadNetwork,
            r"different shapes \(a \[5\], b \[4\]\)",
        ),
        (
            [
                ("s", linear()),
                off.Fork("f", {"a": linear(), "b": linear()}, gate=Controller(4, 3)),
                ("h", linear(4, 3)),
            ],
            BadNetwork,
            "must give 1 score.* got 2",
        ),
        (
            [
                ("s", linear()),
                off.Fork("f", {"a": [], "b": linear()}),
                ("h", Both().eval(), {"b": None}),
            ],
            BadNetwork,
            "not every path to it passes; declare a default",
        ),
        ([("s", linear()), ("h", linear(5, 3))], BadData, "the segment 'h' fails on"),
        (
            [
                ("s", linear()),
                off.Fork("f", {"a": linear(), "b": linear()}, gate="controller?deep=3"),
                ("h", linear(4, 3)),
            ],
            UnknownName,
            "argument of the gate",
        ),
        (
            [("s", linear()), off.Leave("e", "linear"), ("h", linear(4, 1))],
            BadNetwork,
            "at least two classes",
        ),
        (
            [("s", linear()), off.Fork("f", {"a": linear(4, 3), "b": linear(4, 4)})],
            BadNetwork,
            "different numbers",
        ),
    ],
)
def test_bad_input_gives_one_sentence(steps, problem, says):
    with pytest.raises(problem, match=says) as raised:
        off.route(steps, example=X)
    assert "\n" not in str(raised.value)


def test_what_needs_an_example_says_so():
    with pytest.raises(
        InvalidArgument, match="example must be a batch, because the gate of 'size' is made"
    ):
        off.route(STEPS)
    with pytest.raises(
        InvalidArgument, match="example must be a batch, because the exit 'e' is made"
    ):
        off.route([("s", linear()), off.Leave("e"), ("h", linear(4, 3))])
    with pytest.raises(BadNetwork, match="training mode"):
        off.route([("s", nn.Linear(4, 3))], example=X)


def test_more_than_sixteen_paths_are_refused_where_all_are_asked_for():
    steps = [("s", linear())]
    for number in range(5):
        steps.append(off.Fork(f"f{number}", {f"skip{number}": [], f"unit{number}": linear()}))
    net = off.route([*steps, ("h", linear(4, 3))], example=X)
    with pytest.raises(BadNetwork, match="32 paths lead to 'h', expected at most 16"):
        net(X)


@pytest.mark.filterwarnings("ignore::offramp.errors.UntrainedExitWarning")
def test_an_arm_that_is_nothing_but_an_exit_has_a_price():
    arms = {"reject": [off.Leave("no", "linear", None)], "go": linear()}
    net = off.route([off.Fork("f", arms), ("h", linear(4, 3))], example=X)
    trace = off.record(net, X, timed=False, progress=False)
    no, head = (trace.prices.along(path, unit="macs", batch=1) for path in (["no"], ["go", "h"]))
    assert (no, head) == (4 * 3, 4 * 4 + 4 * 3)
    assert trace.prices.unit(None) == "macs"


def cut_network(**options):
    torch.manual_seed(3)
    model = nn.Sequential(linear(), nn.ReLU(), linear(), nn.ReLU(), linear(4, 3)).eval()
    return off.cut(model, X, at=["1", "3"], exits="linear", **options)


def test_a_network_that_was_cut_is_an_arm_with_its_exits():
    deep = cut_network()
    fork = off.Fork("size", {"small": linear(4, 3), "deep": deep}, gate="controller?width=4")
    net = off.route([("stem", linear()), fork], example=X)
    assert net.topology.names == (
        *("stem", "size", "small", "deep-1", "deep-1-exit", "deep-3", "deep-3-exit", "deep"),
    )
    assert net.topology.exits == ("small", "deep-1-exit", "deep-3-exit", "deep")
    assert net.untrained() == ("deep-1-exit", "deep-3-exit")
    # the same weights, and the answers of the network alone
    known = {id(value) for value in net.parameters()}
    assert {id(value) for value in deep.parameters()} <= known
    with torch.no_grad():
        wanted = deep(net.backbone["stem"](X))
        found = net(X)[1:]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    plan = off.Plan.by_hand({"size": math.inf, "deep-1-exit": -math.inf})
    answers = off.run(net, plan, X)
    assert set(answers.exit.tolist()) == {1}
    torch.testing.assert_close(answers.logits, wanted[0])


def test_a_network_that_was_cut_brings_its_preprocessing():
    class Half(nn.Module):
        def forward(self, x):
            return x / 2

    deep = cut_network(preprocess=Half())
    first = off.route([off.Fork("f", {"a": linear(4, 3), "b": deep})], example=X)
    assert [*first.fronts] == ["b-1"]
    later = off.route([("s", nn.Identity().eval()), ("b", deep)], example=X)
    with torch.no_grad():
        torch.testing.assert_close(first(X)[-1], deep(X)[-1])
        torch.testing.assert_close(later(X)[-1], deep(X)[-1])


class Reading(off.Exit):
    def __init__(self, reads):
        super().__init__()
        self.reads = tuple(reads)

    def forward(self, seen):
        return sum(seen.logits.values(), seen.features[:, :3])

    def config(self):
        return {"name": "tests:Reading"}


def reading_exit(shape, classes, reads):
    return Reading(reads)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (
            lambda: off.ladder({"a": linear(4, 3), "b": linear(4, 3)}),
            "must be a module or a network made by cut, got a ladder",
        ),
        (
            lambda: off.route([("r", linear()), off.Fork("g", {"i": [], "j": linear()}),
                               ("k", linear(4, 3))], example=X),
            "got a network with forks",
        ),
        (
            lambda: off.cut(nn.Sequential(linear(), nn.ReLU(), linear(), linear(4, 3)).eval(), X,
                            at=["0", "1"], exits=reading_exit),
            "reads 0, and within route exits read their own features",
        ),
    ],
)  # fmt: skip
def test_networks_that_are_no_steps(network, says):
    with pytest.raises(BadNetwork, match=says):
        off.route([("s", linear()), ("n", network()), ("h", linear(3, 3))], example=X)
    with pytest.raises(InvalidArgument, match="is a network, whose first segment reads the step"):
        off.route([("s", linear()), ("t", linear()), ("n", cut_network(), {"s": None})], example=X)


def test_a_list_within_itself_is_a_circle():
    steps = [("s", linear())]
    steps.append(off.Fork("f", {"again": steps, "b": linear()}))
    with pytest.raises(InvalidArgument, match="contains itself: rows would go in a circle"):
        off.route(steps, example=X)


def test_two_gates_of_one_name_are_refused():
    forks = [off.Fork("f", {f"skip{n}": [], f"unit{n}": linear()}) for n in range(2)]
    with pytest.raises(InvalidArgument, match="must have its own name, got 'f' twice"):
        off.route([("s", linear()), *forks, ("h", linear(4, 3))], example=X)
