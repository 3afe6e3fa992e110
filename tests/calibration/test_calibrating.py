"""From a trace to a plan: what a promise is worth, what is refused, what a plan says about
itself.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

import offramp as off
from drawing import true_risk
from offramp.calibration.calibrating import calibrate
from offramp.calibration.path import shared_path
from offramp.calibration.search import exits_of
from offramp.errors import (
    BadData,
    InvalidArgument,
    Mismatch,
    NoSafePlan,
    OutOfBudget,
    OverlappingRows,
    UnknownName,
)
from offramp.guarantees.risks import Risk, find_risk
from offramp.plans.plan import Plan
from offramp.plans.provenance import Origin
from offramp.plans.trace import Trace
from small import ladder_of, rows_of, trace_of


def with_columns(trace: Trace, **columns) -> Trace:
    return Trace(
        {**trace.columns, **{name.replace("_", "/", 1): c for name, c in columns.items()}},
        trace.header,
    )


def drawn(trace: Trace, rows: int, seed: int) -> Trace:
    """Independent draws from a population: every draw is a row of its own, with a content of its
    own.
    """
    rng = np.random.default_rng(seed)
    sample = trace[rng.integers(0, len(trace), rows)]
    own = {"row": np.arange(rows), "digest": rng.integers(0, 2**63, rows).astype(np.uint64)}
    return Trace({**sample.columns, **own}, sample.header)


def risk_of(trace: Trace, plan: Plan, risk: str) -> float:
    return trace.evaluate(plan, risk=risk).risk.value


@pytest.mark.parametrize(
    ("risk", "at_most", "options"),
    [
        ("disagreement", 0.05, {}),
        ("disagreement", 0.05, {"bound": "hoeffding_bentkus", "testing": "pareto"}),
        ("error", 0.18, {"testing": "pareto"}),
        ("accuracy_gap", 0.02, {}),
        ("accuracy_gap", 0.02, {"testing": "pareto"}),
    ],
)
def test_a_promise_is_kept_by_as_many_draws_as_it_says(risk, at_most, options):
    population = trace_of(20_000, seed=1)
    draws = 40
    confidence = 0.8
    broken = 0
    made = 0
    saved = 0.0
    for seed in range(draws):
        sample = drawn(population, 600, seed)
        try:
            plan = calibrate(sample, risk=risk, at_most=at_most, confidence=confidence, **options)
        except NoSafePlan:
            continue
        made += 1
        broken += true_risk(population, plan, risk) > at_most
        saved += 1 - plan.price.mean / plan.price.plain
    assert broken <= stats.binom.ppf(0.9999, draws, 1 - confidence)
    assert made > 0.6 * draws
    assert saved > 0


def test_without_a_test_the_promise_would_be_broken():
    """The population of the test above is hard enough: a plan that keeps the level on its own rows
    breaks it often.
    """
    population = trace_of(20_000, seed=1)
    broken = 0
    margins = shared_path()[(shared_path() > 1e-3) & (shared_path() < 100)][::8]
    path = np.repeat(margins[:, None], 2, axis=1)
    losses = population.losses(find_risk("disagreement"))
    exits = exits_of(population.scores, path)
    losses_PN = np.take_along_axis(losses[None], exits[..., None], 2)[..., 0]
    for seed in range(40):
        rows = np.random.default_rng(seed).integers(0, 20_000, 600)
        held = np.flatnonzero(losses_PN[:, rows].mean(1) <= 0.05)[-1]
        broken += losses_PN[held].mean() > 0.05
    assert broken > stats.binom.ppf(0.9999, 40, 0.2)


@pytest.mark.parametrize("testing", ["path", "pareto"])
def test_what_a_promise_says(trace, testing):
    plan = calibrate(trace, risk="accuracy_gap", at_most=0.03, confidence=0.9, testing=testing)
    promise = plan.promise
    assert (promise.risk, promise.at_most, promise.confidence) == ("accuracy_gap", 0.03, 0.9)
    assert (promise.reference, promise.bound, promise.testing) == ("large", "betting", testing)
    assert promise.rows + promise.searched == len(trace)
    assert (promise.searched > 0) == (testing == "pareto")
    assert plan.origin == trace.header.origin
    assert plan.topology == trace.topology
    assert plan.rows.fingerprint == trace.header.data_fingerprint
    for said in (
        "accuracy_gap",
        "large",
        "accuracy_gap <= 0.03",
        "3 percentage points",
        "90 %",
        f"{promise.rows:,} rows",
        "betting",
        "made-up",
    ):
        assert said in str(plan), said


def test_the_default_is_disagreement_by_the_exact_bound(trace):
    promise = calibrate(trace, at_most=0.05).promise
    assert (promise.risk, promise.bound, promise.confidence) == ("disagreement", "binomial", 0.95)


@pytest.mark.parametrize("testing", ["path", "pareto"])
def test_thresholds_are_float32_and_stand_between_scores(trace, testing):
    plan = calibrate(trace, at_most=0.05, testing=testing)
    for gate, (t,) in plan.thresholds.items():
        assert t == float(np.float32(t))
        assert t not in trace.columns[f"score/{gate}"]
    assert plan.open_gates()
    assert (trace.replay(plan).exit < 2).any()


def test_a_path_fixed_beforehand_does_not_look_at_the_rows(trace):
    for rows in (trace, trace_of(600, seed=8), trace_of(600, seed=9)):
        plan = calibrate(rows, at_most=0.06)
        (t,) = {t for (t,) in plan.thresholds.values()}
        assert np.float32(t) in shared_path()


@pytest.mark.parametrize("level", [0.05, 0.06, 0.1])
def test_a_threshold_is_never_a_score(trace, level):
    """Not even where scores are points of the path: the one that would be chosen is made a
    score.
    """
    (t, *_), *_ = calibrate(trace, at_most=level).thresholds.values()
    score = trace.columns["score/middle"].copy()
    score[np.argmin(np.abs(score - t))] = t
    on_path = with_columns(trace, score_middle=score)
    for gate, (other,) in calibrate(on_path, at_most=level).thresholds.items():
        assert other not in on_path.columns[f"score/{gate}"]
    assert t in on_path.columns["score/middle"]


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_the_walk_ends_at_the_first_plan_that_fails(chunk, monkeypatch):
    """The surest rows are made worse, and the many others better: all may leave, but the way there
    is not safe.
    """
    trace = trace_of(400, skill=(0.5, 0.9), macs=(1.0, 8.0))
    surest = np.arange(400) < 40
    wrong = (trace.labels + 1) % 5
    sunk = with_columns(
        trace,
        score_small=np.where(surest, 9 + np.arange(400) / 400, 1 + np.arange(400) / 400).astype(
            np.float32
        ),
        answer_small=np.where(surest, wrong, trace.labels),
        answer_middle=np.where(surest, trace.labels, wrong),
    )
    asked = {"risk": "accuracy_gap", "at_most": 0.05}
    assert risk_of(sunk, Plan.by_hand({"small": 0.5}), "accuracy_gap") == pytest.approx(-0.8)
    monkeypatch.setattr("offramp.calibration.certifying.CELLS", 400 * chunk)
    try:
        found = calibrate(sunk, **asked)
    except NoSafePlan:
        found = Plan.by_hand({})
    # it let none of the many leave, behind the unsafe stretch
    assert risk_of(sunk, found, "accuracy_gap") >= 0
    assert calibrate(with_columns(sunk, answer_small=trace.labels), **asked).open_gates()


@pytest.mark.parametrize("options", [{}, {"testing": "pareto"}, {"risk": "accuracy_gap"}])
def test_same_data_same_plan(trace, options):
    plans = [calibrate(trace_of(600), at_most=0.05, **options) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].to_json() == plans[1].to_json()


def test_a_larger_level_is_never_dearer(trace):
    prices = [calibrate(trace, at_most=level).price.mean for level in (0.03, 0.05, 0.1, 0.2, 0.5)]
    assert prices == sorted(prices, reverse=True)
    assert prices[0] > prices[-1]


@pytest.mark.parametrize("testing", ["path", "pareto"])
def test_a_certified_plan_keeps_the_level_on_the_rows_that_tested_it(trace, testing):
    for risk, level in (("disagreement", 0.04), ("error", 0.2), ("accuracy_gap", 0.04)):
        plan = calibrate(trace, risk=risk, at_most=level, testing=testing)
        if testing == "path":
            assert risk_of(trace, plan, risk) <= level


def test_losses_between_whole_numbers_count():
    """A declared loss of one half is one half."""

    def half(answers, labels, reference):
        return 0.5 * (answers != answers[:, [reference]])

    risk = Risk("half", 0.0, 1.0, False, True, half, values=(0.0, 0.5))
    trace = trace_of(600)
    plan = calibrate(trace, risk=risk, at_most=0.05)
    assert trace.evaluate(plan, risk=risk).risk.value <= 0.05


def test_a_risk_of_the_users_own_reads_outputs(trace):
    def farther(outputs, labels, reference):
        return np.clip(np.abs(outputs - outputs[:, [reference]]).max(-1) / 10, 0, 1)

    risk = Risk("farther", 0.0, 1.0, False, True, farther, reads="outputs")
    plan = calibrate(trace, risk=risk, at_most=0.15)
    assert plan.promise.bound == "betting"
    assert trace.evaluate(plan, risk=risk).risk.value <= 0.15


def agreeing(rows: int) -> Trace:
    """A trace whose exits always answer alike."""
    trace = trace_of(rows)
    return with_columns(
        trace,
        answer_small=trace.columns["answer/large"],
        answer_middle=trace.columns["answer/large"],
    )


def test_299_rows_certify_one_percent_and_298_do_not():
    assert (
        calibrate(agreeing(299), at_most=0.01).price.mean
        < 0.3 * calibrate(agreeing(299), at_most=0.01).price.plain
    )
    with pytest.raises(NoSafePlan, match="299 rows") as caught:
        calibrate(agreeing(298), at_most=0.01)
    assert 0.01 < caught.value.smallest_level < 0.0101


def test_no_safe_plan_carries_what_is_in_sight(trace):
    with pytest.raises(NoSafePlan, match="in sight") as caught:
        calibrate(trace, at_most=0.0001)
    never = caught.value.never
    level = caught.value.smallest_level
    assert not never.open_gates()
    assert never.promise is None
    assert (trace.replay(never).exit == 2).all()
    assert f"{level:.4g}" in str(caught.value)
    assert calibrate(trace, at_most=level + 1e-6).open_gates()
    with pytest.raises(NoSafePlan):
        calibrate(trace, at_most=level - 1e-3)


@pytest.mark.parametrize("bound", ["binomial", "betting"])
def test_a_level_in_sight_lets_rows_leave(bound):
    """Exits that never agree have no small level, though the plan that lets nothing leave would
    have one.
    """
    trace = trace_of(600)
    other = (trace.columns["answer/large"] + 1) % 5
    wrong = with_columns(trace, answer_small=other, answer_middle=other)
    with pytest.raises(NoSafePlan) as caught:
        calibrate(wrong, at_most=0.002, bound=bound)
    leaving = calibrate(wrong, at_most=caught.value.smallest_level + 1e-6, bound=bound)
    assert (trace.replay(leaving).exit < 2).any()


def test_nothing_is_in_sight_where_no_score_lets_a_row_leave():
    trace = trace_of(400)
    nothing = np.full(400, np.nan, np.float32)
    with pytest.raises(NoSafePlan) as caught:
        calibrate(with_columns(trace, score_small=nothing, score_middle=nothing), at_most=0.01)
    assert caught.value.smallest_level is None


def test_scores_that_are_not_finite():
    trace = trace_of(600)
    score = trace.columns["score/small"].copy()
    score[:40], score[40:60], score[60:80] = np.nan, np.inf, -np.inf
    trace = with_columns(trace, score_small=score)
    for testing in ("path", "pareto"):
        plan = calibrate(trace, at_most=0.06, testing=testing)
        assert (trace.replay(plan).exit[:40] > 0).all()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, InvalidArgument, "exactly one"),
        ({"at_most": 0.1, "budget": 0.5}, InvalidArgument, "exactly one"),
        ({"at_most": math.nan}, InvalidArgument, "at least 0 and below 1, got nan$"),
        (
            {"at_most": 1.5},
            InvalidArgument,
            r"^at_most \(a level of disagreement\) must be .*, got 1\.5 \(1\.5 % is 0\.015\)$",
        ),
        ({"at_most": 1.0, "risk": "error"}, InvalidArgument, "below 1, got 1"),
        ({"at_most": -0.1}, InvalidArgument, r"at least 0 and below 1, got -0\.1$"),
        (
            {"at_most": -1.1, "risk": "accuracy_gap"},
            InvalidArgument,
            r"at least -1 and below 1, got -1\.1$",
        ),
        ({"at_most": 100}, InvalidArgument, "got 100$"),
        ({"at_most": True}, InvalidArgument, "got True$"),
        ({"at_most": np.True_}, InvalidArgument, "got .*True"),
        ({"at_most": "5%"}, InvalidArgument, r"got '5%' \(5 % is 0\.05\)$"),
        ({"at_most": "0.05"}, InvalidArgument, r"got '0\.05'"),
        ({"at_most": [0.05]}, InvalidArgument, r"got \[0\.05\]$"),
        (
            {"at_most": 0.1, "confidence": 1.0},
            InvalidArgument,
            r"^confidence must be above 0 and below 1, got 1\.0",
        ),
        ({"at_most": 0.1, "confidence": 0.0}, InvalidArgument, r"got 0\.0$"),
        ({"at_most": 0.1, "confidence": 95}, InvalidArgument, r"got 95 \(95 % is 0\.95\)$"),
        ({"at_most": 0.1, "confidence": "95%"}, InvalidArgument, r"got '95%' \(95 % is 0\.95\)$"),
        ({"at_most": 0.1, "confidence": True}, InvalidArgument, "got True$"),
        ({"at_most": 0.1, "confidence": None}, InvalidArgument, "got None$"),
        ({"at_most": 0.1, "confidence": math.nan}, InvalidArgument, "got nan$"),
        (
            {"at_most": 0.1, "repeats": "twice"},
            InvalidArgument,
            "repeats must be 'independent' or 'once', got 'twice'",
        ),
        ({"budget": 0.5, "repeats": "twice"}, InvalidArgument, "repeats must be"),
        ({"at_most": 0.1, "testing": "paths"}, InvalidArgument, "path, pareto"),
        (
            {"at_most": 0.1, "risk": "accuracy_gap", "bound": "binomial"},
            InvalidArgument,
            "losses of 0 and 1 only",
        ),
        ({"at_most": 0.1, "bound": "beting"}, UnknownName, "betting"),
        ({"at_most": 0.1, "risk": "accuracy"}, UnknownName, "accuracy_gap"),
        ({"at_most": 0.1, "reference": "largest"}, UnknownName, "large"),
        ({"at_most": 0.1, "max_exit": "larg"}, UnknownName, "large"),
        ({"at_most": 0.1, "max_exit": 5}, UnknownName, "no exit of this network called 5"),
        ({"at_most": 0.1, "reference": None}, UnknownName, "no exit of this network called None"),
        ({"budget": 0.5, "reference": ["small"]}, UnknownName, "no exit of this network called"),
        ({"at_most": 0.1, "search": 5}, InvalidArgument, "search must be a Trace, .*; got a int"),
        (
            {"at_most": 0.1, "drop_seen": "no"},
            InvalidArgument,
            "drop_seen must be True or False, got 'no'",
        ),
        (
            {"at_most": 0.1, "confidence": 1e-300},
            InvalidArgument,
            "confidence must be at least 1e-15",
        ),
        (
            {"at_most": 0.1, "unit": "ms", "batch": True},
            InvalidArgument,
            "batch must be a whole number of at least 1, got True",
        ),
        (
            {"at_most": 0.1, "batch": "64"},
            InvalidArgument,
            "batch must be a whole number of at least 1, got '64'",
        ),
        (
            {"budget": 0.5, "batch": 1.5},
            InvalidArgument,
            "batch must be a whole number of at least 1, got 1.5",
        ),
        ({"at_most": 0.1, "unit": "seconds"}, InvalidArgument, "macs"),
        ({"at_most": 0.1, "unit": "ms"}, InvalidArgument, "not measured"),
        ({"at_most": 0.1, "batch": 0}, InvalidArgument, "batch"),
        (
            {"budget": 0.01},
            OutOfBudget,
            r"budget must be at least 0\.\d+ of the plain network's macs, .* got 0\.01",
        ),
        ({"budget": math.nan}, InvalidArgument, "budget must be above 0, got nan"),
        ({"budget": -1.0}, InvalidArgument, r"budget must be above 0, got -1\.0"),
        ({"budget": "50%"}, InvalidArgument, r"got '50%' \(50 % is 0\.5\)"),
        ({"budget": True}, InvalidArgument, "got True"),
        (
            {"budget": 40},
            InvalidArgument,
            r"at most 1\.375, the cost of all exits together, got 40 \(40 % is 0\.4\)",
        ),
    ],
)
def test_what_is_refused(trace, options, error, says):
    with pytest.raises(error, match=says):
        calibrate(trace, **options)


@pytest.mark.parametrize("risk", ["accuracy_gap", "error"])
def test_labels_are_needed_for_what_compares_with_them(risk):
    with pytest.raises(InvalidArgument, match="labels"):
        calibrate(trace_of(500, labelled=False), risk=risk, at_most=0.1)
    assert calibrate(trace_of(500, labelled=False), at_most=0.1).promise.risk == "disagreement"


def test_logits_are_needed_for_a_risk_that_reads_them(trace):
    risk = Risk(
        "any", 0.0, 1.0, False, True, lambda o, y, r: np.zeros(o.shape[:2]), reads="outputs"
    )
    bare = Trace(
        {name: c for name, c in trace.columns.items() if not name.startswith("logits/")},
        trace.header,
    )
    with pytest.raises(BadData, match="keep='logits'"):
        calibrate(bare, risk=risk, at_most=0.1)


def test_an_exit_that_was_never_trained_is_refused(trace):
    with pytest.raises(InvalidArgument, match="trained"):
        calibrate(
            Trace(trace.columns, dataclasses.replace(trace.header, trained=False)), at_most=0.1
        )


def test_search_rows_of_their_own(trace):
    search = trace[:250]
    rest = trace[250:]
    plan = calibrate(rest, at_most=0.06, search=search)
    assert (plan.promise.rows, plan.promise.searched) == (350, 250)
    with pytest.raises(OverlappingRows, match=r"50 of the 350"):
        calibrate(rest, at_most=0.06, search=trace[:300])
    for part in (search, rest):
        with pytest.raises(OverlappingRows):
            plan.rows.refuse_overlap(part.columns["digest"], "test")


def test_search_rows_of_another_network_are_refused(trace):
    other = dataclasses.replace(trace.header, origin=Origin("another", "torch", "float32"))
    with pytest.raises(Mismatch, match="another"):
        calibrate(trace[250:], at_most=0.06, search=Trace(trace[:250].columns, other))


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.9])
def test_a_budget_is_kept_and_promises_nothing(trace, budget):
    plan = calibrate(trace, budget=budget)
    assert plan.promise is None
    assert "no promise" in str(plan)
    assert "budget" in str(plan)
    assert plan.price.mean <= budget * plan.price.plain * (1 + 1e-9)
    margins = shared_path()[(shared_path() > 1e-3) & (shared_path() < 100)][::16]
    shared = [Plan(thresholds={"small": (float(t),), "middle": (float(t),)}) for t in margins]
    within = [one for one in shared if trace.price(one).mean <= budget * plan.price.plain]
    assert (
        risk_of(trace, plan, "error") <= min(risk_of(trace, one, "error") for one in within) + 1e-9
    )


def test_a_budget_without_labels_loses_little_agreement():
    trace = trace_of(600, labelled=False)
    assert risk_of(trace, calibrate(trace, budget=0.6), "disagreement") < 0.2


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: dataclasses.replace(plan, thresholds={"small": (0.1,), "middle": (0.1,)}),
        lambda plan: dataclasses.replace(plan, max_exit="middle"),
        lambda plan: dataclasses.replace(plan, origin=Origin("another", "torch", "float32")),
        lambda plan: dataclasses.replace(plan, origin=None),
        lambda plan: plan.changed(thresholds={"small": (0.1,)}),
        lambda plan: plan.changed(max_exit="small"),
    ],
)
def test_a_changed_plan_has_no_promise_and_says_so(trace, change):
    plan = calibrate(trace, at_most=0.05)
    other = change(plan)
    assert plan.promise is not None
    assert other.promise is None
    assert other.price is None
    assert "no promise: changed" in str(other)
    assert "budget" not in str(other)
    assert Plan.from_json(other.to_json()) == other


def test_a_copy_keeps_its_promise(trace):
    plan = calibrate(trace, at_most=0.05)
    assert dataclasses.replace(plan).promise == plan.promise
    assert Plan.from_json(plan.to_json()).promise == plan.promise


def test_deepest_caps_the_worst_case(trace):
    plan = calibrate(trace, at_most=0.25, max_exit="middle")
    assert plan.max_exit == "middle"
    assert plan.thresholds["middle"] == (math.inf,)
    assert trace.replay(plan).exit.max() == 1
    assert plan.price.worst == 3.0
    assert plan.promise is not None
    assert risk_of(trace, plan, "disagreement") <= 0.25
    assert trace.evaluate(plan).risk.reference == "large"


def test_deepest_alone_may_be_what_is_promised(trace):
    """Where no gate is left, or none may open, answering everything at `max_exit` is a plan if it
    is safe.
    """
    plan = calibrate(trace, at_most=0.5, max_exit="small")
    assert plan.promise is not None
    assert trace.replay(plan).exit.max() == 0
    with pytest.raises(NoSafePlan):
        calibrate(trace, at_most=0.01, max_exit="small")


def test_deepest_at_the_end_changes_nothing(trace):
    assert (
        calibrate(trace, at_most=0.05, max_exit="large").thresholds
        == calibrate(trace, at_most=0.05).thresholds
    )


def test_against_another_exit(trace):
    plan = calibrate(trace, at_most=0.3, reference="middle")
    assert plan.promise.reference == "middle"
    assert plan.price.plain == 2.0
    # never leaving comes first, and is not safe against the middle exit
    with pytest.raises(NoSafePlan) as caught:
        calibrate(trace, at_most=0.2, reference="middle")
    assert 0.2 < caught.value.smallest_level < 0.3
    assert calibrate(trace, at_most=caught.value.smallest_level + 1e-6, reference="middle").promise


def test_a_mean_is_promised_against_the_plain_backbone():
    net = ladder_of(3, answer="mean", seed=3)
    trace = off.record(net, rows_of(500).numpy(), timed=False)
    plain = net.backbone["large"](rows_of(500)).argmax(1).numpy()
    assert (trace.columns["answer/backbone"] == plain).all()
    assert (trace.columns["answer/large"] != plain).any()
    never = Plan.never_leave(trace.topology)
    differing = trace.evaluate(never, reference="backbone").risk.value
    assert differing == pytest.approx((trace.columns["answer/large"] != plain).mean())
    with pytest.raises(NoSafePlan):
        calibrate(trace, at_most=differing / 2, reference="backbone")
    plan = calibrate(trace, at_most=0.9, reference="backbone")
    assert plan.promise.reference == "backbone"
    assert plan.price.plain == trace.columns["cost/segment/large"][0]


def test_rows_are_charged_only_for_what_runs(trace):
    """A plan that closes the middle member is priced without it."""
    plan = calibrate(trace, budget=0.999, risk="disagreement")
    spent = sum(
        {"small": 1.0, "middle": 2.0, "large": 8.0}[stage.name]
        * (trace.replay(plan).exit >= trace.topology.exit_index(stage.name)).mean()
        for stage in plan.schedule(trace.topology)
    )
    assert plan.price.mean == pytest.approx(spent)


def test_no_rows(trace):
    with pytest.raises(InvalidArgument):
        calibrate(trace[:0], at_most=0.1)


@pytest.mark.parametrize("testing", ["path", "pareto"])
@pytest.mark.parametrize("bound", ["betting", "hoeffding_bentkus", "binomial"])
@pytest.mark.parametrize("risk", ["disagreement", "accuracy_gap"])
def test_losing_nothing_on_few_rows_proves_little(risk, bound, testing):
    """Only the plan that never leaves is safe without a test, not one that loses as little."""
    if (risk, bound) == ("accuracy_gap", "binomial"):
        pytest.skip("its losses are not 0 or 1")
    trace = trace_of(600, skill=(0.9, 0.95), macs=(1.0, 8.0))
    with pytest.raises(NoSafePlan, match="rows"):
        calibrate(trace, risk=risk, at_most=0.0001, bound=bound, testing=testing)
