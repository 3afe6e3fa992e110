"""Opening refuses training mode, a plan of another network, and a machine that computes
differently.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import (
    BadData,
    BadFile,
    BadNetwork,
    InvalidArgument,
    Mismatch,
    StaleRunner,
    UnknownName,
)
from offramp.plans.plan import Plan
from offramp.runtime import graphs
from offramp.runtime import session as opening
from small import dense, ladder_of, moved, rows_of, seeded


def test_run_opens_again_after_a_change(two):
    plan = Plan.by_hand({"small": math.inf})
    x = rows_of(5)
    before = off.run(two, plan, x).logits
    with torch.no_grad():
        two.backbone["small"].weight.add_(1)
        two.backbone["middle"][0].bias.add_(1)
    after = off.run(two, plan, x).logits
    torch.testing.assert_close(after, two(x)[-1])
    assert (after - before).abs().max() > 1e-3


def test_run_keeps_its_runner_while_nothing_changes(two, monkeypatch):
    opened = []
    monkeypatch.setattr(opening, "open", lambda *a, **k: opened.append(1) or _open(*a, **k))
    plan = Plan.by_hand({"small": 0.4})
    x = rows_of(5)
    for _ in range(3):
        opening.run(two, plan, x)
    assert len(opened) == 1
    opening.run(two, Plan.by_hand({"small": 0.4}), x)
    assert len(opened) == 2


_open = opening.open


LEVEL = 1.0


def by_level(z):
    two = z.topk(2, -1).values
    return (two[:, 0] - two[:, 1]) * LEVEL


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.act = nn.LeakyReLU(0.1)
        self.last = nn.Linear(8, 3)
        self.scale = 1.0
        self.by = torch.ones(1)
        self._table = {"by": 1.0}

    def forward(self, x):
        return (
            self.last(self.act(self.norm(self.first(x)))) * self.scale * self.by * self._table["by"]
        )


def set_level(net):
    global LEVEL
    LEVEL = 3.0


class OtherLinear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


AFTER_OPEN = {
    "a global that the gate reads": set_level,
    "an attribute of the model": lambda net: setattr(net.backbone["large"], "scale", 3.0),
    "a tensor of the model": lambda net: net.backbone["large"].by.mul_(3),
    "a setting of a layer": lambda net: setattr(net.backbone["large"].act, "negative_slope", 3.0),
    "eps": lambda net: setattr(net.backbone["large"].norm, "eps", 3.0),
    "a class": lambda net: setattr(net.backbone["large"].last, "__class__", OtherLinear),
    "a forward of its own": lambda net: setattr(
        net.backbone["large"].last, "forward", lambda x: x[:, :3]
    ),
}


def refused(runner, x):
    try:
        runner(x)
    except StaleRunner:
        return True
    return False


@pytest.mark.parametrize("case", AFTER_OPEN)
def test_what_the_code_reads_may_not_change_after_open(case):
    global LEVEL
    LEVEL = 1.0
    net = off.ladder({"small": dense(0), "large": seeded(Scaled, 0).eval()}, gate=by_level)
    x = rows_of(300)
    plan = off.calibrate(off.record(net, x, timed=False, progress=False), at_most=0.9)
    runner = off.open(net, plan)
    off.run(net, plan, x)
    runner.check()
    for _ in range(5):
        runner(x)
    AFTER_OPEN[case](net)
    # of few modules all are looked at within two batches
    assert any(refused(runner, x) for _ in range(2))
    with pytest.raises(StaleRunner, match="open again"):
        runner.check()
    # not the Runner that was kept: it opens anew, and that is refused
    with pytest.raises(Mismatch):
        off.run(net, plan, x)
    LEVEL = 1.0


def test_an_entry_of_a_dict_is_noticed_by_check_and_by_run():
    net = off.ladder({"small": dense(0), "large": seeded(Scaled, 0).eval()})
    plan = Plan.by_hand({"small": math.inf})
    x = rows_of(5)
    runner = off.open(net, plan)
    before = off.run(net, plan, x).logits
    net.backbone["large"]._table["by"] = 2.0
    with pytest.raises(StaleRunner, match="open again"):
        runner.check()
    torch.testing.assert_close(off.run(net, plan, x).logits, 2 * before)


def test_a_counter_of_the_model_is_no_change():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 3)
            self.calls = 0
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(len(x))
            return self.last(x)

    net = off.ladder({"small": dense(0), "large": seeded(Counting, 0).eval()})
    runner = off.open(net, Plan.by_hand({"small": math.inf}))
    for size in (1, 2, 3):
        runner(rows_of(size))
    runner.check()
    assert net.backbone["large"].calls > 2


def test_run_lets_go_of_networks():
    net = ladder_of(2)
    off.run(net, Plan.by_hand({"small": 0.4}), rows_of(5))
    gone = [weakref.ref(net), weakref.ref(net.backbone["middle"])]
    del net
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_training_mode_is_refused(two):
    with pytest.raises(BadNetwork, match="eval"):
        off.open(two.train(), Plan.by_hand({}))


def test_an_unknown_gate_is_refused(two):
    with pytest.raises(UnknownName, match="small"):
        off.open(two, Plan.by_hand({"smal": 1.0}))


def test_a_gate_has_as_many_thresholds_as_routes(two):
    with pytest.raises(InvalidArgument, match="must have 1 threshold, one per score, got 2"):
        off.open(two, Plan.by_hand({"small": (1.0, 2.0)}))


def test_another_device_is_refused(two):
    with pytest.raises(InvalidArgument, match="meta"):
        off.open(two, Plan.by_hand({}), device="meta")


def test_a_plan_of_another_network_engine_or_precision_is_refused(two):
    trace = off.record(two, rows_of(30).numpy(), timed=False)
    plan = Plan(thresholds={"small": (0.5,)}, origin=trace.header.origin)
    off.open(two, plan)
    with pytest.raises(Mismatch, match="network"):
        off.open(ladder_of(2, seed=9), plan)
    with pytest.raises(Mismatch, match="float64"):
        off.open(two.double(), plan)


def test_the_probe_notices_a_machine_that_computes_differently(two):
    origin = off.record(two, rows_of(30).numpy(), timed=False).header.origin
    first, *others = origin.probe.logits[1]
    moved = ((first[0] + 0.01, *first[1:]), *others)
    probe = replace(origin.probe, logits=(origin.probe.logits[0], moved))
    with pytest.raises(Mismatch, match="probe"):
        off.open(two, Plan(thresholds={}, origin=replace(origin, probe=probe)))


class Cast(nn.Module):
    """What a ladder cannot export: the answers of other software, by way of NumPy."""

    def forward(self, x):
        return torch.as_tensor(np.asarray(x)[:, :3])


def sentences():
    draw = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(0, 9, (12, 5), generator=draw),
        "mask": torch.ones(12, 5, dtype=torch.int64),
    }


class Words(nn.Module):
    """Words [B, 5] and their mask -> logits [B, 3]."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, ids, mask):
        return self.last(self.first((self.table(ids) * mask[..., None]).sum(1)).relu())


