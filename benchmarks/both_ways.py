"""Whether a run answers as the replay of its trace says, on every engine and both ways: in one
graph, and in stages.

    python benchmarks/both_ways.py [--rows 1000000] [--engine onnxruntime ...] [--json FILE]
                                   [--minutes 8]

B-LeNet (not trained) on seeded pictures of noise, in batches of 1 to 256 rows. A row whose score
lies within the float band of the threshold may go either way; these are counted apart. No other row
may differ.

FILE is written after every 20,000 rows of an engine. A second run with the same FILE goes on where
the first one stopped. With `--minutes` it stops by itself after the rows at which they have passed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
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


def opened(engine: str) -> tuple[Any, off.Plan, Any]:
    """B-LeNet, a plan under which half of some noise leaves, and its Runner."""
    network = untrained(0, pictures(4, 1))
    scores = off.record(network, pictures(2000, 2), timed=False, progress=False).scores[:, 0]
    plan = off.Plan.by_hand({"conv1": float(np.median(scores))})
    runner = off.open(network, plan, engine=engine, example=pictures(64, 3))
    return network, plan, runner


def nothing_yet(engine: str, ways: Iterable[str]) -> dict[str, Any]:
    """The counts of an engine before its first row."""
    return {"engine": engine, "rows": 0, "within the band": 0, "differ": dict.fromkeys(ways, 0)}


def differing(engine: str, rows: int, found: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Rows that went another way than replayed, by way.

    Args:
        engine: its name.
        rows: how many there are in all.
        found: the counts of an earlier run; its rows are not run again.

    Yields:
        The counts so far, after every AT_ONCE rows.
    """
    network, plan, runner = opened(engine)
    ways = ways_of(runner)
    found = found or nothing_yet(engine, ways)
    if set(found["differ"]) != set(ways):
        raise SystemExit(f"{engine} ran as {[*found['differ']]} before, and now as {[*ways]}.")
    while found["rows"] < rows:
        # The rows of a chunk follow from its first row number, whichever run gets to it.
        start = found["rows"]
        count = min(AT_ONCE, rows - start)
        x = pictures(count, 4 + start)
        trace = off.record(network, x, engine=engine, timed=False, progress=False)
        sure = np.abs(trace.scores[:, 0] - plan.thresholds["conv1"][0]) > BAND
        wanted = trace.replay(plan)
        for way, call in ways.items():
            for some in batches(count, start):
                y = call(x[some])
                wrong = (y.exit.numpy() != wanted.exit[some]) | (y.why.numpy() != wanted.why[some])
                wrong |= y.logits.numpy().argmax(1) != wanted.answer[some]
                found["differ"][way] += int((wrong & sure[some]).sum())
        found["within the band"] += int((~sure).sum())
        found["rows"] += count
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after them")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the branch was never trained, and need not be
    until = time.monotonic() + args.minutes * 60

    # What an earlier run has counted, by engine.
    results = dict[str, dict[str, Any]]()
    if args.json and args.json.exists():
        for found in json.loads(args.json.read_text()):
            results[found["engine"]] = found
    for engine in args.engine or ENGINES:
        for found in differing(engine, args.rows, results.get(engine)):
            results[engine] = found
            if args.json:
                args.json.write_text(json.dumps([*results.values()], indent=1))
            if time.monotonic() > until:
                break
        print(results[engine], flush=True)
        if time.monotonic() > until:
            break


if __name__ == "__main__":
    main()
