"""A cut network as it runs: pieces equal to the eager model, what is closed is not run, what
changes is noticed.
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.building.cutting import cut
from offramp.errors import InvalidArgument, StaleRunner, UntrainedExitWarning
from offramp.layers.preprocess import Preprocess
from offramp.networks.nodes import Exit
from offramp.partition.segmenting import points_of, segments_of
from offramp.plans.plan import Plan
from offramp.runtime.benching import bench
from offramp.runtime.recording import record
from small import Reader, Stages, cut_of, dense, images_of, moved, rows_of, seeded, stages

NEVER = {"stem": math.inf, "blocks.0": math.inf}


@pytest.mark.parametrize("count", [1, 2, 9])
def test_all_exits_run_as_the_eager_network_gives_them(count):
    net = cut_of()
    x = images_of(count)
    for index, (want, got) in enumerate(
        zip(net(x), off.open(net, Plan.by_hand(NEVER)).anytime(x), strict=True)
    ):
        torch.testing.assert_close(got.logits, want.detach(), atol=1e-5, rtol=1e-5)
        assert got.exit.tolist() == [index] * count


def test_run_equals_replay_with_closed_exits():
    net = cut_of()
    x = images_of(50)
    trace = record(net, x.numpy(), timed=False, progress=False)
    middle = {
        gate: float(np.median(trace.columns[f"score/{gate}"])) + 1e-3 for gate in net.topology.gates
    }
    for closed in ([], ["stem"], ["blocks.0"], ["stem", "blocks.0"]):
        for max_exit in (None, "blocks.0"):
            plan = Plan.by_hand(middle | dict.fromkeys(closed, math.inf), max_exit=max_exit)
            answers = off.run(net, plan, x)
            done = trace.replay(plan)
            assert answers.exit.tolist() == done.exit.tolist()
            assert answers.why.tolist() == done.why.tolist()
            assert answers.logits.argmax(1).tolist() == done.answer.tolist()


class Counted(Exit):
    """A linear exit that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = seeded(lambda: nn.LazyLinear(3), 0)
        self.calls = 0

    def forward(self, seen):
        self.calls += 1
        return self.head(seen.features.flatten(1))

    def config(self):
        return {"name": "tests:Counted"}


def test_an_exit_that_is_closed_is_neither_run_nor_charged():
    net = cut_of(exits={"stem": Counted(), "blocks.0": Counted()})
    trace = record(net, images_of(20).numpy(), timed=False, progress=False)
    plan = Plan.by_hand(
        {"stem": math.inf, "blocks.0": float(np.median(trace.columns["score/blocks.0"])) + 1e-3}
    )
    before = net.exits["stem"].calls
    off.open(net, plan)(images_of(20))
    assert net.exits["stem"].calls == before
    assert net.exits["blocks.0"].calls > 0
    segments = [trace.columns[f"cost/segment/{name}"][0] for name in net.topology.exits]
    exit_ = trace.columns["cost/exit/blocks.0"][0]
    done = trace.replay(plan)
    price = trace.evaluate(plan, risk="disagreement").prices[0]
    stayed = (done.exit == 2).mean()
    assert price.mean == pytest.approx(segments[0] + segments[1] + exit_ + stayed * segments[2])
    assert price.plain == pytest.approx(sum(segments))


def test_the_backbone_is_a_reference_by_its_name():
    net = cut_of()
    trace = record(net, (images_of(30).numpy(), np.arange(30) % 3), timed=False, progress=False)
    assert trace.reference("backbone") == trace.reference("last") == "backbone"
    plan = Plan.by_hand({"stem": 0.0})
    for reference in ("last", "backbone"):
        found = trace.evaluate(plan, risk="disagreement", reference=reference)
        assert (
            found.risk.value
            == (trace.columns["answer/stem"] != trace.columns["answer/backbone"]).mean()
        )


