"""The path that is fixed beforehand: what the gates declare shapes it, and it reaches the ends of
their range.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from offramp.calibration.path import CLEARANCE, shared_path
from offramp.plans.plan import BAND, FLOAT32_MAX
from offramp.plans.provenance import ROUNDED
from offramp.plans.scores import ScoreRange

PROBABILITY = ScoreRange(0.0, 1.0, saturates=(1.0,))
ENTROPY = ScoreRange(high=0.0, saturates=(0.0,))
MARGIN = ScoreRange(low=0.0)
COUNTER = ScoreRange(0.0, 3.0, whole=True)


def test_it_goes_down_and_is_float32():
    for ranges in (
        [],
        [ScoreRange()],
        [PROBABILITY],
        [ENTROPY],
        [MARGIN],
        [COUNTER],
        [PROBABILITY, COUNTER],
    ):
        path = shared_path(ranges)
        assert path.dtype == np.float32
        assert (np.diff(path.astype(float)) < 0).all()
        assert np.isfinite(path).all()


def test_of_gates_that_declare_nothing_it_is_the_real_line():
    path = shared_path()
    assert path[0] > 3.3e38
    assert path[-1] == np.float32(-FLOAT32_MAX)
    margins = path[(path > 1e-3) & (path < 1e3)].astype(float)
    # two steps, where a round number lies between
    assert (margins[:-1] / margins[1:]).max() < 1.012
    probabilities = path[(path > 0.5) & (path < 1 - 3e-4)].astype(float)
    assert ((1 - probabilities[1:]) / (1 - probabilities[:-1])).max() < 1.03  # 0.99 lies between


def test_round_numbers_are_off_the_path():
    path = shared_path()
    assert not np.isin(
        np.float32([0, 0.5, 0.9, 0.95, 0.99, 0.999, 1, 2, 3, 5, 10, 100, -1, -0.5]), path
    ).any()


def test_the_path_of_gates_that_declare_nothing_keeps_a_band_away_from_round_numbers():
    """Scores of two digits, and counts, would otherwise count with the worse of their outcomes."""
    path = shared_path().astype(float)
    for value in [*np.arange(-100, 101) / 100, *range(-1000, 1001)]:
        if abs(value) >= 0.05 or value == 0:
            assert np.abs(path - value).min() > BAND, value


@pytest.mark.parametrize("band", [BAND, ROUNDED])
@pytest.mark.parametrize(
    "scores", [ScoreRange(), PROBABILITY, ENTROPY, ScoreRange(saturates=(-3.5, 0.25))]
)
def test_it_keeps_two_bands_away_from_where_scores_saturate(scores, band):
    path = shared_path([scores, MARGIN], band).astype(float)
    for value in scores.saturates or (0.0, 1.0):
        assert np.abs(path - value).min() >= CLEARANCE * band
        beside = np.sort(np.abs(path - value))[0]
        assert beside < 1.02 * CLEARANCE * band  # and comes as near as it may


def test_the_last_point_of_a_bounded_range_lets_everyone_leave():
    for band in (BAND, ROUNDED):
        assert shared_path([PROBABILITY], band)[-1] < -2 * band
        assert shared_path([MARGIN], band)[-1] < -2 * band
        assert shared_path([PROBABILITY], band)[0] <= 1 - 2 * band


def test_a_counter_has_the_middles_between_its_numbers():
    assert shared_path([COUNTER]).tolist() == [2.5, 1.5, 0.5, -0.5]
    assert shared_path([COUNTER], ROUNDED).tolist() == [2.5, 1.5, 0.5, -0.5]
    middles = shared_path([ScoreRange(whole=True)])
    assert np.isin(np.arange(-50, 50) + np.float32(0.5), middles).all()


@settings(max_examples=15)
@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(2.0**-10, 1e6, width=32),
    st.lists(st.floats(-1e6, 1e6, width=32), max_size=3),
    st.booleans(),
)
def test_any_range_has_a_path_to_its_low_end(low, width, saturates, whole):
    assume(not whole or math.floor(low + width) >= math.ceil(low))
    scores = ScoreRange(low, low + width, tuple(saturates), whole)
    path = shared_path([scores]).astype(float)
    for value in saturates:
        assert (np.abs(path - value) >= CLEARANCE * BAND * (1 - 1e-12)).all()
    assert (path <= np.float32(scores.high)).all()
    inside = path[(path > low) & (path < low + width)]
    assert whole or len(inside) > 100 or width < 0.1 or len(saturates) > 0
    near_the_end = any(abs(value - low) < 1 for value in saturates)
    assert near_the_end or whole or path[-1] < low - 2 * BAND
