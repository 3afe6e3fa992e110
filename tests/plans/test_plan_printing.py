"""Plans, traces and what is made of them are short where a notebook shows them."""

from __future__ import annotations

import offramp as off
from offramp.calibration.checking import check
from reported import made


def test_each_repr_is_a_sentence_and_no_dump_of_arrays() -> None:
    trace = made()
    plan = off.calibrate(trace, risk="disagreement", at_most=0.1)
    for thing in (
        trace,
        plan,
        trace.evaluate(plan),
        trace.replay(plan),
        check(plan, trace, same_rows=True),
    ):
        assert repr(thing).startswith(f"<{type(thing).__name__}")
        assert "array(" not in repr(thing)
        assert len(repr(thing)) < 1200
    assert str(plan) in repr(plan)
    assert str(trace) in repr(trace)
