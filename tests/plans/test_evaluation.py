"""Figures that print themselves."""

from __future__ import annotations

import json

import numpy as np

from offramp.plans.evaluation import better_exit, worst_class
from offramp.plans.plan import Plan
from small import trace_of


def test_the_worst_class_is_the_one_that_falls_most():
    labels = np.array([0, 0, 1, 1, 2, 2])
    plain = np.array([1, 1, 1, 1, 0, 0], bool)
    right = np.array([1, 1, 1, 0, 0, 0], bool)
    found = worst_class(right, plain, labels, ("cat", "dog", "ship"))
    assert (found.name, found.accuracy, found.plain) == ("dog", 0.5, 1.0)
    assert worst_class(right, plain, labels, None).name == "1"
    assert worst_class(right, plain, labels, ("cat",)).name == "1"
    none = np.zeros(0, bool)
    assert worst_class(none, none, np.zeros(0, int), None) is None


def test_it_prints_and_writes_itself():
    seen = trace_of(200).evaluate(Plan.by_hand({"small": 2.0, "middle": 2.0}))
    text = str(seen)
    for said in (
        "200 rows",
        "leave at middle",
        "accuracy",
        "loses most",
        "95 % interval",
        "MACs",
        "float band",
    ):
        assert said in text
    body = json.loads(json.dumps(seen.to_json()))
    assert body["rows"] == 200
    assert body["risk"]["value"] == seen.risk.value
    assert sum(body["shares"]) == 1


def test_an_exit_that_is_better_than_the_last_one_is_named():
    rng = np.random.default_rng(0)
    right = rng.random((600, 3)) < [0.5, 0.95, 0.9]
    said = better_exit(right, ("a", "b", "c"))
    assert said is not None
    assert said.startswith("b is right more often than the last exit, c: ")
    assert better_exit(right[:, ::-1], ("c", "b", "a")) is not None
    assert better_exit(right[:, [0, 2]], ("a", "c")) is None
    assert better_exit(right[:, 2:], ("c",)) is None


def test_chance_names_no_exit():
    rng = np.random.default_rng(1)
    named = sum(
        better_exit(rng.random((300, 2)) < 0.8, ("a", "b")) is not None for _ in range(1000)
    )
    assert named <= 8
