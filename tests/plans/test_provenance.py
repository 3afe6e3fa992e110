"""Digests of both forms: each is compared with its like, and where they cannot be compared that is
said.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import offramp as off
from offramp._support.files import from_document, to_document
from offramp.data.rows import digests_of
from offramp.errors import BadFile, Mismatch, NewerSchema, OverlappingRows
from offramp.plans.provenance import FORM, SeenRows, union
from offramp.plans.trace import Trace
from offramp.reporting.view import view_of
from offramp.reporting.words import freshness
from offramp.runtime.recording import record
from small import ladder_of, rows_of, trace_of

GOLDEN = Path(__file__).parents[1] / "golden"
X = rows_of(12, whole=True).numpy()


def seen(start: int, stop: int, form: int = FORM) -> SeenRows:
    return SeenRows(f"x[{start}:{stop}]", "0" * 16, digests_of(X[start:stop], form), form)


def test_a_file_of_the_first_edition_holds_the_first_form():
    trace = Trace.load(GOLDEN / "trace.npz")
    plan = off.Plan.load(GOLDEN / "plan.json")
    assert trace.header.digest_form == trace.seen.form == plan.rows.form == 1
    digests = trace.columns["digest"]
    form = trace.header.digest_form
    with pytest.raises(OverlappingRows, match="60 of the 60 test rows"):
        plan.rows.refuse_overlap(digests, "test", form=form)


def test_forms_that_cannot_be_compared(tmp_path):
    old = seen(0, 6, form=1)
    new = seen(0, 6)
    for mine, its in ((old, new), (new, old)):
        with pytest.raises(Mismatch, match="cannot be compared"):
            mine.refuse_overlap(its.digests, "test", form=its.form)
    trace = trace_of(200)
    plan = off.calibrate(trace, budget=0.9)
    aged = replace(plan, rows=replace(plan.rows, form=1))
    with pytest.raises(Mismatch, match="Record both again"):
        aged.rows.refuse_overlap(trace.columns["digest"], "test", form=trace.header.digest_form)
    assert "All rows of this page helped" in freshness(view_of(trace, plan))
    assert "it is not known" in freshness(view_of(trace, aged))
    other = replace(trace, header=replace(trace.header, digest_form=1))
    with pytest.raises(Mismatch, match="cannot be compared"):
        off.calibrate(trace, at_most=0.5, search=other)


def test_the_form_survives_a_trace_file(tmp_path):
    for form in (1, FORM):
        trace = trace_of(20)
        trace = replace(trace, header=replace(trace.header, digest_form=form))
        trace.save(tmp_path / "trace.npz")
        assert Trace.load(tmp_path / "trace.npz").header.digest_form == form
        assert trace[3:9].seen.form == form


def test_rows_of_both_forms_together():
    both = union([seen(0, 4), seen(3, 8, form=1), seen(2, 6), None])
    assert sorted(both.digests.tolist()) == sorted(digests_of(X[:6]).tolist())
    assert sorted(both.older.tolist()) == sorted(digests_of(X[3:8], form=1).tolist())
    assert union([seen(3, 8, form=1), seen(0, 4)]).in_form(1).tolist() == sorted(
        digests_of(X[3:8], 1).tolist()
    )
    again = SeenRows.from_json(json.loads(json.dumps(both.to_json())))
    assert again == both
    assert again.older.tolist() == both.older.tolist()
    assert not both.comparable(FORM)
    assert union([]) is None


@pytest.mark.parametrize("form", [1, FORM])
def test_a_network_marks_its_training_rows_in_either_form(form):
    network = ladder_of(2)
    network.trained_on = union([seen(0, 3, form), seen(8, 10)])
    trace = record(network, X, timed=False, progress=False)
    assert np.flatnonzero(trace.columns["learned"]).tolist() == [0, 1, 2, 8, 9]
    assert "digest/1" not in trace.columns


def test_what_a_file_may_say_of_its_form():
    body = seen(0, 3).to_json()
    assert body["form"] == FORM
    assert (
        SeenRows.from_json({key: value for key, value in body.items() if key != "form"}).form == 1
    )
    with pytest.raises(NewerSchema, match="upgrade"):
        SeenRows.from_json({**body, "form": FORM + 1})
    for wrong in ("2", 0, None, True, 2.0):
        with pytest.raises(ValueError, match="form"):
            SeenRows.from_json({**body, "form": wrong})


def test_a_plan_of_an_odd_form_is_a_bad_file():
    plan = off.calibrate(trace_of(60), budget=0.9)
    _, body = from_document(plan.to_json(), "plan", 1, "a plan")
    body["rows"]["form"] = "two"
    with pytest.raises(BadFile):
        off.Plan.from_json(to_document("plan", 1, body))
