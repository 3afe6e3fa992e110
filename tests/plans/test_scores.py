"""What gates declare of their scores, how a trace carries it, and that traces without it still
load.
"""

from __future__ import annotations

import doctest
import json
import math

import numpy as np
import pytest
import torch

import offramp as off
from offramp._support.files import read_arrays, to_document, write_arrays
from offramp.building.factories import make_gate
from offramp.errors import BadNetwork, InvalidArgument
from offramp.networks.nodes import Scorer, Seen
from offramp.plans import scores as module
from offramp.plans.scores import ScoreRange, scores_in
from offramp.plans.trace import Trace
from small import ladder_of, rows_of, trace_of

SHELF = [
    "margin",
    "max_prob",
    "max_logit",
    "neg_entropy",
    "patience",
    "agreement",
    "ensemble",
    "uncertainty",
]


@pytest.mark.parametrize("name", SHELF)
@pytest.mark.parametrize("sureness", [0.0, 1.0, 30.0, 1e4])
def test_scores_stay_in_the_declared_range_and_saturate_where_it_says(name, sureness):
    draw = torch.Generator().manual_seed(0)
    logits = {key: torch.randn(200, 7, generator=draw) * sureness for key in ("a", "b", "c")}
    gate = make_gate(name, ("a", "b"))
    declared = gate.score_range()
    score = gate.score(Seen(logits["c"], logits, logits["c"])).detach()
    assert (score >= declared.low - 1e-6).all()
    assert (score <= declared.high + 1e-6).all()
    if declared.whole:
        assert (score == score.round()).all()
    if sureness == 1e4 and declared.saturates:
        at = torch.tensor(declared.saturates)
        near = (score[:, None] - at).abs().min(1).values < 1e-4
        assert near.float().mean() > 0.9


def test_what_wraps_a_gate_declares_what_it_declares():
    from offramp.gates.confidence import max_prob
    from offramp.gates.ensemble import Ensemble
    from offramp.gates.tempered import Tempered

    inner = Scorer("max_prob", max_prob)
    assert (
        Tempered(inner, 2.0).score_range()
        == inner.score_range()
        == Ensemble((), inner).score_range()
    )


def test_a_function_of_the_users_own_declares_or_is_the_real_line():
    def quiet(logits):
        return logits.amax(-1)

    declared = ScoreRange(0.0, 2.0, saturates=(2.0,))
    assert Scorer("quiet", quiet).score_range() == ScoreRange()
    assert Scorer("quiet", scores_in(declared)(quiet)).score_range() == declared
    quiet.score_range = (0, 1)
    with pytest.raises(BadNetwork, match="score_range of the gate 'quiet' must be"):
        Scorer("quiet", quiet).score_range()


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_ends_that_are_no_range_are_refused(ends):
    with pytest.raises(InvalidArgument, match="the lower first"):
        ScoreRange(*ends)
    with pytest.raises(InvalidArgument, match="finite"):
        ScoreRange(saturates=(math.inf,))


@pytest.mark.parametrize(
    "scores", [ScoreRange(), ScoreRange(0, 1, (1.0,)), ScoreRange(high=0.0), ScoreRange(whole=True)]
)
def test_a_range_as_plain_data_and_back(scores):
    assert ScoreRange.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False))) == scores


@pytest.mark.parametrize("gate", ["max_prob", "patience", "margin"])
def test_a_recording_carries_what_its_gates_declare(gate, tmp_path):
    net = ladder_of(3, gate=gate)
    trace = off.record(net, rows_of(40).numpy(), timed=False, progress=False)
    assert trace.header.scores == {
        name: net.gate_of(name).score_range() for name in net.topology.gates
    }
    trace.save(tmp_path / "trace.npz")
    assert Trace.load(tmp_path / "trace.npz").header == trace.header


def test_a_trace_of_the_first_edition_loads_and_nothing_is_known_of_its_scores(tmp_path):
    trace_of(300).save(tmp_path / "trace.npz")
    text, columns = read_arrays(tmp_path / "trace.npz")
    body = json.loads(text)
    for key in ("schema", "checksum", "scores"):
        del body[key]
    write_arrays(tmp_path / "old.npz", to_document("trace", 1, body), columns)
    old = Trace.load(tmp_path / "old.npz")
    assert old.header.scores == {}
    assert np.array_equal(old.scores, trace_of(300).scores)
    assert off.calibrate(old, at_most=0.1).open_gates()


def test_docstrings_run():
    assert doctest.testmod(module).failed == 0


def test_a_range_holds_plain_numbers_whatever_it_was_made_of():
    found = ScoreRange(np.float32(0), 1, saturates=[1.0], whole=np.True_)
    assert found == ScoreRange(0.0, 1.0, (1.0,), True)
    assert hash(found) == hash(ScoreRange(0.0, 1.0, (1.0,), True))
    assert ScoreRange.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"low": "0"}, "low must be a number, got '0'"),
        ({"high": None}, "high must be a number, got None"),
        ({"high": True}, "high must be a number, got True"),
        ({"saturates": 1.0}, r"saturates must be a tuple of numbers, got 1\.0"),
        ({"saturates": ("1",)}, r"saturates\[0\] must be a number, got '1'"),
        ({"whole": "no"}, "whole must be True or False, got 'no'"),
        (
            {"low": 0.5, "high": 0.7, "whole": True},
            r"must have a whole number in their range, got 0\.5 to 0\.7",
        ),
    ],
)
def test_what_is_no_range(options, says):
    with pytest.raises(InvalidArgument, match=says):
        ScoreRange(**options)


def test_whole_scores_may_have_one_end():
    assert ScoreRange(0.0, whole=True).high == math.inf
    assert ScoreRange(high=0.0, whole=True).low == -math.inf
