"""A ladder that is not cheapest first is warned about; what is no ladder, or costs nothing, is
not.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from offramp.calibration.calibrating import calibrate
from offramp.calibration.members import warn_of_order
from offramp.errors import DearFirst, InvalidArgument
from offramp.plans.header import Header
from offramp.plans.topology import Node, Topology
from offramp.plans.trace import Trace
from small import trace_of


@pytest.mark.parametrize(
    "options", [{"at_most": 0.2}, {"budget": 1.2}, {"at_most": 0.2, "testing": "pareto"}]
)
def test_a_dear_member_before_a_cheap_one(options):
    trace = trace_of(600, macs=(1.0, 9.0, 3.0))
    with pytest.warns(
        DearFirst,
        match=r"small \(1\), middle \(9\), large \(3\); .* in the order small, large, middle$",
    ):
        calibrate(trace, **options)


def test_the_right_order_and_equal_members_are_no_matter():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(trace_of(600), at_most=0.2)
        warn_of_order(trace_of(50, macs=(2.0, 2.0, 2.0)))
        warn_of_order(trace_of(50, macs=(2.0, 0.0, 3.0)))  # nobody knows what it costs


def as_cut(trace: Trace) -> Trace:
    """The same columns as those of one model that was cut: each segment continues from the one
    before.
    """
    names = trace.topology.exits
    nodes = [Node(name, after=names[max(index - 1, 0) : index]) for index, name in enumerate(names)]
    header = {**vars(trace.header), "topology": Topology.chain(nodes)}
    return Trace(trace.columns, Header(**header))


def test_segments_of_one_model_have_no_order_to_choose():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_order(as_cut(trace_of(50, macs=(9.0, 2.0, 1.0))))


def test_milliseconds_count_where_they_are_saved():
    trace = trace_of(600)
    dear = {"cost/segment/small": np.array([1.0, 50.0, 0.0])}
    cheap = {
        f"cost/segment/{name}": np.array([macs, 1.0, 0.1])
        for name, macs in (("middle", 2.0), ("large", 8.0))
    }
    timed = Trace({**trace.columns, **dear, **cheap}, trace.header)
    with pytest.warns(DearFirst, match="in milliseconds at batch 1 per row"):
        calibrate(timed, at_most=0.2, unit="ms", batch=1)
    with pytest.raises(InvalidArgument, match="not measured"):
        warn_of_order(trace, "ms", 1)
