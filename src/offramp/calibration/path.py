"""The path fixed beforehand: thresholds shared by all gates, known before any row is seen.

Only the declared score ranges of the gates (`offramp.plans.scores.ScoreRange`) shape it. A
threshold that was chosen by looking at the tested rows could not be tested on them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.plans.plan import BAND, FLOAT32_MAX
from offramp.plans.scores import ScoreRange

Array = np.ndarray[Any, np.dtype[Any]]

STEPS = 128  # points per factor of two of the distance to 0, or to a value where scores saturate
OFFSET = 0.37  # keeps round numbers off the path, because scores are often round
SMALLEST = -14  # the distance is at least this power of two
LARGEST = 128  # and at most this one, where float32 ends
CLEARANCE = 2.0  # the distance in bands from a threshold to a value where scores saturate
BEYOND = 3.0  # everyone leaves this many bands below the low end of a range
ASIDE = 1.1  # the distance in bands to round numbers, for a gate that declares nothing
ROUND = 1000.0  # whole numbers up to this one count as round
WHOLE = 2.0**22  # float32 numbers beyond it do not have halves

UNKNOWN = ScoreRange()
# The range of a gate that declares nothing: it may give probabilities.
PRESUMED = ScoreRange(saturates=(0.0, 1.0))


def shared_path(ranges: Sequence[ScoreRange] = (UNKNOWN,), band: float = BAND) -> Array:
    """Thresholds shared by all gates, from the safest (the highest) down.

    Each range gives a grid of its own (`_grid`). The path is all of them together, without the
    points within two bands of a value where any of the gates saturates. There every saturated row
    would count with the worse of its outcomes, and the test would fail on any rows.

    Args:
        ranges: the declared scores of each gate. A gate that declares nothing has the real line,
            and may saturate at 0 and 1 as most scores do. It costs little to avoid both, and round
            numbers too, because scores are often round.
        band: the float band of the scores, at least 0.

    Returns:
        Thresholds [P] float32, each once, read-only. In a bounded range the last one lets every row
        leave. On the real line the path goes from the largest float32 number to the smallest.
    """
    return _path_of(tuple(dict.fromkeys(ranges)), band)


@functools.lru_cache(maxsize=16)
def _path_of(ranges: tuple[ScoreRange, ...], band: float) -> Array:
    """The path of these ranges, each given once; made once, for all calibrations share it."""
    known = list[ScoreRange]()
    for scores in ranges:
        known.append(PRESUMED if scores == UNKNOWN else scores)
    grids = [_grid(scores, band) for scores in known]
    points = np.unique(np.concatenate([np.zeros(0), *grids]).astype(np.float32))
    is_clear = np.ones(len(points), bool)
    for scores in known:
        is_clear &= _clear(points.astype(np.float64), scores, CLEARANCE * band)
        if scores is PRESUMED:
            is_clear &= _off_round_numbers(points.astype(np.float64), ASIDE * band)
    path: Array = points[is_clear][::-1]
    path.flags.writeable = False
    return path


def _grid(scores: ScoreRange, band: float) -> Array:
    """Points for the scores of one gate, in any order, float64.

    The distances between points grow with the distance from where scores may crowd: from 0, from
    the ends of the range, and from every value where they saturate (0.5 % steps on either side).
    For whole numbers these are the middles between them.
    """
    powers = np.arange(SMALLEST * STEPS, LARGEST * STEPS)
    distances = 2.0 ** ((powers + OFFSET) / STEPS)
    grids = [distances, -distances]
    ends = [end for end in (scores.low, scores.high) if np.isfinite(end)]
    width = 0.0
    if len(ends) == 2:
        width = scores.high - scores.low
    for value in {*scores.saturates, *ends} - {0.0}:
        # farther away than this the grid around 0 is as fine, or the range is at its other end
        farthest = max(abs(value), width)
        near = distances[distances <= farthest]
        grids += [value + near, value - near]
    points = np.concatenate(grids)
    if scores.whole:
        points = np.floor(points[np.abs(points) < WHOLE]) + 0.5
    is_inside = (np.abs(points) <= FLOAT32_MAX) & (points > scores.low) & (points < scores.high)
    points = points[is_inside]
    # the last point is below all scores
    everyone = -FLOAT32_MAX
    if np.isfinite(scores.low):
        # the distance between float32 numbers as large as the end
        rounding = abs(scores.low) * 2.0**-20
        margin = BEYOND * band + 2.0**SMALLEST + rounding
        if scores.whole:
            margin = 0.5
        everyone = scores.low - margin
    return np.append(points, everyone)


def _clear(points: Array, scores: ScoreRange, distance: float) -> Array:
    """Which points [P] keep this distance from every value where the scores saturate."""
    clear = np.ones(len(points), bool)
    for value in scores.saturates:
        clear &= np.abs(points - value) >= distance
    if scores.whole:
        clear &= np.abs(points - np.rint(points)) >= min(distance, 0.25)
    return clear


def _off_round_numbers(points: Array, distance: float) -> Array:
    """Which points [P] keep this distance from round numbers, or are midway between two of them.

    Round numbers are hundredths from 0.05 to 1 and whole numbers up to `ROUND`. Below 0.05 the
    points themselves are closer together than hundredths.
    """
    size = np.abs(points)
    to_hundredth = np.abs(points - np.rint(100 * points) / 100)
    to_whole = np.abs(points - np.rint(points))
    clear: Array = np.where(
        size <= 1, to_hundredth >= min(distance, 0.0025), to_whole >= min(distance, 0.25)
    )
    return clear | (size > ROUND) | (size < 0.05)
