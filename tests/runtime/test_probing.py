"""What is compared: rows run again alone, scores and recorded rows at open, and what can never be
finite.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import offramp as off
from offramp.errors import BadNetwork, Mismatch
from offramp.plans.plan import Plan
from offramp.plans.provenance import Origin
from offramp.runtime.probing import SAMPLED
from small import NAN_MARK, cut_of, dense, images_of, ladder_of, rows_of, seeded, spoiled

X = rows_of(70)


def standardized(logits):
    top = logits.max(1).values
    return (top - top.mean()) / (top.std(unbiased=False) + 1e-3)


def noisy(logits):
    return logits.max(1).values + 0.01 * torch.rand(len(logits))


def to_largest(logits):
    top = logits.max(1).values
    return top - top.amax(0)


def rank(logits):
    return logits.max(1).values.argsort().argsort().float()


def reopened(plan: Plan) -> Plan:
    """The plan as another process reads it."""
    return Plan.from_json(plan.to_json())


def planned(net, **options) -> Plan:
    trace = off.record(net, X, timed=False, progress=False, **options)
    return Plan(thresholds={"small": (0.5,)}, origin=trace.header.origin)


def without_code(plan: Plan) -> Plan:
    return Plan(thresholds=plan.thresholds, origin=replace(plan.origin, code=()))


def hard_of_batch(logits):
    top = logits.max(1).values
    return torch.where(top > top.mean(), torch.inf, -torch.inf)


def hard(logits):
    return torch.where(logits.max(1).values > 0.5, torch.inf, -torch.inf)


def test_infinite_scores_are_compared_too():
    with pytest.raises(BadNetwork, match=r"gate 'small' differs by .* when a row is run"):
        off.record(ladder_of(2, gate=hard_of_batch), X, timed=False, progress=False)
    trace = off.record(ladder_of(2, gate=hard), X, timed=False, progress=False)
    assert not np.isfinite(trace.scores[0]).any()
    assert trace.header.origin.probe.recorded is None


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("gate", [standardized, rank])
def test_a_score_that_depends_on_its_batch_is_refused(gate, batch_size):
    with pytest.raises(
        BadNetwork, match=r"gate 'small' differs by .* when a row is run .*other rows of the batch"
    ):
        off.record(ladder_of(2, gate=gate), X, timed=False, progress=False, batch_size=batch_size)


def test_a_score_of_a_cut_that_depends_on_its_batch_is_refused():
    net = cut_of("stem", gate=standardized)
    with pytest.raises(BadNetwork, match="gate 'stem' differs"):
        off.record(net, images_of(40), timed=False, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch:bf16", "torch:channels_last"])
def test_every_engine_refuses_it_and_takes_what_is_sound(engine):
    if not engine.startswith("torch"):
        pytest.importorskip(engine)
        pytest.importorskip("onnxscript")
    with pytest.raises(BadNetwork, match="gate 'small' differs"):
        off.record(ladder_of(2, gate=to_largest), X, timed=False, progress=False, engine=engine)
    net = ladder_of(3)
    origin = off.record(net, X, timed=False, progress=False, engine=engine).header.origin
    off.open(net, reopened(Plan(thresholds={"small": (1.0,)}, origin=origin)), engine=engine)


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(nn.functional.dropout(x, 0.2, True))


class OwnStatistics(nn.Module):
    """A batch norm without running statistics: those of the batch count, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(x)) if len(x) > 1 else self.last(x)


@pytest.mark.parametrize(
    ("gate", "model"), [(noisy, lambda: dense(0)), ("margin", lambda: seeded(Drops, 0))]
)
def test_what_is_drawn_at_random_is_refused(gate, model):
    net = off.ladder({"small": model().eval(), "large": dense(2)}, gate=gate).eval()
    before = torch.get_rng_state()
    with pytest.raises(BadNetwork, match="draws at random"):
        off.record(net, X, timed=False, progress=False)
    torch.set_rng_state(before)


def test_statistics_of_the_batch_are_refused():
    net = off.ladder({"small": seeded(OwnStatistics, 0).eval(), "large": dense(2)}).eval()
    with pytest.raises(BadNetwork, match=r"exit 'small' differs by .* when a row is run"):
        off.record(net, X, timed=False, progress=False)


def test_a_second_probe_draws_nothing(two):
    torch.manual_seed(3)
    off.record(two, X, timed=False, progress=False)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_a_counter_that_changes_with_an_answer_within_the_band_is_no_fault():
    """Where two logits tie within the band, rounding decides the answer, and patience counts
    answers.
    """

    class Tied(nn.Module):
        def forward(self, x):
            wobble = 1e-6 * (len(x) % 2) - 5e-7
            return torch.stack([x[:, 0], x[:, 0] + wobble, x[:, 0] - 9], 1)

    class Sure(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0], x[:, 0] - 5, x[:, 0] - 9], 1)

    models = {"small": Tied().eval(), "middle": Sure().eval(), "large": dense(2)}
    net = off.ladder(models, gate="patience").eval()
    trace = off.record(net, X, timed=False, progress=False, batch_size=7)
    assert len(trace) == 70


def double_margin(logits):
    """A function whose module and name stay, while its code is replaced."""
    return torch.topk(logits, 2).values.diff(dim=1)[:, 0].abs()


def other_margin(logits):
    return 2 * torch.topk(logits, 2).values.diff(dim=1)[:, 0].abs()


