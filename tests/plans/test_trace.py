"""Columns, selections, replay and evaluation of a trace, and trace.npz."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from offramp._support.files import from_document, read_arrays, to_document, write_arrays
from offramp.errors import BadData, BadFile, InvalidArgument, Mismatch, NewerSchema, UnknownName
from offramp.guarantees.risks import Risk, find_risk
from offramp.plans.columns import digest_of_columns
from offramp.plans.plan import Plan, choose
from offramp.plans.provenance import Origin
from offramp.plans.replay import WHY
from offramp.plans.trace import SCHEMA, Trace
from small import trace_of


def slow_replay(trace: Trace, plan: Plan) -> tuple[list[int], list[str]]:
    """Row by row, gate by gate."""
    exits = []
    why = []
    if plan.max_exit:
        last = trace.topology.exit_index(plan.max_exit)
    else:
        last = len(trace.topology.exits) - 1
    for row in range(len(trace)):
        index = last
        for gate in trace.topology.gates[:last]:
            t = np.float32([plan.thresholds.get(gate, (math.inf,))[0]])
            if choose(trace.columns[f"score/{gate}"][[row], None], t)[0] == 0:
                index = trace.topology.exit_index(gate)
                break
        exits.append(index)
        end = "end" if last == len(trace.topology.exits) - 1 else "deepest"
        why.append("gate" if index < last else end)
    return exits, why


@pytest.mark.parametrize("max_exit", [None, "small", "middle", "large"])
@pytest.mark.parametrize("seed", range(4))
def test_replay_against_row_by_row(seed, max_exit):
    trace = trace_of(80, seed=seed)
    rng = np.random.default_rng(seed)
    scores = trace.columns["score/small"]
    scores[rng.integers(0, 80, 12)] = rng.choice([np.nan, np.inf, -np.inf], 12)
    some = rng.choice(scores[np.isfinite(scores)], 2)
    for bars in ({"small": some[0], "middle": some[1]}, {"middle": 1.0}, {"small": -math.inf}, {}):
        plan = Plan.by_hand({gate: float(t) for gate, t in bars.items()}, max_exit=max_exit)
        done = trace.replay(plan)
        exits, why = slow_replay(trace, plan)
        assert done.exit.tolist() == exits
        assert [WHY[code] for code in done.why] == why
        assert done.answer.tolist() == [
            trace.answers[row, index] for row, index in enumerate(exits)
        ]


def test_the_shapes_of_its_parts(trace):
    assert (trace.scores.shape, trace.scores.dtype) == ((600, 2), np.float32)
    assert trace.answers.shape == (600, 3)
    assert trace.outputs.shape == (600, 3, 5)
    assert str(trace) == "Trace of 600 labelled rows of made-up, exits small, middle, large"
    assert "unlabelled" in str(trace_of(5, labelled=False))


def test_selections(trace):
    part = trace[100:250]
    assert len(part) == 150
    assert part.columns["row"].tolist() == list(range(100, 250))
    assert part.columns["cost/segment/small"].tolist()[0] == 1.0
    assert part.header.data == "made-up[100:250]"
    assert part.seen.fingerprint != trace.seen.fingerprint
    assert trace[:].seen.fingerprint == trace.seen.fingerprint
    assert trace[::2].header.data == "made-up[::2]"
    mask = trace.labels == 0
    assert trace[mask].header.data == f"made-up ({mask.sum()} rows)"
    assert (trace[mask].labels == 0).all()
    assert len(trace[np.array([5, 3, 5])]) == 3


def test_a_cost_per_row_is_selected_too(trace):
    costs = np.column_stack([np.arange(600.0), np.zeros(600), np.zeros(600)])
    part = Trace({**trace.columns, "cost/segment/small": costs}, trace.header)[10:13]
    assert part.columns["cost/segment/small"][:, 0].tolist() == [10, 11, 12]
    assert part.price(Plan.by_hand({"small": -math.inf})).mean == 11.0


@pytest.mark.parametrize(
    "missing", ["row", "digest", "answer/small", "answer/large", "score/middle"]
)
def test_a_trace_without_a_column_is_refused(trace, missing):
    columns = {name: column for name, column in trace.columns.items() if name != missing}
    with pytest.raises(BadData, match=missing):
        Trace(columns, trace.header)
    with pytest.raises(BadData, match="rows"):
        Trace({**trace.columns, "label": np.zeros(7)}, trace.header)


def test_a_plan_of_another_network_is_refused(trace):
    for other in (Origin("x", "torch", "float32"), Origin("0123456789abcdef", "torch", "float16")):
        with pytest.raises(Mismatch, match="calibrate again"):
            trace.replay(Plan(thresholds={}, origin=other))
    with pytest.raises(UnknownName):
        trace.replay(Plan.by_hand({"smal": 1.0}))
    with pytest.raises(InvalidArgument, match="must have 1 threshold, one per score, got 2"):
        trace.replay(Plan.by_hand({"small": (1.0, 2.0)}))


def test_evaluate_counts(trace):
    plan = Plan.by_hand({"small": 2.0, "middle": 2.0})
    done = trace.replay(plan)
    seen = trace.evaluate(plan)
    assert seen.rows == 600
    assert seen.shares == tuple((done.exit == index).mean() for index in range(3))
    assert seen.accuracy == (done.answer == trace.labels).mean()
    assert seen.plain_accuracy == (trace.answers[:, 2] == trace.labels).mean()
    assert seen.risk.risk == "accuracy_gap"
    assert seen.risk.value == pytest.approx(seen.plain_accuracy - seen.accuracy)
    assert seen.risk.low <= seen.risk.value <= seen.risk.high
    for index, right in enumerate(seen.exit_accuracy):
        rows = done.exit == index
        assert right == (trace.answers[rows, index] == trace.labels[rows]).mean()
    falls = [
        (
            (trace.answers[:, 2] == trace.labels)[mine].mean()
            - (done.answer == trace.labels)[mine].mean(),
            str(c),
        )
        for c in range(5)
        for mine in [trace.labels == c]
    ]
    assert seen.worst_class.name == max(falls)[1]
    assert seen.worst_class.plain - seen.worst_class.accuracy == pytest.approx(max(falls)[0])
    assert "600 rows" in str(seen)
    assert f"{seen.shares[0]:.1%} leave at small" in str(seen)


def test_evaluate_without_labels():
    seen = trace_of(50, labelled=False).evaluate(Plan.by_hand({"small": 2.0}))
    assert seen.risk.risk == "disagreement"
    assert (seen.accuracy, seen.plain_accuracy, seen.worst_class, seen.exit_accuracy) == (
        None,
        None,
        None,
        (),
    )


def test_nobody_leaves_at_a_closed_exit(trace):
    assert trace.evaluate(Plan.by_hand({"small": 2.0})).exit_accuracy[1] is None


def test_the_share_in_the_band_counts_only_gates_that_run():
    trace = trace_of(4)
    trace.columns["score/small"][:] = [1.0, 1.00005, 2.0, 0.5]
    trace.columns["score/middle"][:] = [1.0, 1.0, 1.0, 3.0]
    both = {"small": 1.0, "middle": 1.0}
    assert trace.evaluate(Plan.by_hand({"small": 1.0})).in_band == 0.5
    # the third left before its score stood in the band
    assert trace.evaluate(Plan.by_hand(both)).in_band == 0.5
    assert trace.evaluate(Plan.by_hand(both, max_exit="middle")).in_band == 0.5
    assert trace.evaluate(Plan.by_hand(both, max_exit="small")).in_band == 0.0
    assert (
        trace.evaluate(Plan.by_hand({"small": 0.9, "middle": 3.0}, max_exit="middle")).in_band
        == 0.0
    )


def test_references(trace):
    assert trace.reference("last") == "large"
    assert trace.reference("backbone") == "large"
    assert trace.reference("small") == "small"
    with pytest.raises(UnknownName, match="large"):
        trace.reference("larg")
    plain = {"answer/backbone": trace.labels, "logits/backbone": trace.columns["logits/large"]}
    with_plain = Trace({**trace.columns, **plain}, trace.header)
    assert with_plain.reference("backbone") == "backbone"
    assert with_plain.reference("last") == "large"
    losses = with_plain.losses(find_risk("disagreement"), "backbone")
    assert losses.tolist() == (trace.answers != trace.labels[:, None]).astype(float).tolist()
    own = Risk(
        "far",
        0,
        9,
        False,
        True,
        lambda o, y, r: np.abs(o - o[:, [r]]).max(-1).clip(0, 9),
        reads="outputs",
    )
    assert not with_plain.losses(own, "backbone")[:, 2].any()
    assert with_plain.losses(own, "backbone").shape == (600, 3)
    with pytest.raises(BadData, match="keep="):
        _ = Trace(
            {n: c for n, c in trace.columns.items() if "logits" not in n}, trace.header
        ).outputs


def test_the_promise_is_what_is_evaluated_by_default(trace):
    from offramp.calibration.calibrating import calibrate

    seen = trace.evaluate(calibrate(trace, risk="error", at_most=0.3, reference="middle"))
    assert (seen.risk.risk, seen.risk.reference) == ("error", "middle")


@pytest.mark.parametrize("labelled", [True, False])
def test_it_comes_back_as_it_was(tmp_path, labelled):
    trace = trace_of(50, labelled=labelled)
    trace = Trace(
        trace.columns, dataclasses.replace(trace.header, class_names=("a", "b", "c", "d", "ü"))
    )
    trace.columns["score/small"][:3] = [np.nan, np.inf, -np.inf]
    trace.save(tmp_path / "trace.npz")
    again = Trace.load(tmp_path / "trace.npz")
    assert again.header == trace.header
    assert again.columns.keys() == trace.columns.keys()
    for name, column in trace.columns.items():
        np.testing.assert_array_equal(again.columns[name], column)
        assert again.columns[name].dtype == column.dtype
    plan = Plan.by_hand({"small": 2.0})
    assert again.evaluate(plan) == trace.evaluate(plan)


@pytest.mark.parametrize(
    "name", ["score/small", "answer/large", "label", "digest", "cost/segment/small"]
)
def test_an_edited_column_is_noticed(tmp_path, trace, name):
    trace.save(tmp_path / "trace.npz")
    header, columns = read_arrays(tmp_path / "trace.npz")
    columns[name].reshape(-1)[0] += 1
    write_arrays(tmp_path / "trace.npz", header, columns)
    with pytest.raises(BadFile, match="edited"):
        Trace.load(tmp_path / "trace.npz")


def edited(path, change) -> None:
    """Change the header, with a checksum that fits."""
    header, columns = read_arrays(path)
    _, body = from_document(header, "trace", SCHEMA, "here")
    change(body)
    write_arrays(path, to_document("trace", SCHEMA, body), columns)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("chain"),
        lambda body: body.pop("columns"),
        lambda body: body.pop("class_names"),
        lambda body: body.update(extra=1),
        lambda body: body.update(chain=None),
        lambda body: body.update(origin=None),
        lambda body: body.update(origin={"network": 1}),
        lambda body: body.update(class_names=5),
        lambda body: body["chain"].append({**body["chain"][0], "name": "other"}),
        lambda body: body["chain"].pop(),
        lambda body: [node.update(name=node["name"] + "x") for node in body["chain"]],
    ],
)
def test_a_header_that_makes_no_sense(tmp_path, trace, change):
    trace.save(tmp_path / "trace.npz")
    edited(tmp_path / "trace.npz", change)
    with pytest.raises(BadFile):
        Trace.load(tmp_path / "trace.npz")


ODD = {
    "a text": lambda column: column.astype(str),
    "complex": lambda column: column.astype(np.complex64),
    "dates": lambda column: np.zeros(column.shape, "datetime64[s]"),
    "a number": lambda column: column.reshape(-1)[0],
    "one more axis": lambda column: column[None],
    "a table": lambda column: np.stack([column, column], -1),
    "shorter": lambda column: column[:-1],
    "empty": lambda column: column[:0],
    "records": lambda column: np.zeros(column.shape, [("a", np.int64)]),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(
    "name",
    ["score/small", "answer/large", "logits/small", "label", "row", "digest", "cost/segment/small"],
)
def test_a_column_of_another_kind_with_a_right_checksum_is_refused(tmp_path, trace, name, odd):
    columns = {**trace.columns, name: ODD[odd](trace.columns[name])}
    saved_as_it_is(trace, columns, tmp_path / "trace.npz")
    with pytest.raises(BadFile, match="no complete trace"):
        Trace.load(tmp_path / "trace.npz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("answer/small", -1),
        ("answer/small", 10**6),
        ("label", -3),
        ("cost/segment/small", np.inf),
        ("cost/segment/small", -1.0),
    ],
)
def test_a_value_that_cannot_be_is_refused(tmp_path, trace, name, value):
    column = trace.columns[name].copy()
    column.reshape(-1)[0] = value
    saved_as_it_is(trace, {**trace.columns, name: column}, tmp_path / "trace.npz")
    with pytest.raises(BadFile, match="no complete trace"):
        Trace.load(tmp_path / "trace.npz")


def saved_as_it_is(trace, columns, path) -> None:
    """A trace of these columns with a checksum that fits, whatever they are."""
    trace.save(path)
    header, _ = read_arrays(path)
    _, body = from_document(header, "trace", SCHEMA, "here")
    body["columns"] = digest_of_columns(columns)
    write_arrays(path, to_document("trace", SCHEMA, body), columns)


def test_a_newer_schema_is_named(tmp_path, trace):
    trace.save(tmp_path / "trace.npz")
    header, columns = read_arrays(tmp_path / "trace.npz")
    write_arrays(
        tmp_path / "trace.npz", header.replace("offramp/trace/1", "offramp/trace/4"), columns
    )
    with pytest.raises(NewerSchema, match="trace/4"):
        Trace.load(tmp_path / "trace.npz")


def test_a_plan_is_not_a_trace(tmp_path, trace):
    Plan.by_hand({"a": 1.0}).save(tmp_path / "plan.json")
    with pytest.raises(BadFile):
        Trace.load(tmp_path / "plan.json")
    trace.save(tmp_path / "trace.npz")
    with pytest.raises(BadFile):
        Plan.load(tmp_path / "trace.npz")


def test_rows_are_selected_by_positions_and_by_masks(trace):
    mask = trace.labels != 3
    by_mask = trace[mask]
    by_position = trace[np.flatnonzero(mask)]
    assert len(by_mask) == mask.sum() < len(trace)
    for name, column in by_mask.columns.items():
        np.testing.assert_array_equal(column, by_position.columns[name])
    assert by_mask.header == by_position.header
    assert f"({mask.sum()} rows)" in by_mask.header.data
    assert trace[[3, 8]].columns["row"].tolist() == [3, 8]