def read_through(kind):
    """A network of `Words`, and its gate."""
    model = seeded(Words, 0).eval()
    x = sentences()
    if kind == "ladder":
        return off.ladder({"small": seeded(Words, 1).eval(), "large": model}), "small"
    return moved(
        off.cut(model, {name: value[:4] for name, value in x.items()}, at=["first"], exits="linear")
    ), "first"


@pytest.mark.parametrize("kind", ["ladder", "cut"])
@pytest.mark.parametrize("names", [["ids"], ["ids", "mask", "more"], None])
def test_inputs_that_are_missing_or_too_many_are_told(kind, names):
    net, gate = read_through(kind)
    x = sentences() | {"more": torch.zeros(12, 2)}
    given = x["ids"] if names is None else {name: x[name] for name in names}
    runner = off.open(net, Plan.by_hand({gate: 0.5}))
    with pytest.raises(BadData, match=r"mask|more"):
        runner(given)
    with pytest.raises(BadData, match=r"mask|more"):
        off.record(
            net,
            {name: np.asarray(value) for name, value in given.items()} if names else given.numpy(),
        )


def test_a_plan_by_hand_of_a_ladder_is_compiled_when_it_is_opened(monkeypatch):
    """Not while it serves, when the first row goes on; and without rows nobody knows for which
    shape.
    """
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = ladder_of(2)
    plan = Plan.by_hand({"small": 0.4})
    x = rows_of(6)
    with pytest.raises(InvalidArgument, match="example=x"):
        off.open(net, plan, engine="onnxruntime")
    with pytest.raises(BadData, match="at least one row, got none"):
        off.open(net, plan, engine="onnxruntime", example=x[:0])
    known = ladder_of(2, example=x)
    runners = [
        off.open(net, plan, engine="onnxruntime", example=x[:1]),
        off.open(known, plan, engine="onnxruntime"),
        off.open(ladder_of(2), plan, engine="onnxruntime", timing_rows=x),
    ]
    monkeypatch.setattr(graphs, "written", lambda *_: pytest.fail("written while it serves"))
    want = off.open(net, plan)(x)
    for runner in runners:
        torch.testing.assert_close(runner(x).logits, want.logits, atol=1e-4, rtol=1e-4)


def test_a_member_that_cannot_be_exported_is_named():
    pytest.importorskip("onnxscript")
    net = off.ladder({"small": dense(0), "other": Cast()}).eval()
    with pytest.raises(BadNetwork, match="segment 'other' cannot be written as ONNX"):
        off.open(net, Plan.by_hand({"small": 0.4}), engine="onnxruntime", example=rows_of(4))


def test_a_child_in_training_mode_is_named():
    net = ladder_of(2)
    net.backbone["middle"][1].train()
    for verb in (lambda: off.open(net, Plan.by_hand({})), lambda: off.record(net, rows_of(9))):
        with pytest.raises(
            BadNetwork, match=r"'backbone.middle.1' in the network is in training mode"
        ):
            verb()
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 3)).eval()
    model[1].train()
    with pytest.raises(BadNetwork, match=r"'1' in the model is in training mode.*model\.eval"):
        off.cut(model, rows_of(4), at=["0"])


def test_paths_in_place_of_things_are_told(two, tmp_path):
    with pytest.raises(
        InvalidArgument, match=r"the plan must be a Plan.*load it first, with Plan.load"
    ):
        off.open(two, "plan.json")
    with pytest.raises(
        InvalidArgument, match=r"the trace must be a Trace.*load it first, with Trace.load"
    ):
        off.calibrate("trace.npz", at_most=0.1)
    off.save(two, tmp_path / "net")
    for load in (Plan.load, off.Trace.load):
        with pytest.raises(BadFile, match="must be a file, got a folder with a network"):
            load(tmp_path / "net")


def test_time_on_no_rows_is_refused(two):
    with pytest.raises(BadData, match="timing_rows must have at least one row"):
        off.open(two, Plan.by_hand({}), timing_rows=rows_of(0))


@pytest.mark.parametrize(
    ("asked", "index", "there"),
    [
        ("cpu", "cpu", True),
        ("cuda", "cuda:1", True),
        ("cuda:1", "cuda:0", False),
        ("cuda:0", "cuda", True),
    ],
)
def test_a_device_by_number_is_that_one(asked, index, there):
    assert opening._there(torch.device(asked), torch.device(index)) is there