other_margin.__qualname__ = double_margin.__qualname__
other_margin.__name__ = double_margin.__name__


@pytest.mark.parametrize("kept", [False, True])
def test_another_gate_function_of_the_same_name_is_refused(kept):
    plan = reopened(planned(ladder_of(2, gate=double_margin), keep_probe_rows=kept))
    off.open(ladder_of(2, gate=double_margin), plan)
    other = ladder_of(2, gate=other_margin)
    assert other.fingerprint() == plan.origin.network
    with pytest.raises(Mismatch, match="code of gate 'small'"):
        off.open(other, plan)
    with pytest.raises(Mismatch, match="scores of gate 'small' on the seeded rows"):
        off.open(other, without_code(plan))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x)


class Turned(Plain):
    """The same keys, and other answers for rows that no seeded row is like: those whose sum is a
    whole number.
    """

    def forward(self, x):
        y = self.last(x)
        return torch.where((x.sum(1) == x.sum(1).round())[:, None], y.flip(1), y)


def pair(kind: type[nn.Module]) -> off.Network:
    return off.ladder({"small": dense(0), "large": seeded(kind, 5).eval()}).eval()


def test_a_model_that_differs_on_recorded_rows_is_refused():
    whole = rows_of(70, whole=True) + 0.0
    trace = off.record(pair(Plain), whole, timed=False, progress=False)
    plan = without_code(reopened(Plan(thresholds={"small": (0.5,)}, origin=trace.header.origin)))
    assert not plan.origin.probe.recorded.values
    off.open(pair(Turned), plan)  # seeded rows alone do not show it
    off.open(pair(Plain), plan, example=whole)
    with pytest.raises(Mismatch, match="answers of exit 'large' on recorded rows"):
        off.open(pair(Turned), plan, example=whole)
    with pytest.raises(Mismatch, match="rows that the plan was made from"):
        off.record(pair(Turned), whole, timed=False, progress=False).replay(plan)
    kept = off.record(
        pair(Plain), whole, timed=False, progress=False, keep_probe_rows=True
    ).header.origin
    with pytest.raises(Mismatch, match="answers of exit 'large' on recorded rows"):
        off.open(pair(Turned), without_code(reopened(Plan(thresholds={}, origin=kept))))


def test_a_model_class_with_other_code_is_refused():
    plan = reopened(planned(pair(Plain)))
    with pytest.raises(Mismatch, match="code of model 'large'"):
        off.open(pair(Turned), plan)


def test_recorded_rows_depend_on_no_order(two):
    one = off.record(two, X, timed=False, progress=False).header.origin.probe.recorded
    other = off.record(
        two, X.flip(0), timed=False, progress=False, batch_size=5
    ).header.origin.probe.recorded
    assert one.digests == other.digests
    assert len(one.digests) == SAMPLED
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)


def test_rows_are_stored_only_where_they_were_asked_for(two):
    trace = off.record(two, X, timed=False, progress=False)
    assert trace.header.origin.probe.recorded.values is None
    kept = off.record(
        two, X, timed=False, progress=False, keep_probe_rows=True
    ).header.origin.probe.recorded
    rows = {row.tobytes() for row in X.numpy()}
    assert {row.tobytes() for row in kept.arrays()["x"]} <= rows


def finite_everywhere(thing) -> bool:
    if isinstance(thing, (list, tuple)):
        return all(map(finite_everywhere, thing))
    return not isinstance(thing, float) or np.isfinite(thing)


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last((x[:, :4] - x[:, 4:]).log())  # finite where the first half is larger


def test_nothing_that_is_not_finite_is_stored():
    x = torch.rand(60, 8)
    x[:, :4] += x[:, 4:]
    net = off.ladder({"small": seeded(Log, 0).eval(), "large": seeded(Log, 1).eval()}).eval()
    origin = off.record(net, x, timed=False, progress=False).header.origin
    probe = json.loads(Plan(thresholds={}, origin=origin).to_json())["origin"]["probe"]
    assert all(
        map(finite_everywhere, (probe["logits"], probe["scores"], probe["recorded"]["logits"]))
    )
    assert len(probe["rows"]) == len(probe["logits"][0])
    plan = reopened(Plan(thresholds={"small": (0.5,)}, origin=origin))
    assert off.open(net, plan)(x).logits.shape == (60, 3)


def test_rows_that_an_early_exit_cannot_answer_are_no_probe():
    x = rows_of(20, whole=True)
    x[4, 0] = NAN_MARK
    origin = off.record(ladder_of(3, make=spoiled), x, timed=False, progress=False).header.origin
    assert finite_everywhere(origin.probe.recorded.scores)


def test_a_plan_whose_first_edition_probe_holds_nan_opens(two):
    """Files of the first edition: no scores, no recorded rows, and NaN where the model took no
    noise.
    """
    origin = off.record(two, X, timed=False, progress=False).header.origin
    first, *others = origin.probe.logits[0]
    spoilt = ((float("nan"), *first[1:]), *others), *origin.probe.logits[1:]
    old = replace(origin.probe, logits=spoilt, scores=None, rows=None, recorded=None)
    body = json.loads(Plan(thresholds={}, origin=replace(origin, probe=old, code=())).to_json())
    for name in ("scores", "rows", "recorded"):
        del body["origin"]["probe"][name]
    read = Origin.from_json(body["origin"])
    assert (read.probe.scores, read.probe.rows, read.probe.recorded) == (None, None, None)
    off.open(two, Plan(thresholds={}, origin=read))
