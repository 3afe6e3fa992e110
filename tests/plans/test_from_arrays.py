"""Traces of models that ran elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offramp as off
from offramp.data.rows import digests_of
from offramp.errors import BadData, InvalidArgument, Mismatch, OverlappingRows, UnknownName
from offramp.plans.trace import Trace
from small import ladder_of

N = 900
GENERATOR = np.random.default_rng(0)
LABELS = GENERATOR.integers(0, 4, N)
COSTS = {"small": 0.1, "large": 1.0}


def logits_of(sharpness, seed=1):
    """Logits [N, 4] that are right more often the sharper they are."""
    noise = np.random.default_rng(seed).normal(size=(N, 4))
    return (noise + sharpness * np.eye(4)[LABELS]).astype(np.float32)


LOGITS = {"small": logits_of(4.0), "large": logits_of(6.0, 2)}


def made(**options):
    return Trace.from_arrays(LOGITS, COSTS, **{"labels": LABELS, **options})


def test_it_is_certified_evaluated_and_saved(tmp_path):
    trace = made()
    plan = off.calibrate(trace, risk="accuracy_gap", at_most=0.03)
    assert plan.price.unit == "ms"
    assert plan.price.mean < plan.price.plain == 1.0
    assert "nan" not in str(plan)
    done = trace.evaluate(plan)
    assert done.shares[0] > 0.5
    assert done.accuracy == pytest.approx((trace.replay(plan).answer == LABELS).mean())
    trace.save(tmp_path / "trace.npz")
    assert Trace.load(tmp_path / "trace.npz").evaluate(plan) == done
    assert off.calibrate(trace, budget=0.5).price.mean <= 0.5


def test_a_page_is_made_of_it(tmp_path):
    pytest.importorskip("plotly")
    trace = made()
    plan = off.calibrate(trace[:600], risk="accuracy_gap", at_most=0.05)
    off.report(trace[600:], plan, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "milliseconds" in text
    assert "nan%" not in text


def test_it_says_what_record_says():
    net = ladder_of(2)
    x = GENERATOR.normal(size=(60, 4)).astype(np.float32)
    wanted = off.record(net, x, timed=False, progress=False)
    logits = {name: wanted.columns[f"logits/{name}"] for name in wanted.topology.exits}
    got = Trace.from_arrays(logits, dict.fromkeys(logits, 1), unit="macs", inputs=x)
    first, last = wanted.topology.exits
    for name in (f"answer/{first}", f"answer/{last}", f"score/{first}", "row", "digest"):
        np.testing.assert_array_equal(got.columns[name], wanted.columns[name])
    assert got.topology == wanted.topology


def test_costs_in_macs_and_by_call():
    plan = off.Plan.by_hand({"small": -1.0})
    macs = made(unit="macs")
    assert [price.unit for price in macs.evaluate(plan).prices] == ["macs"]
    assert macs.price(plan).mean == pytest.approx(0.1)
    calls = Trace.from_arrays(LOGITS, {"small": (2.0, 0.1), "large": 1.0})
    assert calls.price(plan, "ms", 1).mean == pytest.approx(2.1)
    assert calls.price(plan, "ms", 64).mean == pytest.approx(2.0 / 64 + 0.1)


def test_exits_that_continue_each_other_add_up():
    never = off.Plan.by_hand({"small": np.inf})
    assert made(shared=True).price(never).plain == pytest.approx(1.1)
    assert made().price(never).plain == pytest.approx(1.0)


def test_other_gates_and_scores_of_ones_own():
    assert (made(gate="max_prob").scores <= 1).all()
    mine = np.linspace(0, 1, N)
    np.testing.assert_allclose(made(scores={"small": mine}).scores[:, 0], mine, rtol=1e-6)
    with pytest.raises(InvalidArgument, match="give scores="):
        made(gate="patience")
    with pytest.raises(UnknownName):
        made(gate="nothing")


def test_probabilities():
    chances = {
        name: np.exp(each) / np.exp(each).sum(1, keepdims=True) for name, each in LOGITS.items()
    }
    chances["small"][0] = [1, 0, 0, 0]
    trace = Trace.from_arrays(chances, COSTS, probabilities=True)
    assert np.isfinite(trace.outputs).all()
    np.testing.assert_allclose(
        np.exp(trace.outputs[1:, 0]), np.maximum(chances["small"][1:], 1e-7), rtol=1e-3
    )
    with pytest.raises(BadData, match="sum to 1"):
        made(probabilities=True)


def test_rows_are_known_by_logits_unless_something_better_is_given():
    twice = {name: np.concatenate([each, each[:1]]) for name, each in LOGITS.items()}
    digests = Trace.from_arrays(twice, COSTS).columns["digest"]
    assert len(set(digests.tolist())) == N
    assert digests[0] == digests[-1]
    x = GENERATOR.normal(size=(N, 3))
    np.testing.assert_array_equal(made(inputs=x).columns["digest"], digests_of(x))
    np.testing.assert_array_equal(made(inputs={"a": x}).columns["digest"], digests_of({"a": x}))
    own = np.arange(N, dtype=np.uint64)
    np.testing.assert_array_equal(made(digests=own).columns["digest"], own)


def test_rows_that_were_searched_are_noticed():
    trace = made()
    with pytest.raises(OverlappingRows):
        off.calibrate(trace, at_most=0.1, search=trace[:100])


def test_plans_of_other_models_are_refused():
    plan = off.calibrate(made(network="mine 1"), at_most=0.1)
    made(network="mine 1").replay(plan)
    with pytest.raises(Mismatch):
        made(network="mine 2").replay(plan)
    with pytest.raises(Mismatch):
        off.open(ladder_of(2), plan)


def test_a_row_whose_early_logits_are_not_finite_goes_on():
    spoiled = {**LOGITS, "small": LOGITS["small"].copy()}
    spoiled["small"][3, 1] = np.nan
    trace = Trace.from_arrays(spoiled, COSTS)
    assert np.isnan(trace.scores[3, 0])
    assert trace.replay(off.Plan.by_hand({"small": -1e9})).exit[3] == 1


@pytest.mark.parametrize(
    ("logits", "costs", "options", "problem", "sentence"),
    [
        ({}, COSTS, {}, BadData, "one and the same shape"),
        ({"small": LOGITS["small"]}, {"small": 1}, {}, BadData, "at least two exits"),
        ({**LOGITS, "large": LOGITS["large"][:5]}, COSTS, {}, BadData, "one and the same shape"),
        ({**LOGITS, "large": LOGITS["large"][:, 0]}, COSTS, {}, BadData, r"numbers \[N, C\]"),
        (
            {**LOGITS, "large": LOGITS["large"] * np.nan},
            COSTS,
            {},
            BadData,
            "must be finite, got 900 rows",
        ),
        (LOGITS, {"small": 1}, {}, InvalidArgument, "one for each of"),
        (LOGITS, {"small": 1, "large": 0}, {}, InvalidArgument, "above 0 and finite"),
        (LOGITS, {"small": 1, "large": np.nan}, {}, InvalidArgument, "above 0 and finite"),
        (LOGITS, {"small": (1, 2, 3), "large": 1}, {}, InvalidArgument, "must be a number"),
        (
            LOGITS,
            {"small": (1, 2), "large": 1},
            {"unit": "macs"},
            InvalidArgument,
            "must be a number",
        ),
        (LOGITS, COSTS, {"unit": "joules"}, InvalidArgument, "unit must be"),
        (LOGITS, COSTS, {"labels": LABELS + 1}, BadData, "labels must be between 0 and 3"),
        (LOGITS, COSTS, {"labels": LABELS[:4]}, BadData, r"labels must be whole numbers \[900\]"),
        (LOGITS, COSTS, {"labels": LABELS + 0.5}, BadData, "labels must be whole numbers"),
        (LOGITS, COSTS, {"inputs": np.zeros((3, 2))}, BadData, "inputs must have 900 rows"),
        (LOGITS, COSTS, {"scores": {}}, InvalidArgument, "scores must hold one for each"),
        (LOGITS, COSTS, {"digests": LABELS[:1]}, BadData, "digests must be"),
    ],
)
def test_what_is_refused(logits, costs, options, problem, sentence):
    with pytest.raises(problem, match=sentence):
        Trace.from_arrays(logits, costs, **options)


INPUTS = np.random.default_rng(3).normal(size=(N // 2, 5)).repeat(2, axis=0)


@pytest.mark.parametrize("name", ["label", "labels", "Label"])
def test_the_label_among_the_inputs_is_the_label(name):
    trace = made(labels=None, inputs={"x": INPUTS, name: LABELS})
    assert (trace.labels == LABELS).all()
    assert (trace.columns["digest"] == digests_of({"x": INPUTS})).all()
    with pytest.raises(OverlappingRows, match="same content"):
        off.calibrate(trace, at_most=0.5)
    assert (made(inputs={"x": INPUTS, name: LABELS}).labels == LABELS).all()
    with pytest.raises(
        BadData, match=f"inputs\\['{name}'\\] is taken as the label of a row, and differs"
    ):
        made(inputs={"x": INPUTS, name: LABELS[::-1]})
    with pytest.raises(BadData, match="at least one array"):
        made(labels=None, inputs={name: LABELS})


def test_tensors_of_any_kind_are_read():
    wanted = made(inputs=INPUTS).columns["digest"]
    tensor = torch.tensor(INPUTS, requires_grad=True)
    assert (made(inputs=tensor).columns["digest"] == wanted).all()
    half = torch.tensor(INPUTS).bfloat16()
    assert (made(inputs=half).columns["digest"] == digests_of(half.float().numpy())).all()
    logits = {name: torch.tensor(value, requires_grad=True) for name, value in LOGITS.items()}
    trace = Trace.from_arrays(logits, COSTS, labels=torch.from_numpy(LABELS))
    assert (trace.columns["logits/large"] == LOGITS["large"]).all()


@pytest.mark.parametrize(
    "inputs",
    [
        ["a text"] * N,
        np.array([{}] * N),
        [torch.ones(2, requires_grad=True)] * N,
        [[1, 2]] * (N - 1) + [[1]],
    ],
)
def test_inputs_that_are_no_numbers_are_refused(inputs):
    with pytest.raises(BadData, match="inputs must be"):
        made(inputs=inputs)


def test_both_parts_of_complex_inputs_count():
    assert len(set(made(inputs=1j * np.arange(N)).columns["digest"].tolist())) == N


def test_the_band_knows_the_largest_logit_that_a_gate_looks_at():
    assert made().header.origin.band == 1e-4
    large = {"small": 1000 * LOGITS["small"], "large": LOGITS["large"]}
    origin = Trace.from_arrays(large, COSTS).header.origin
    assert origin.band == pytest.approx(1e-4 * np.abs(large["small"]).max() / 30)
    assert (
        Trace.from_arrays(
            {"small": LOGITS["small"], "large": large["small"]}, COSTS
        ).header.origin.band
        == 1e-4
    )
