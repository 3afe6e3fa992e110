"""Figures in words: a gap below zero is a gain."""

from __future__ import annotations

from offramp.plans.evaluation import Measured
from offramp.reporting.words import risk_figure, risk_title


def test_a_gap_is_lost_or_gained_and_never_lost_below_zero():
    lost = Measured("accuracy_gap", "last", 0.0123, 0.004, 0.02, 0.95)
    assert risk_title(lost) == "Accuracy lost"
    assert risk_figure(lost)[0] == "1.23"
    gained = Measured("accuracy_gap", "last", -0.0295, -0.04, 0.001, 0.95)
    assert risk_title(gained) == "Accuracy gained"
    value, unit, interval = risk_figure(gained)
    assert (value, unit) == ("2.95", " points")
    assert interval.startswith("95 % interval −0.10 to 4.00")
