"""The path fixed beforehand: thresholds shared by all gates, known before any row is seen.

What the gates declare of their scores (`offramp.plans.scores.ScoreRange`) shapes it, and nothing
else does: a threshold that was chosen by looking at the tested rows could not be tested on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offramp.plans.plan import BAND, FLOAT32_MAX
from offramp.plans.scores import ScoreRange

Array = np.ndarray[Any, np.dtype[Any]]

STEPS = 128  # points per factor of two of the distance to 0, or to a value where scores saturate
OFFSET = 0.37  # keeps round numbers, which scores like to be, off the path
SMALLEST, LARGEST = (
    -14,
    128,
)  # powers of two between which that distance lies; float32 ends at the second
CLEARANCE = 2.0  # bands by which a threshold keeps away from a value where scores saturate
BEYOND = 3.0  # bands below the low end of a range at which everyone leaves
ASIDE = 1.1  # bands by which the path of a gate that declares nothing keeps away from round numbers
ROUND = 1000.0  # the largest number that counts as a round one if it is whole
WHOLE = 2.0**22  # float32 numbers beyond it have no halves

UNKNOWN = ScoreRange()
# of a gate that declares nothing: it may give probabilities
PRESUMED = ScoreRange(saturates=(0.0, 1.0))


def shared_path(ranges: Sequence[ScoreRange] = (UNKNOWN,), band: float = BAND) -> Array:
    """Thresholds [P] float32, one shared by all gates, from the safest (the highest) down.

    Each range gives a grid of its own (`_grid`). The path is all of them together, without the
    points that lie within two bands of a value where any of the gates saturates. There every
    saturated row would count with the worse of its outcomes, and the test would fail whatever the
    rows are.

    Args:
        ranges: what the gates declare, one for each. A gate that declares nothing has the real
            line, and may saturate at 0 and 1 as most scores in use do; it costs little to keep
            clear of both, and of round numbers, which scores like to be.
        band: the float band of the scores, at least 0.

    Returns:
        Thresholds [P], each once. Of a bounded range the last one lets every row leave; of the real
        line the path goes from the largest float32 number to the smallest.
    """
    known = [PRESUMED if each == UNKNOWN else each for each in dict.fromkeys(ranges)]
    grids = [_grid(each, band) for each in known]
    points = np.unique(np.concatenate([np.zeros(0), *grids]).astype(np.float32))
    clear = np.ones(len(points), bool)
    for each in known:
        clear &= _clear(points.astype(np.float64), each, CLEARANCE * band)
        if each is PRESUMED:
            clear &= _off_round_numbers(points.astype(np.float64), ASIDE * band)
    path: Array = points[clear][::-1]
    return path


def _grid(scores: ScoreRange, band: float) -> Array:
    """Points for the scores of one gate, in any order, float64.

    The distances between points grow with the distance from where scores may crowd: from 0, from
    the ends of the range, and from every value where they saturate (0.5 % steps on either side).
    Whole numbers get the middles between them instead.
    """
    powers = np.arange(SMALLEST * STEPS, LARGEST * STEPS)
    distances = 2.0 ** ((powers + OFFSET) / STEPS)
    grids = [distances, -distances]
    ends = [end for end in (scores.low, scores.high) if np.isfinite(end)]
    for value in {*scores.saturates, *ends} - {0.0}:
        # farther away than this the grid around 0 is as fine, or the range is at its other end
        farthest = max(abs(value), scores.high - scores.low if len(ends) == 2 else 0.0)
        near = distances[distances <= farthest]
        grids += [value + near, value - near]
    points = np.concatenate(grids)
    if scores.whole:
        points = np.floor(points[np.abs(points) < WHOLE]) + 0.5
    points = points[
        (np.abs(points) <= FLOAT32_MAX) & (points > scores.low) & (points < scores.high)
    ]
    everyone = -FLOAT32_MAX
    if np.isfinite(scores.low):
        # float32 numbers as large as the end are so far apart
        rounding = abs(scores.low) * 2.0**-20
        everyone = scores.low - (0.5 if scores.whole else BEYOND * band + 2.0**SMALLEST + rounding)
    return np.append(points, everyone)


def _clear(points: Array, scores: ScoreRange, distance: float) -> Array:
    """Which points [P] lie at least so far from every value where these scores saturate."""
    clear = np.ones(len(points), bool)
    for value in scores.saturates:
        clear &= np.abs(points - value) >= distance
    if scores.whole:
        clear &= np.abs(points - np.rint(points)) >= min(distance, 0.25)
    return clear


def _off_round_numbers(points: Array, distance: float) -> Array:
    """Which points [P] lie at least so far from hundredths from 0.05 to 1 and whole numbers up to
    `ROUND`, or midway.

    Below 0.05 the points themselves are closer together than that.
    """
    size = np.abs(points)
    to_hundredth = np.abs(points - np.rint(100 * points) / 100)
    to_whole = np.abs(points - np.rint(points))
    clear: Array = np.where(
        size <= 1, to_hundredth >= min(distance, 0.0025), to_whole >= min(distance, 0.25)
    )
    return clear | (size > ROUND) | (size < 0.05)
