"""Populations whose true risks are known, draws of them, and how often a promise on such draws is
broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from offramp.errors import NoSafePlan
from offramp.guarantees.risks import find_risk
from offramp.plans.plan import Plan
from offramp.plans.trace import Trace
from small import trace_of

DRAWS = 400
COPIES = (2, 3, 10, 40)


def population(seed: int = 1) -> Trace:
    """Rows of contents of their own; two exits, of which the first is wrong more often."""
    return trace_of(8000, skill=(0.8, 0.93), macs=(1.0, 8.0), seed=seed)


def few_contents(contents: int, seed: int = 2) -> Trace:
    """A population of discrete data: few contents, each many times, whose labels are not decided by
    the content.
    """
    kinds = trace_of(contents, skill=(0.8, 0.93), macs=(1.0, 8.0), seed=seed)
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(contents, 2.0))
    trace = kinds[rng.choice(contents, 8000, p=share)]
    noisy = np.where(rng.random(8000) < 0.1, rng.integers(0, 5, 8000), trace.columns["label"])
    return with_columns(trace, label=noisy, row=np.arange(8000))


def at_the_edge(contents: int = 12, seed: int = 5) -> tuple[Trace, float]:
    """Discrete data with one plan that saves anything, and its true risk, the mean loss when all
    rows leave.

    Whole contents are answered otherwise by the first exit than by the last: a test that meets the
    others first would believe that nothing is lost.
    """
    kinds = trace_of(contents, skill=(0.8, 0.93), macs=(1.0, 8.0), seed=seed)
    last = kinds.columns["answer/middle"]
    other = (last + (np.arange(contents) == 0)) % 5
    flat = {"label": last, "answer/small": other, "score/small": np.full(contents, 3.0, np.float32)}
    rng = np.random.default_rng(seed)
    rows = np.append(np.zeros(800, np.intp), rng.integers(1, contents, 7200))
    return renumbered(with_columns(kinds, **flat)[rng.permutation(rows)]), 0.1


def with_columns(trace: Trace, **columns: np.ndarray) -> Trace:
    """The trace with some columns replaced."""
    return Trace({**trace.columns, **columns}, trace.header)


def renumbered(trace: Trace, start: int = 0) -> Trace:
    """The same rows under the numbers `start`, `start` + 1, ..., as a Dataset that holds copies
    numbers them.
    """
    return with_columns(trace, row=np.arange(start, start + len(trace)))


def copies(trace: Trace, times: int, rng: np.random.Generator) -> Trace:
    """Every row `times` times in a random order, under new numbers."""
    rows = rng.permutation(np.repeat(np.arange(len(trace)), times))
    return renumbered(trace[rows])


def true_risk(rows: Trace, plan: Plan, risk: str) -> float:
    """The mean loss of a plan over a whole population."""
    losses = rows.losses(find_risk(risk))
    return float(losses[np.arange(len(rows)), rows.replay(plan).exit].mean())


def broken(
    rows: Trace, plans: Iterable[Callable[[], Plan]], risk: str, at_most: float
) -> tuple[int, int]:
    """Of some ways to a plan: how many gave a plan whose true risk is above the level, and how many
    gave a plan.
    """
    bad = 0
    made = 0
    for plan_of in plans:
        try:
            plan = plan_of()
        except NoSafePlan:
            continue
        made += 1
        bad += true_risk(rows, plan, risk) > at_most
    return bad, made
