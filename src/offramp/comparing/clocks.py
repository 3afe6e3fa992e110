"""Wall-clock times of a plan and of the plain network.

At batch 1 each exit is timed on its own, and the times are averaged over the exits at which test
rows leave. Larger batches are reported as they were timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Clock:
    """Milliseconds per batch of a plan and of the plain network, timed in the same run.

    Attributes:
        batch: rows of the batch.
        exit: at batch 1 the exit at which the row left; None for the mean over exits, and for
            larger batches.
        run_ms: milliseconds of the plan.
        plain_ms: milliseconds of the plain network.
        ratio: run / plain, then the low and the high end of its 90 % interval. For a mean over
            exits each end is the mean of the ends, which is wider than necessary.
        same: plain / plain, which shows the noise of the timing.
        covered: the share of test rows whose exit was timed.
    """

    batch: int
    exit: str | None
    run_ms: float
    plain_ms: float
    ratio: tuple[float, float, float]
    same: float
    covered: float = 1.0


def each_exit(timed: Mapping[str, Any]) -> list[Clock]:
    """The clocks at batch 1, one for each exit at which a timed row left, shallow to deep.

    Args:
        timed: the report of `bench` as plain data.
    """
    clocks = []
    for line in timed["lines"]:
        if line["batch"] == 1:
            # `left` counts the rows by exit; at batch 1 a single exit has one row
            index = line["left"].index(1)
            clocks.append(_clock(line, timed["exits"][index]))
    return clocks


def in_use(timed: Mapping[str, Any], shares: Sequence[float]) -> list[Clock]:
    """The clocks of a plan in use: the mean over exits at batch 1, and larger batches as timed.

    Args:
        timed: the report of `bench` as plain data.
        shares: of test rows that leave at each exit [E], the weights of the mean.

    Returns:
        Batch 1 first. It is left out if test rows leave at no exit that was timed.
    """
    larger = []
    for line in timed["lines"]:
        if line["batch"] > 1:
            larger.append(_clock(line, None))
    by_exit = each_exit(timed)
    shares_timed = []
    times = []
    ratios = []
    for clock in by_exit:
        shares_timed.append(shares[timed["exits"].index(clock.exit)])
        times.append((clock.run_ms, clock.plain_ms, clock.same))
        ratios.append(clock.ratio)
    weights = np.array(shares_timed)  # [T], T exits that were timed
    if not weights.sum():
        return larger
    times_T3 = np.array(times)
    run, plain, same = np.average(times_T3, axis=0, weights=weights).tolist()
    # Weighting the ratios by the plain milliseconds too makes their mean the ratio of both means.
    ratio_weights = weights * times_T3[:, 1]
    value, low, high = np.average(ratios, axis=0, weights=ratio_weights).tolist()
    mean = Clock(1, None, run, plain, (value, low, high), same, float(weights.sum()))
    return [mean, *larger]


def _clock(line: Mapping[str, Any], exit_: str | None) -> Clock:
    """A clock from one line of the report."""
    over = line["over_plain"]
    ratio = over["value"], over["low"], over["high"]
    return Clock(
        line["batch"], exit_, line["run_ms"], line["plain_ms"], ratio, line["same"]["value"]
    )
