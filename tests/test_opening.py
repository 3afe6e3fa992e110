"""Opening refuses training mode, a plan of another network, and a machine that computes differently."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch

import offramp as off
from offramp import opening
from offramp.errors import BadData, BadInput, BadNetwork, Mismatch, UnknownName
from offramp.plan import Plan
from small import ladder_of, rows_of


def test_run_opens_again_after_a_change(two):
    plan, x = Plan.by_hand({"small": math.inf}), rows_of(5)
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
    plan, x = Plan.by_hand({"small": 0.4}), rows_of(5)
    for _ in range(3):
        opening.run(two, plan, x)
    assert len(opened) == 1
    opening.run(two, Plan.by_hand({"small": 0.4}), x)
    assert len(opened) == 2


_open = opening.open


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
    with pytest.raises(BadInput, match="2 thresholds"):
        off.open(two, Plan.by_hand({"small": (1.0, 2.0)}))


def test_another_device_is_refused(two):
    with pytest.raises(BadInput, match="meta"):
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


def test_time_on_no_rows_is_refused(two):
    with pytest.raises(BadData, match="time_on has no rows"):
        off.open(two, Plan.by_hand({}), time_on=rows_of(0))


@pytest.mark.parametrize(
    ("asked", "place", "there"),
    [("cpu", "cpu", True), ("cuda", "cuda:1", True), ("cuda:1", "cuda:0", False), ("cuda:0", "cuda", True)],
)
def test_a_device_by_number_is_that_one(asked, place, there):
    assert opening._there(torch.device(asked), torch.device(place)) is there