CHANGES = {
    "a weight of the first piece": lambda net: net.backbone.stem[0].weight.mul_(2),
    "a weight of the last piece": lambda net: net.backbone.head.weight.mul_(2),
    "a new weight": lambda net: setattr(
        net.backbone.head, "weight", nn.Parameter(torch.ones(3, 64))
    ),
    "a running mean": lambda net: net.backbone.stem[1].running_mean.add_(1),
    "a module without weights": lambda net: net.backbone.blocks[1].__setitem__(0, nn.Tanh().eval()),
    "dropout in training mode": lambda net: net.backbone.drop.train(),
    "an exit": lambda net: net.exits["blocks.0"].head[0].bias.add_(1),
    "double": lambda net: net.double(),
    "training": lambda net: net.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change):
    net = cut_of()
    x = images_of(3)
    runner = off.open(net, Plan.by_hand({"stem": 1e9, "blocks.0": 1e9}))
    runner(x)
    with torch.no_grad():
        CHANGES[change](net)
    with pytest.raises(StaleRunner):
        runner(x)
    with pytest.raises(StaleRunner):
        runner.check()


def test_opened_again_it_gives_what_it_is_now():
    net = cut_of()
    x = images_of(3)
    plan = Plan.by_hand(NEVER)
    kept = segments_of(net)
    assert segments_of(net) is kept
    with torch.no_grad():
        net.backbone.head.weight.mul_(2)  # in place: the pieces share it
    assert segments_of(net) is kept
    torch.testing.assert_close(
        off.run(net, plan, x).logits, net(x)[-1].detach(), atol=1e-5, rtol=1e-5
    )
    net.backbone.blocks[1][0] = nn.Tanh().eval()
    assert segments_of(net) is not kept
    torch.testing.assert_close(
        off.run(net, plan, x).logits, net(x)[-1].detach(), atol=1e-5, rtol=1e-5
    )
    net.double()
    torch.testing.assert_close(off.run(net, plan, x.double()).logits, net(x.double())[-1].detach())


