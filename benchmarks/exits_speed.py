"""Wall-clock of a ResNet-56 cut in three: overhead without leaving, mixes of exits, the certified
plan, opening.

    python benchmarks/exits_speed.py --data DIR [--cache out] [--repeats 15] [--json FILE]

Run benchmarks/exits.py before: it trains the exits and records them. Every line is measured in one
run, its calls
interleaved: the run, the sum of its bare parts, the plain network, and the plain network again
(which shows the noise). Opening is measured in a fresh process, from files. Measure where nothing
else runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import CALIBRATION, FIGURES

import offramp as off
from exits import network, trace_of

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import Bench, bench

MIXES = (
    (0, 0),
    (16, 16),
    (32, 16),
    (48, 8),
    (0, 63),
    (63, 0),
    (64, 0),
)  # of 64 rows, at layer1 and at layer2
OPENING = """
import sys, time
start = time.perf_counter()
import offramp as off, torch
imported = time.perf_counter()
net = off.load(sys.argv[1])
loaded = time.perf_counter()
plan = off.Plan.load(sys.argv[2])
off.open(net, plan)
opened = time.perf_counter()
off.open(net, plan)
print(imported - start, loaded - imported, opened - loaded, time.perf_counter() - opened)
"""


def above_all(network_: off.Network, rows: np.ndarray, repeats: int) -> Bench:
    """Finite thresholds above every score: every gate is run and no row leaves."""
    with torch.inference_mode():
        scores = [
            score for _, _, score in network_.walk(torch.as_tensor(rows[:256])) if score is not None
        ]
    plan = off.Plan.by_hand(
        {gate: float(s.max()) + 10 for gate, s in zip(network_.topology.gates, scores, strict=True)}
    )
    return bench(network_, plan, rows[:64], batches=(1, 64), repeats=repeats)


def picked(scores: np.ndarray, mix: tuple[int, int]) -> tuple[np.ndarray, dict[str, float]]:
    """64 rows and thresholds with which so many leave at layer1 and at layer2."""
    order = np.argsort(-scores[:, 0])
    sure = order[: mix[0]]
    rest = order[len(order) // 2 :]
    after = rest[np.argsort(-scores[rest, 1])]
    rows = np.concatenate([sure, after[: mix[1]], after[len(after) - (64 - sum(mix)) :]])
    edges = [np.inf, np.inf]
    if mix[0]:
        edges[0] = float(scores[sure, 0].min()) - 1e-3
    if mix[1]:
        edges[1] = float(scores[after[: mix[1]], 1].min()) - 1e-3
    above = {"layer1": edges[0], "layer2": edges[1]}
    # an open gate that nobody passes, rather than a closed exit that is not run
    top = scores.max(0) + 10
    return rows, {
        gate: min(edge, float(limit))
        for (gate, edge), limit in zip(above.items(), top, strict=True)
    }


def opening(net: Path, plan: Path, times: int) -> dict[str, float]:
    """Median seconds in fresh processes."""
    found = []
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", OPENING, str(net), str(plan)],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append([float(word) for word in done.stdout.split()])
    names = ("import", "load", "open", "open again")
    return dict(zip(names, np.median(found, axis=0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    net, _ = network(args.data, args.cache, 56, "hinge")
    trace = trace_of(args.data, args.cache, "56-hinge", lambda: net)
    rows = off.rows(f"cifar10:{args.data / 'cifar10'}").take(np.arange(5000, 10000)).x
    assert isinstance(rows, np.ndarray)
    split = above_all(net, rows, args.repeats)
    print(f"no exit taken\n{split}\nmixes of exits at batch 64", flush=True)
    results: dict[str, Any] = {"split": split.to_json(), "mixes": []}
    for mix in MIXES:
        numbers, thresholds = picked(trace[FIGURES].scores, mix)
        plan = off.Plan.by_hand(thresholds)
        found = bench(net, plan, rows[numbers], batches=(64,), repeats=args.repeats)
        print(found if mix == MIXES[0] else str(found).splitlines()[1], flush=True)
        results["mixes"].append(found.to_json()["lines"][0])
    plan = off.calibrate(trace[CALIBRATION], risk="accuracy_gap", at_most=0.01)
    certified = bench(net, plan, rows, batches=(1, 64, 256), repeats=args.repeats)
    print(f"\n{plan}\n{certified}", flush=True)
    results["certified"] = certified.to_json()
    plan.save(args.cache / "exits-plan.json")
    results["opening"] = opening(args.cache / "exits-56-hinge", args.cache / "exits-plan.json", 3)
    print(
        "fresh process, seconds:",
        {name: round(value, 2) for name, value in results["opening"].items()},
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
