"""Whether a run answers as the replay of its trace says, on every engine and both ways: in one
graph, and in stages.

    python benchmarks/both_ways.py [--rows 1000000] [--engine onnxruntime ...] [--json FILE]

B-LeNet (not trained) on seeded pictures of noise, in batches of 1 to 256 rows. A row whose score
lies within the float band of the threshold may go either way; these are counted apart. No other row
may differ.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lenet import untrained

import offramp as off

# Internal: the width of the float band.
from offramp.plans.plan import BAND

ENGINES = ("torch", "onnxruntime", "openvino")
AT_ONCE = 20_000  # rows that are drawn, recorded and run before the next ones


def pictures(count: int, seed: int) -> np.ndarray:
    """Noise of several strengths, so that scores differ: [count, 1, 28, 28] uint8."""
    rng = np.random.default_rng(seed)
    strength = rng.uniform(0.05, 1.0, (count, 1, 1, 1))
    return (rng.integers(0, 256, (count, 1, 28, 28)) * strength).astype(np.uint8)


def batches(count: int, seed: int) -> Iterator[slice]:
    """The rows in order, in batches of 1 to 256."""
    rng = np.random.default_rng(seed)
    start = 0
    while start < count:
        size = int(rng.choice([1, 2, 8, 64, 256]))
        yield slice(start, min(start + size, count))
        start += size


def ways_of(runner: Any) -> dict[str, Callable[[Any], Any]]:
    """How this Runner can answer. Internal: both ways of one Runner, of which a call takes the
    first.
    """
    found: dict[str, Callable[[Any], Any]] = {"run": runner}
    if runner._lean is not None and runner._quick is not runner._lean:
        found = {"one graph": runner, "stages": runner._lean}
    return found


def differing(engine: str, rows: int) -> dict[str, Any]:
    """Rows that went another way than replayed, by way."""
    network = untrained(0, pictures(4, 1))
    scores = off.record(network, pictures(2000, 2), timed=False, progress=False).scores[:, 0]
    plan = off.Plan.by_hand({"conv1": float(np.median(scores))})
    runner = off.open(network, plan, engine=engine, example=pictures(64, 3))
    ways = ways_of(runner)
    found = dict.fromkeys(ways, 0)
    close = 0
    for start in range(0, rows, AT_ONCE):
        count = min(AT_ONCE, rows - start)
        x = pictures(count, 4 + start)
        trace = off.record(network, x, engine=engine, timed=False, progress=False)
        sure = np.abs(trace.scores[:, 0] - plan.thresholds["conv1"][0]) > BAND
        close += int((~sure).sum())
        wanted = trace.replay(plan)
        for way, call in ways.items():
            for some in batches(count, start):
                y = call(x[some])
                wrong = (y.exit.numpy() != wanted.exit[some]) | (y.why.numpy() != wanted.why[some])
                wrong |= y.logits.numpy().argmax(1) != wanted.answer[some]
                found[way] += int((wrong & sure[some]).sum())
    return {"engine": engine, "rows": rows, "within the band": close, "differ": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the branch was never trained, and need not be
    results = []
    for engine in args.engine or ENGINES:
        results.append(differing(engine, args.rows))
        print(results[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