class Times(nn.Module):
    """A model whose code can be changed without another module or tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU())
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.by = 1.0

    def forward(self, x):
        return self.head(self.norm(self.stem(x))) * self.by


class Less(Times):
    def forward(self, x):
        return -self.head(self.stem(x))


CODE = {
    "an attribute": lambda m: setattr(m, "by", 2.0),
    "a setting of a layer": lambda m: setattr(m.stem[1], "negative_slope", 2.0),
    "eps": lambda m: setattr(m.norm, "eps", 5.0),
    "a class": lambda m: setattr(m, "__class__", Less),
    "a forward of its own": lambda m: setattr(m, "forward", lambda x: -m.head(m.stem(x))),
    "a forward hook": lambda m: m.head.register_forward_hook(lambda _, __, y: -y),
    "a pre-hook": lambda m: m.head.register_forward_pre_hook(lambda _, x: (-x[0],)),
}


# On ONNX Runtime each change needs four exports, and the pieces are the same.
@pytest.mark.parametrize(
    ("change", "engine"),
    [
        *((change, "torch") for change in CODE),
        ("an attribute", "onnxruntime"),
        *(
            pytest.param(change, "onnxruntime", marks=pytest.mark.slow)
            for change in CODE
            if change != "an attribute"
        ),
    ],
)
def test_pieces_are_made_again_when_the_code_changes(change, engine):
    """The modules and tensors are the same objects, so the pieces of before look as if they fit."""
    if engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model = seeded(Times, 0).eval()
    x = rows_of(20)
    net = cut(model, x[:4], at=["stem"], exits="linear").eval()
    plan = Plan.by_hand({"stem": math.inf})
    runner = off.open(net, plan, engine=engine)
    with torch.no_grad():
        before = model(x)
        torch.testing.assert_close(off.run(net, plan, x, engine=engine).logits, before)
        CODE[change](model)
        after = model(x)
    assert not torch.allclose(before, after, atol=1e-3)
    with pytest.raises(StaleRunner):
        runner.check()
    torch.testing.assert_close(off.run(net, plan, x, engine=engine).logits, after)
    with pytest.warns(UntrainedExitWarning):
        trace = record(net, x, timed=False, progress=False, engine=engine)
    recorded = torch.as_tensor(trace.columns["logits/backbone"])
    torch.testing.assert_close(recorded, after, atol=1e-5, rtol=1e-5)


def test_each_module_is_watched_by_the_pieces_that_use_it():
    segments = segments_of(cut_of())
    assert all(
        isinstance(module, nn.Module) for segment in segments.values() for module in segment.modules
    )
    homes = {
        name: {type(module).__name__ for module in segment.modules}
        for name, segment in segments.items()
    }
    assert homes == {
        "stem": {"Stages", "Sequential", "ModuleList", "Conv2d", "BatchNorm2d", "ReLU", "Dropout"},
        "blocks.0": {"Conv2d"},
        "backbone": {"Conv2d", "Linear"},
    }


def test_an_exit_that_was_never_trained(tmp_path):
    net = cut_of(trained=False)
    x = (images_of(60).numpy(), np.arange(60) % 3)
    assert net.untrained() == ("stem", "blocks.0")
    with pytest.warns(UntrainedExitWarning, match="never trained: stem, blocks.0"):
        trace = record(net, x, timed=False, progress=False)
    assert not trace.header.trained
    trace.save(tmp_path / "trace.npz")
    with pytest.raises(InvalidArgument, match="never trained"):
        off.calibrate(off.Trace.load(tmp_path / "trace.npz"), risk="disagreement", at_most=0.5)
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", stages(seed=3))
    assert again.untrained() == ("stem", "blocks.0")
    with torch.no_grad():
        again.exits["stem"].head[0].weight.sub_(0.1)
    assert again.untrained() == ("blocks.0",)
    moved(again, -0.1)
    assert record(again, x, timed=False, progress=False).header.trained


def test_saved_and_loaded_it_runs_the_same(tmp_path):
    net = cut_of(exits="mlp", gate="max_prob")
    x = images_of(9)
    plan = Plan.by_hand({"stem": 0.4, "blocks.0": 0.4})
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", stages(seed=9))
    assert again.fingerprint() == net.fingerprint()
    assert (again.members, again.topology, again.config()) == (
        net.members,
        net.topology,
        net.config(),
    )
    assert "exits.blocks.0.head.2.bias" in again.state_dict()
    mine = off.run(net, plan, x)
    its = off.run(again, plan, x)
    assert mine.exit.tolist() == its.exit.tolist()
    assert torch.equal(mine.logits, its.logits)


def test_an_exit_of_ones_own_is_given_again(tmp_path):
    mine = Counted()
    net = cut_of("stem", exits=mine)
    off.save(net, tmp_path / "net")
    with pytest.raises(InvalidArgument, match=r"give it again: load\(folder, exits="):
        off.load(tmp_path / "net", stages())
    assert (
        off.load(tmp_path / "net", stages(), exits={"stem": mine}).fingerprint()
        == net.fingerprint()
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


def test_tied_weights(tmp_path):
    net = moved(cut(seeded(Tied, 0).eval(), rows_of(4), at=["first"], exits="linear"))
    off.save(net, tmp_path / "net")
    again = off.load(tmp_path / "net", seeded(Tied, 1).eval())
    assert again.backbone.second.weight is again.backbone.first.weight
    for mine, its in zip(net(rows_of(5)), again(rows_of(5)), strict=True):
        assert torch.equal(mine, its)
    runner = off.open(again, Plan.by_hand({"first": 1e9}))
    with torch.no_grad():
        again.backbone.second.weight.add_(1)
    with pytest.raises(StaleRunner):
        runner(rows_of(2))


def test_an_exit_may_read_an_earlier_one():
    net = cut_of(exits={"stem": "linear", "blocks.0": Reader()})
    first, second, _ = net(images_of(4))
    assert torch.equal(second, first * 2)
    answers = off.run(net, Plan.by_hand({"stem": math.inf, "blocks.0": -math.inf}), images_of(4))
    torch.testing.assert_close(answers.logits, second.detach(), atol=1e-5, rtol=1e-5)


def test_a_model_that_was_not_the_one_that_was_cut(tmp_path):
    off.save(cut_of(), tmp_path / "net")
    with pytest.raises(InvalidArgument, match="no module 'stem'"):
        off.load(tmp_path / "net", dense(1))


def test_deadlines_anytime_bench_and_empty_batches():
    net = cut_of()
    x = images_of(64)
    runner = off.open(net, Plan.by_hand({"stem": 0.0, "blocks.0": 0.0}), timing_rows=x)
    assert set(runner(x, deadline_ms=1e4).exit.tolist()) == {0}
    assert len(runner(x[:0]).exit) == 0
    lines = bench(net, Plan.by_hand({"stem": 0.5}), x, batches=(1, 8), repeats=5).lines
    assert {line.batch for line in lines} == {1, 8}


def test_two_threads_open_and_run_one_network():
    net = cut_of()
    x = images_of(16)
    want = [logits.detach() for logits in net(x)]
    net.double()
    net.float()  # other tensors: both threads find nothing kept
    plan = Plan.by_hand({"stem": 1e9, "blocks.0": 1e9})

    def job(_):
        return off.open(net, plan)(x).logits, net(x)[1].detach()

    with ThreadPoolExecutor(4) as pool:
        for last, second in pool.map(job, range(12)):
            torch.testing.assert_close(last, want[2], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(second, want[1], atol=1e-5, rtol=1e-5)


def test_a_copy_is_a_network_of_its_own():
    net = cut_of()
    x = images_of(4)
    plan = Plan.by_hand(NEVER)
    other = copy.deepcopy(net)
    moved(net, 1.0)
    with torch.no_grad():
        net.backbone.head.weight.zero_()
    torch.testing.assert_close(
        off.run(other, plan, x).logits, other(x)[-1].detach(), atol=1e-5, rtol=1e-5
    )
    assert not torch.equal(other(x)[-1], net(x)[-1])


class Branching(nn.Module):
    """Cannot be exported: its code asks for values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() < 1e9 else x


