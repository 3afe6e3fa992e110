"""choose, plans by hand, what a plan says, plan.json."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp._support.files import from_document, to_document
from offramp.errors import BadFile, InvalidArgument, NewerSchema, OverlappingRows, UnknownName
from offramp.plans.plan import Plan, Price, Promise, choose
from offramp.plans.provenance import BAND, ROUNDED, Origin, Probe, SeenRows
from offramp.plans.signature import Input
from offramp.plans.topology import Node, Topology
from small import trace_of

CHAIN = Topology.chain([Node("a"), Node("b"), Node("c")])
FLOATS = st.floats(width=32)
SCORES = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, np.inf, -np.inf, np.nan]), FLOATS)
BARS = st.one_of(
    st.sampled_from([-1.0, 0.0, 0.5, np.inf, -np.inf]), st.floats(width=32, allow_nan=False)
)


@given(
    st.integers(1, 3).flatmap(
        lambda k: st.tuples(st.lists(st.tuples(*[SCORES] * k)), st.tuples(*[BARS] * k))
    )
)
def test_choose_in_numpy_in_torch_and_by_hand(case):
    rows, bars = case
    scores = np.array(rows, np.float32).reshape(len(rows), len(bars))
    thresholds = np.array(bars, np.float32)
    want = []
    for row in scores:
        want.append(
            next(
                (
                    k
                    for k, (s, t) in enumerate(zip(row, thresholds, strict=True))
                    if s >= t and t < math.inf
                ),
                len(bars),
            )
        )
    assert choose(scores, thresholds).tolist() == want
    got = choose(torch.from_numpy(scores), torch.from_numpy(thresholds))
    assert got.dtype == torch.int64
    assert got.tolist() == want


@pytest.mark.parametrize(
    ("score", "threshold", "leaves"),
    [
        (1.0, 1.0, True),
        (np.nextafter(np.float32(1), np.float32(0)), 1.0, False),
        (np.inf, 1.0, True),
        (np.inf, np.inf, False),
        (1.0, -np.inf, True),
        (-np.inf, -np.inf, True),
        (np.nan, -np.inf, False),
    ],
)
def test_choose_at_the_edges(score, threshold, leaves):
    assert (choose(np.float32([[score]]), np.float32([threshold]))[0] == 0) == leaves


def test_thresholds_are_kept_in_float32():
    plan = Plan.by_hand(
        {"a": 0.1, "b": np.float32(0.2), "c": np.float64(3), "d": 4, "e": (0.1, 0.2)}
    )
    for values in plan.thresholds.values():
        assert all(type(t) is float and t == float(np.float32(t)) for t in values)
    assert plan.thresholds["a"] == (float(np.float32(0.1)),)
    assert plan.thresholds["e"] == (float(np.float32(0.1)), float(np.float32(0.2)))


@pytest.mark.parametrize(
    "wrong", [math.nan, "1", None, (), 1e39, -1e39, 10**400, (1.0, math.nan), [1.0]]
)
def test_thresholds_that_are_none(wrong):
    with pytest.raises(InvalidArgument, match="'a'"):
        Plan.by_hand({"a": wrong})


def test_a_plan_by_hand_says_so():
    plan = Plan.by_hand({"a": 2.5, "b": math.inf}, max_exit="b")
    assert str(plan) == (
        "Leave at a when its score is at least 2.5; whatever arrives at b is answered there; no "
        "promise: set by hand."
    )
    assert plan.open_gates() == {"a"}
    assert "Nothing leaves early" in str(Plan.never_leave(CHAIN))


def test_names_are_checked_against_the_chain():
    with pytest.raises(UnknownName, match="called 'c'"):
        Plan(thresholds={"c": (1.0,)}, topology=CHAIN)
    with pytest.raises(UnknownName):
        Plan(thresholds={}, max_exit="d", topology=CHAIN)
    with pytest.raises(UnknownName):
        Plan.by_hand({"d": 1.0}).schedule(CHAIN)
    with pytest.raises(UnknownName):
        Plan.by_hand({}, max_exit="d").schedule(CHAIN)


def test_a_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan.by_hand({}).max_exit = "a"


def promised(**fields) -> Plan:
    thresholds = {"a": (1.5,), "b": (math.inf,)}
    origin = Origin(
        "cafe",
        "torch",
        "float32",
        Probe((Input("x", (2,), "float32"),), 0, (((0.5, 1.0),), ((1.0, 2.0),), ((0.0, 3.0),))),
    )
    promise = Promise(
        "error", 0.05, 0.95, "c", "binomial", "path", 400, 0, Plan.covers(thresholds, None, origin)
    )
    values = {
        "thresholds": thresholds,
        "topology": CHAIN,
        "promise": promise,
        "origin": origin,
        "price": Price("macs", 1, 2.0, 3.0, 4.0),
        "rows": SeenRows("digits[0:3]", "abcd", np.array([3, 1, 2**63 + 5], np.uint64)),
    }
    return Plan(**{**values, **fields})


@pytest.mark.parametrize(
    "plan",
    [
        promised(),
        promised(promise=None),
        promised(rows=None, price=None, origin=None, promise=None, topology=None),
        Plan.by_hand({"a": -math.inf, "b": (1.0, 2.0)}, max_exit="b"),
        Plan(thresholds={}),
    ],
)
def test_a_plan_comes_back_as_it_was(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert str(again) == str(plan)
    assert again.promise == plan.promise
    assert "Infinity" not in (tmp_path / "plan.json").read_text()


def test_plans_differ():
    assert promised() == promised()
    assert promised() != promised(max_exit="b")
    assert promised(rows=SeenRows("x", "abcd", np.array([1], np.uint64))) != promised()


def test_a_promise_covers_its_network_too():
    assert promised().promise is not None
    assert promised(origin=Origin("beef", "torch", "float32")).promise is None
    assert promised(origin=Origin("cafe", "onnx", "float32")).promise is None
    assert promised(thresholds={"a": (1.25,)}).promise is None


def test_prices_are_said_as_shares():
    assert (
        str(Price("macs", 1, 1.0, 3.0, 2.0))
        == "mean cost 0.500 and worst 1.500 of the plain network in MACs"
    )
    assert "milliseconds at batch 8" in str(Price("ms", 8, 1.0, 3.0, 2.0))
    assert "nan" not in str(Price("macs", 1, 0.0, 0.0, 0.0))
    assert str(Price("ms", 1, 1.0, 1.0, 2.0, "noisy")).endswith(
        "in milliseconds at batch 1 (noisy)"
    )


def test_overlap_names_the_rows():
    rows = SeenRows("digits", "abcd", np.arange(10, dtype=np.uint64))
    rows.refuse_overlap(np.arange(10, 20, dtype=np.uint64), "test")
    with pytest.raises(
        OverlappingRows, match=r"2 of the 4 test rows \(rows 1 and 2, counted from 0\).* digits"
    ):
        rows.refuse_overlap(np.array([77, 3, 9, 78], np.uint64), "test")


def edited(plan: Plan, change) -> str:
    """The text of a plan with a changed body and the right checksum for it."""
    _, body = from_document(plan.to_json(), "plan", 1, "here")
    change(body)
    return to_document("plan", 1, body)


def test_an_edited_file_is_noticed():
    text = promised().to_json()
    assert Plan.from_json(text) == promised()
    with pytest.raises(BadFile, match="edited"):
        Plan.from_json(text.replace("1.5", "0.5", 2))
    with pytest.raises(BadFile):
        Plan.from_json(text.replace('"checksum"', '"sum"'))


def test_a_newer_schema_is_named():
    with pytest.raises(NewerSchema, match=r"got offramp/plan/2\. Upgrade"):
        Plan.from_json(promised().to_json().replace("offramp/plan/1", "offramp/plan/2"))
    for kind in (
        "offramp/trace/1",
        "other/plan/1",
        "offramp/plan",
        "offramp/plan/x",
        "offramp/plan/0",
    ):
        with pytest.raises(BadFile):
            Plan.from_json(promised().to_json().replace("offramp/plan/1", kind))


def put(*path):
    *way, last, value = path

    def change(body):
        for key in way:
            body = body[key]
        body[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        put("thresholds", None),
        put("thresholds", {"a": []}),
        put("thresholds", {"a": ["nan"]}),
        put("thresholds", {"a": [10**400]}),
        put("thresholds", {"a": [1e39]}),
        put("thresholds", {"z": [1.0]}),
        put("deepest", "z"),
        put("deepest", []),
        put("promise", {"risk": "error"}),
        put("promise", "at_most", "a lot"),
        put("promise", "covers", None),
        put("price", "plain", None),
        put("price", "batch", 1.5),
        put("origin", []),
        put("origin", "probe", "inputs", 0, "dtype", "objects"),
        put("origin", "probe", "seed", "zero"),
        put("origin", "probe", "inputs", 0, "shape", [1e400]),
        put("origin", "probe", "logits", 7),
        put("chain", [{"name": "a"}]),
        put("chain", []),
        put("chain", 0, "successor", "c"),
        put("rows", "digests", "not base64"),
        put("rows", "digests", "AAAA"),
        put("rows", "digests", 5),
        lambda body: body.pop("thresholds"),
        lambda body: body.pop("origin"),
    ],
)
def test_a_plan_that_makes_no_sense_is_a_bad_file(change):
    with pytest.raises(BadFile):
        Plan.from_json(edited(promised(), change))


def test_an_edited_plan_keeps_no_promise():
    """Even with a checksum made to fit, other thresholds are not what the promise covers."""
    assert Plan.from_json(edited(promised(), lambda body: None)).promise is not None
    assert Plan.from_json(edited(promised(), put("thresholds", {"a": [0.5]}))).promise is None


def test_the_file_is_for_people_too():
    body = json.loads(promised().to_json())
    assert body["schema"] == "offramp/plan/1"
    assert body["sentence"] == str(promised())
    assert body["thresholds"] == {"a": [1.5], "b": ["inf"]}


def test_a_probe_is_the_same_everywhere():
    rows = Input("x", (2,), "float32").rows(3, 0)
    assert rows.shape == (3, 2)
    assert rows.dtype == np.float32
    assert rows[0].tolist() == [-1.9437320232391357, -0.9689311981201172]
    pixels = Input("x", (2, 3), "uint8").rows(2, 7)
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[[39, 39, 14], [6, 173, 104]], [[122, 140, 134], [178, 131, 245]]]
    many = Input("x", (500,), "int8").rows(4, 0)
    assert (many.min(), many.max()) == (0, 126)


def test_probe_and_trace_agree_about_rows():
    trace = trace_of(10)
    assert trace.seen.fingerprint == trace.header.data_fingerprint
    assert trace.seen == SeenRows.from_json(json.loads(json.dumps(trace.seen.to_json())))


@pytest.mark.parametrize(
    ("engine", "precision", "band"),
    [
        ("torch", "float32", BAND),
        ("torch", "bfloat16", ROUNDED),
        ("torch", "float16+float32", ROUNDED),
        ("torch:bf16", "float32", ROUNDED),
        ("onnxruntime 1.0:int8=x", "float32", ROUNDED),
    ],
)
def test_the_band_is_wider_where_numbers_are_shorter(engine, precision, band):
    assert Origin("0" * 16, engine, precision).band == band


@pytest.mark.parametrize(("largest", "band"), [(0.0, 1), (28.0, 1), (300.0, 10), (3e4, 1000)])
def test_the_band_grows_with_logits_beyond_ordinary_ones(largest, band):
    origin = Origin("0" * 16, "torch", "float32", largest_logit=largest)
    assert origin.band == pytest.approx(BAND * band)
    assert origin.rounding == BAND
    assert Origin.from_json(json.loads(json.dumps(dataclasses.asdict(origin)))) == origin


def test_an_error_is_against_nothing():
    promise = Promise("error", 0.1, 0.95, "backbone", "binomial", "path", 100, 0, "covers")
    assert str(promise).startswith(
        "With 95 % confidence, at most 10 % of the answers are wrong (error <= 0.1; tested"
    )
    other = str(dataclasses.replace(promise, risk="disagreement"))
    assert "differ from those that the plain network would give (disagreement <= 0.1;" in other


def test_overlap_names_rows_by_their_numbers_where_they_are_known():
    seen = SeenRows("digits", "0" * 16, np.arange(10, dtype=np.uint64))
    with pytest.raises(OverlappingRows, match=r"\(row 801\)"):
        seen.refuse_overlap(np.array([77, 3], np.uint64), "test", np.array([800, 801]))
