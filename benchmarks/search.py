"""Threshold search on the synthetic data of the speed target: 10,000 rows, 8 exits, 100 classes.

    python benchmarks/search.py [--rows 10000] [--exits 8] [--score margin] [--seed 0] [--json FILE]

Logits are N(0, 1) plus 1.5 + 5.5 (k + 1) / E - 4 difficulty on the true class; an exit costs (k +
1) / E of the network. Times `frontier`, `cheapest` at one point of lost accuracy, `best` at a
budget of 0.6 and two certified plans, and prints what each family of plans reaches alone. For
scale, measured by us on such data (other processes on the machine): the 39-point curve of MSDNet's
procedure as BoostNet ships it 65-120 s, one point of earlyon's calibrators 2.1-2.3 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from offramp import Trace

# Internal: the search itself is measured.
from offramp.calibration.archive import OpenSets

# Internal: the search itself is measured.
from offramp.calibration.baselines import baselines

# Internal: the search itself is measured.
from offramp.calibration.calibrating import calibrate

# Internal: the search itself is measured.
from offramp.calibration.search import FINE_POWERS, SearchProblem, best, cheapest, frontier

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.header import Header

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.provenance import Origin

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.topology import Node, Topology

T = TypeVar("T")
DROP = 0.01
BUDGET = 0.6


def synthetic(rows: int, exits: int, score: str, seed: int, classes: int = 100) -> SearchProblem:
    """Scores and errors of every row at every exit; nothing is kept of the logits."""
    rng = np.random.default_rng(seed)
    difficulty_N = rng.random(rows)
    label_N = rng.integers(0, classes, rows)
    scores_NE = np.empty((rows, exits), np.float32)
    losses_NE = np.empty((rows, exits))
    for k in range(exits):
        logits_NC = rng.standard_normal((rows, classes)).astype(np.float32)
        logits_NC[np.arange(rows), label_N] += 1.5 + 5.5 * (k + 1) / exits - 4 * difficulty_N
        two_N2 = np.partition(logits_NC, -2, axis=1)[:, -2:]
        odds_NC = np.exp(logits_NC - two_N2[:, 1:])
        scores_NE[:, k] = two_N2[:, 1] - two_N2[:, 0] if score == "margin" else 1 / odds_NC.sum(1)
        losses_NE[:, k] = logits_NC.argmax(1) != label_N
    cost_E = np.arange(1, exits + 1) / exits
    return SearchProblem(np.ascontiguousarray(scores_NE[:, :-1]), losses_NE, lambda open_E: cost_E)


def as_trace(problem: SearchProblem) -> Trace:
    """The same rows as a trace of a chain of equally dear segments: answer 0 is right."""
    rows, exits = problem.losses_NE.shape
    names = [f"exit{k}" for k in range(exits)]
    nodes = [
        Node(name, after=tuple(names[max(index - 1, 0) : index]))
        for index, name in enumerate(names)
    ]
    topology = Topology.chain(nodes)
    columns = {
        "row": np.arange(rows),
        "digest": np.arange(rows).astype(np.uint64),
        "label": np.zeros(rows, np.int64),
    }
    for k, name in enumerate(names):
        columns[f"answer/{name}"] = problem.losses_NE[:, k].astype(np.int64)
        columns[f"cost/segment/{name}"] = np.array([1 / exits, np.nan, np.nan])
    columns |= {f"score/{name}": problem.scores_NG[:, k] for k, name in enumerate(names[:-1])}
    header = Header(
        topology, names[-1], 2, "synthetic", "0", Origin("synthetic", "torch", "float32")
    )
    return Trace(columns, header)


def timed(call: Callable[[], T], repeats: int) -> tuple[T, float]:
    """The answer and the median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - start)
    return answer, float(np.median(seconds))


def alone(problem: SearchProblem, level: float) -> dict[str, tuple[float, float]]:
    """For each family: its least cost at the level, and its least loss at the budget."""
    rows = len(problem.losses_NE)
    table = OpenSets.of(problem.scores_NG, problem.losses_NE, problem.cost, 0.0).whole()
    found = {}
    for curve in baselines(table, FINE_POWERS):
        loss_D = curve.loss_D / rows
        cost_D = curve.cost_D / rows
        cost = cost_D[loss_D <= level + 1e-12].min(initial=np.inf)
        found[curve.name] = (
            float(cost),
            float(loss_D[cost_D <= BUDGET + 1e-12].min(initial=np.inf)),
        )
    return found


def main() -> None:
    """Make the data, time the search, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--exits", type=int, default=8)
    parser.add_argument("--score", choices=("margin", "probability"), default="probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    problem = synthetic(args.rows, args.exits, args.score, args.seed)
    last = float(problem.losses_NE[:, -1].mean())
    curve, frontier_s = timed(lambda: frontier(problem), args.repeats)
    cheap, cheapest_s = timed(lambda: cheapest(problem, last + DROP), 1)
    good, best_s = timed(lambda: best(problem, BUDGET), 1)
    trace = as_trace(problem)
    certified = {}
    certified_s = {}
    for testing in ("path", "pareto"):
        certify = partial(calibrate, trace, risk="accuracy_gap", at_most=DROP, testing=testing)
        plan, certified_s[testing] = timed(certify, 1)
        certified[testing] = trace.price(plan).mean
    reached = alone(problem, last + DROP) | {"search": (cheap.cost, good.loss)}

    print(
        f"{args.rows:,} rows, {args.exits} exits, score {args.score}; error of the last exit "
        f"{last:.4f}"
    )
    print(f"frontier of {len(curve)} plans {frontier_s:.2f} s (median of {args.repeats}),", end=" ")
    print(f"cheapest {cheapest_s:.2f} s, best {best_s:.2f} s")
    for testing, seconds in certified_s.items():
        cost = certified[testing]
        print(
            f"certified for a drop <= {DROP:.0%} by {testing} testing: cost {cost:.4f}, "
            f"{seconds:.2f} s"
        )
    print(f"{'plans':18}{f'cost at a drop of {DROP:.0%}':>22}{f'accuracy at cost {BUDGET}':>24}")
    for name, (cost, loss) in reached.items():
        print(f"{name:18}{cost:22.4f}{1 - loss:24.4f}")
    if args.json:
        seconds = {
            "frontier": frontier_s,
            "cheapest": cheapest_s,
            "best": best_s,
            "certified": certified_s,
        }
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        lines = {
            name: {"cost_at_drop": cost, "accuracy_at_budget": 1 - loss}
            for name, (cost, loss) in reached.items()
        }
        document = {
            "settings": settings,
            "machine": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "cpu": platform.machine(),
            },
            "points": len(curve),
            "seconds": seconds,
            "drop": DROP,
            "budget": BUDGET,
            "certified": certified,
            "plans": lines,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
