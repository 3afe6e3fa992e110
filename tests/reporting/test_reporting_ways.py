"""The picture of a network with forks: the shares on its edges are those of replay."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import offramp as off
from forked import CLASSES, THREE, WIDTH, three
from offramp.plans.plan import Plan
from offramp.plans.topology import LEAVE
from offramp.reporting.view import view_of
from offramp.reporting.ways import BEND, LANE, Way, _detour, _passes_boxes, picture, ways_of
from routes import drawn

pytest.importorskip("plotly")


def recorded(net):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (500, WIDTH), generator=draw).float()
    return off.record(net, (x, torch.arange(500) % CLASSES), timed=False, progress=False)


PLAN = Plan.by_hand({"size": (1.0, 0.0), "middle": 1.0})


def test_shares_are_counted_along_the_ways():
    trace = recorded(three())
    view = view_of(trace, PLAN)
    shares = {(way.start, way.end): way.share for way in ways_of(view)}
    first, second = (trace.columns[f"score/size@{route}"] for route in (0, 1))
    assert shares["size", "small"] == (first >= 1).mean()
    assert shares["size", "middle"] == ((first < 1) & (second >= 0)).mean()
    assert shares["middle", "leave"] == (view.replay.exit == THREE.exits.index("middle")).mean()
    assert shares["stem", "size"] == 1.0
    assert sum(share for (_, end), share in shares.items() if end == "leave") == pytest.approx(1)


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_into_a_node_goes_out_again(seed):
    net = drawn(seed)
    trace = recorded(net)
    thresholds = {gate: (0.5,) * net.topology.routes(gate) for gate in net.topology.gates}
    ways = ways_of(view_of(trace, Plan.by_hand(thresholds)))
    for name in net.topology.names[1:]:
        arrived = sum(way.share for way in ways if way.end == name)
        left = sum(way.share for way in ways if way.start == name)
        assert arrived == pytest.approx(left)


def test_boxes_do_not_lie_on_each_other():
    for seed in range(6):
        net = drawn(seed)
        view = view_of(recorded(net), Plan.by_hand({}))
        drawing = picture(view)
        spots = re.findall(r'<rect x="(\d+)" y="(\d+)"', drawing)
        assert len(spots) == len(set(spots)) == len(net.topology.names)


@pytest.mark.parametrize("timed", [False, True])
def test_a_report_of_a_network_with_forks(tmp_path, timed):
    trace = recorded(three())
    plan = off.calibrate(trace, budget=0.9, risk="disagreement") if timed else PLAN
    page = off.report(trace, plan, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The ways of the rows" in page
    share = view_of(trace, plan)
    assert f"{np.mean(share.replay.answer == trace.labels):.2%}" in page
    for name in THREE.names:
        assert f">{name}</text>" in page


def test_an_edge_goes_round_the_boxes_in_its_way():
    """The arm that skips "first" and "second" must not be taken for one that comes from them."""
    names = ("fork", "first", "second", "head")
    spots = {name: (10 + 170 * column, 26) for column, name in enumerate(names)}
    skip = Way("fork", "head", 0.25)
    assert _passes_boxes(skip, spots)
    lane = 26 - LANE
    drawn = str(_detour(skip, spots))
    assert f"L {10 + 3 * 170 - BEND} {lane}" in drawn
    assert "25%" in drawn
    for way in (Way("fork", "first", 0.5), Way("first", "second", 1.0), Way("first", LEAVE, 0.1)):
        assert not _passes_boxes(way, spots)
    spots["first"] = spots["second"] = (180, 26 + 2 * 62)
    assert not _passes_boxes(skip, spots)
