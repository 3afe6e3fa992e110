"""Figures that print themselves."""

from __future__ import annotations

import json

import numpy as np

from offramp.evaluation import worst_class
from offramp.plan import Plan
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
    for said in ("200 rows", "leave at middle", "accuracy", "loses most", "95 % interval", "MACs", "float band"):
        assert said in text
    body = json.loads(json.dumps(seen.to_json()))
    assert body["rows"] == 200
    assert body["risk"]["value"] == seen.risk.value
    assert sum(body["shares"]) == 1