def test_explicit_stages_may_share_a_layer():
    """One ReLU at two places: each stage has the layers between its cuts all the same."""
    relu = nn.ReLU()
    layers = [seeded(Branching, 0), relu, nn.Linear(4, 4), relu, nn.Linear(4, 3)]
    model = nn.Sequential(*layers).eval()
    net = off.cut(model, rows_of(4), at=["2"], exits="linear")
    answers = off.run(net, off.Plan.by_hand({"2": 1e9}), rows_of(4))
    torch.testing.assert_close(answers.logits, model(rows_of(4)).detach())


def test_explicit_stages_are_the_way_out():
    model = nn.Sequential(seeded(Branching, 0), nn.ReLU(inplace=True), nn.Linear(4, 3)).eval()
    net = moved(cut(model, rows_of(4), at=["0", "1"], exits="linear"))
    x = rows_of(9)
    for got, want in zip(
        off.open(net, Plan.by_hand({"0": 1e9, "1": 1e9})).anytime(x), net(x), strict=True
    ):
        torch.testing.assert_close(got.logits, want.detach(), atol=1e-5, rtol=1e-5)
    behind = moved(
        cut(model, rows_of(4), at=["0"], exits="linear", preprocess=nn.Identity().eval())
    )
    torch.testing.assert_close(
        off.run(behind, Plan.by_hand({"0": 1e9}), x).logits, model(x).detach()
    )


def test_points_of_a_model_behind_a_front():
    raw = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    points = points_of(stages(), Preprocess(), {"x": raw})
    assert [point.name for point in points if point.legal][:2] == ["stem.0", "stem.1"]
    assert {point.name for point in points} == {
        name for name, _ in Stages().named_modules() if name
    }
