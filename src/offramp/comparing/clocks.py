"""Wall-clock as a reader needs it: at batch 1 the mean over the exits that test rows leave at, at
batch 64 as timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Clock:
    """Milliseconds per batch of a plan and of the plain network, beside it in the same run.

    exit: at batch 1 the exit that the row left at; None for the mean over exits, and for larger
    batches. ratio: run / plain with the ends of its 90 % interval; of a mean over exits the mean of
    each, which is wider than it need be.
    same: plain / plain, the noise. covered: the share of test rows whose exit was timed.
    """

    batch: int
    exit: str | None
    run_ms: float
    plain_ms: float
    ratio: tuple[float, float, float]
    same: float
    covered: float = 1.0


def each_exit(timed: Mapping[str, Any]) -> list[Clock]:
    """Batch 1, a clock for each exit that one of the timed rows leaves at, shallow to deep."""
    lines = [line for line in timed["lines"] if line["batch"] == 1]
    return [_clock(line, timed["exits"][line["left"].index(1)]) for line in lines]


def in_use(timed: Mapping[str, Any], shares: Sequence[float]) -> list[Clock]:
    """Batch 1 as the mean over exits, weighted by the shares [E] of test rows, and larger batches
    as timed.
    """
    ones = each_exit(timed)
    larger = [_clock(line, None) for line in timed["lines"] if line["batch"] > 1]
    weights = np.array([shares[timed["exits"].index(one.exit)] for one in ones])
    if not weights.sum():
        return larger
    times = np.array([(one.run_ms, one.plain_ms, one.same) for one in ones])
    run, plain, same = np.average(times, axis=0, weights=weights).tolist()
    # Weighted by the plain milliseconds too: then the ratio is that of both means.
    ends = np.average([one.ratio for one in ones], axis=0, weights=weights * times[:, 1]).tolist()
    mean = Clock(1, None, run, plain, (ends[0], ends[1], ends[2]), same, float(weights.sum()))
    return [mean, *larger]


def _clock(line: Mapping[str, Any], exit_: str | None) -> Clock:
    over = line["over_plain"]
    ratio = over["value"], over["low"], over["high"]
    return Clock(
        line["batch"], exit_, line["run_ms"], line["plain_ms"], ratio, line["same"]["value"]
    )
