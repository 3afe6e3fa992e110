"""Plans of peers.py: every way to choose thresholds, what it costs, and how often its target is
broken.

Costs are in units of the plain network, in MACs, exits and gates included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ladder import CALIBRATION, FIGURES, figures
from peers_earlyon import SETTINGS, calibrated

import offramp as off
from exits import scored, splits, uncertified

# Internal: the search itself is measured.
from offramp.calibration.calibrating import problem_of

# Internal: the search itself is measured.
from offramp.calibration.search import evaluate, frontier
from offramp.errors import NoSafePlan
from offramp.gates.confidence import margin, max_prob

# Internal: a risk by its name, for losses computed here.
from offramp.guarantees.risks import find_risk

# asked of offramp's own curve
DROPS = np.concatenate([np.linspace(-0.004, 0.01, 29), np.linspace(0.012, 0.05, 20)])


@dataclass(frozen=True)
class Chosen:
    """What one way of calibrating gives: a plan, the trace with the scores that it is for, seconds;
    None: no plan.
    """

    plan: off.Plan | None
    trace: off.Trace
    seconds: float


Score = Callable[[torch.Tensor], torch.Tensor]
# a trace, its calibration rows, rows for temperatures
Way = Callable[[off.Trace, np.ndarray, np.ndarray], Chosen]


def ways(drop: float, fractions: Mapping[str, float]) -> dict[str, Way]:
    """Every way to choose thresholds for a drop of accuracy."""

    def peer(name: str) -> Way:
        def choose(trace: off.Trace, rows: np.ndarray, held: np.ndarray) -> Chosen:
            found = calibrated(trace[rows], trace[held], SETTINGS[name], drop, fractions)
            return Chosen(found.plan, found.scores(trace), found.seconds)

        return choose

    def ours(score: Score, find: Callable[[off.Trace, off.Trace], off.Plan]) -> Way:
        def choose(trace: off.Trace, rows: np.ndarray, held: np.ndarray) -> Chosen:
            whole = scored(trace, score)
            some = whole[rows]
            apart = whole[held]
            start = time.perf_counter()
            try:
                plan: off.Plan | None = find(some, apart)
            except NoSafePlan:
                plan = None
            return Chosen(plan, whole, time.perf_counter() - start)

        return choose

    def certified(rows: off.Trace, _: off.Trace) -> off.Plan:
        return off.calibrate(rows, risk="accuracy_gap", at_most=drop)

    def searched(rows: off.Trace, held: off.Trace) -> off.Plan:
        return off.calibrate(rows, risk="accuracy_gap", at_most=drop, search=held)

    return {
        **{f"earlyon, {name}": peer(name) for name in SETTINGS},
        "offramp, probability, no promise": ours(max_prob, lambda rows, _: uncertified(rows, drop)),
        "offramp, margin, no promise": ours(margin, lambda rows, _: uncertified(rows, drop)),
        "offramp, margin, certified 95 %": ours(margin, certified),
        "offramp, margin, certified, path found on rows 0-999": ours(margin, searched),
    }


def over(
    trace: off.Trace, way: Way, drawn: list[tuple[np.ndarray, ...]], drop: float, static: off.Trace
) -> dict[str, Any]:
    """One way over many splits: cost, accuracy, its lead over the line of static networks, and
    targets broken.
    """
    rows_of = []
    seconds = []
    plans = 0
    for held, rows, test in drawn:
        chosen = way(trace, rows, held)
        plan = chosen.plan or off.Plan.never_leave(trace.topology)
        done = figures(chosen.trace[test], plan)
        line = static_line(static, trace, test)
        rows_of.append(
            [done["cost"], done["drop"], done["accuracy"] - np.interp(done["cost"], *line)]
        )
        seconds.append(chosen.seconds)
        plans += chosen.plan is not None
    cost, fall, lead = np.array(rows_of).T
    return {
        "plans": plans / len(drawn),
        "cost": np.quantile(cost, [0.05, 0.5, 0.95]).tolist(),
        "mean_cost": float(cost.mean()),
        "drop": np.quantile(fall, [0.05, 0.5, 0.95]).tolist(),
        "mean_drop": float(fall.mean()),
        "lead_over_static": np.quantile(lead, [0.05, 0.5, 0.95]).tolist(),
        "broken": float((fall > drop + 1e-9).mean()),
        "seconds": float(np.median(seconds)),
    }


def static_line(
    static: off.Trace, trace: off.Trace, rows: np.ndarray
) -> tuple[list[float], list[float]]:
    """Costs and accuracies of the plain ResNets 20, 32 and 56 on these rows."""
    labels = trace.labels
    whole = trace.price(off.Plan.never_leave(trace.topology)).plain
    assert labels is not None
    costs = [
        static.prices.plain(name, unit="macs", batch=1) / whole for name in static.topology.exits
    ]
    answers = [static.columns[f"answer/{name}"] for name in static.topology.exits]
    answers.append(trace.columns["answer/" + trace.reference("last")])
    return [*costs, 1.0], [float((answer[rows] == labels[rows]).mean()) for answer in answers]


def curve(trace: off.Trace, drawn: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """offramp's uncertified plans: mean drop and mean cost on the figure rows of all splits, by the
    drop asked for.
    """
    risk = find_risk("accuracy_gap")
    drops = []
    costs = []
    plain = trace.price(off.Plan.never_leave(trace.topology)).plain
    for _, rows, test in drawn:
        curve = frontier(problem_of(trace[rows], risk), points=400)
        places = [
            np.flatnonzero(curve.loss_P <= max(level, curve.loss_P.min()))[0] for level in DROPS
        ]
        loss_P, cost_P = evaluate(problem_of(trace[test], risk), curve.thresholds_PG[places])
        drops.append(loss_P)
        costs.append(cost_P / plain)
    return np.mean(drops, 0), np.mean(costs, 0)


def at_batch(trace: off.Trace, plan: off.Plan, batch: int) -> dict[str, float]:
    """Cost and accuracy when a batch leaves where all of its rows are sure, as earlyon and whole
    batches do.
    """
    gates = [gate for gate in trace.topology.gates if gate in plan.open_gates()]
    cost_E = trace.prices.to_exit(gates, None)
    last = len(trace.topology.exits) - 1
    exits = np.full(len(trace), last)
    for gate in reversed(gates):
        sure = trace.columns[f"score/{gate}"] >= np.float32(plan.thresholds[gate][0])
        for start in range(0, len(trace), batch):
            if sure[start : start + batch].all():
                exits[start : start + batch] = trace.topology.exit_index(gate)
    right = trace.answers[np.arange(len(trace)), exits] == trace.labels
    return {
        "cost": float(cost_E[exits].mean() / trace.price(plan).plain),
        "accuracy": float(right.mean()),
    }


def plans_of(
    trace: off.Trace, static: off.Trace, drop: float, fractions: Mapping[str, float], count: int
) -> dict[str, Any]:
    """Targets, costs and search times of all ways on one network."""
    drawn = [tuple(parts) for parts in splits(count)]
    rng = np.random.default_rng(22)
    again = [
        (np.arange(1000), rng.integers(1000, 10000, 4000), np.arange(1000, 10000))
        for _ in range(count)
    ]
    found = dict[str, Any]()
    equal = {}
    curves = {
        name: curve(scored(trace, score), drawn)
        for name, score in (("probability", max_prob), ("margin", margin))
    }
    for name, way in ways(drop, fractions).items():
        found[name] = over(trace, way, drawn, drop, static)
        found[name]["broken_of_population"] = over(trace, way, again, drop, static)["broken"]
        if name.startswith("earlyon"):
            at = {
                score: float(np.interp(found[name]["mean_drop"], *one))
                for score, one in curves.items()
            }
            equal[name] = {"earlyon": found[name]["mean_cost"], **at}
            fixed = way(trace, np.arange(10000)[CALIBRATION], np.arange(1000))
            assert fixed.plan is not None
            found[name]["batch 64"] = at_batch(fixed.trace[FIGURES], fixed.plan, 64)
            found[name]["batch 1"] = at_batch(fixed.trace[FIGURES], fixed.plan, 1)
    return {"ways": found, "equal_accuracy": equal}
