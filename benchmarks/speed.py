"""Wall-clock of a ladder of two public CIFAR-10 ResNets: any mix of exits, batch 1, and recording.

    python benchmarks/speed.py --data DIR [--repeats 15] [--json FILE]

Every line is measured in one run, its calls interleaved: the run, the sum of its bare parts at the
batch sizes that remain, the plain network, and the plain network again (which shows the noise).
Measure where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from ladder import CALIBRATION, FIGURES, ladder, trace_of

import offramp as off

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import bench

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import interleaved, ratio


def mixes(
    network: off.Network, rows: np.ndarray, scores: np.ndarray, repeats: int
) -> list[dict[str, object]]:
    """A batch of 64 in which 0, 16, 32, 48, 63 and 64 rows leave at the first exit."""
    found = []
    order = np.sort(scores[:64])[::-1]
    for leave in (0, 16, 32, 48, 63, 64):
        edge = (
            np.inf
            if leave == 0
            else order[leave - 1] - 1e-3
            if leave == 64
            else order[leave - 1 : leave + 1].mean()
        )
        plan = off.Plan.by_hand({"resnet20": float(edge)})
        result = bench(network, plan, rows[:64], batches=(64,), repeats=repeats)
        print(result if not found else str(result).splitlines()[1], flush=True)
        found += result.to_json()["lines"]
    return found


def recording(network: off.Network, rows: np.ndarray, repeats: int) -> dict[str, object]:
    """`record` on 2,000 rows, timing of parts left out and in, against a bare loop over both
    models.
    """
    models = [(network.backbone[name], network.fronts[name]) for name in network.topology.exits]

    def loop() -> None:
        with torch.inference_mode():
            for start in range(0, len(rows), 64):
                x = torch.as_tensor(rows[start : start + 64])
                for model, preprocess in models:
                    model(preprocess(x)).numpy()

    calls = {"record": lambda: off.record(network, rows, timed=False, progress=False), "loop": loop}
    times = interleaved(calls, repeats=repeats, warmup=1)
    start = time.perf_counter()
    off.record(network, rows[:64], progress=False)
    timing = time.perf_counter() - start
    both = ratio(times["record"], times["loop"])
    print(
        f"record / bare loop on {len(rows):,} rows: {both}; measuring milliseconds takes "
        f"{timing:.1f} s once",
        flush=True,
    )
    return {"rows": len(rows), "record_over_loop": vars(both), "timing_seconds": timing}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    network = ladder(args.data, (20, 56), "own")
    trace = trace_of(args.data, args.cache, (20, 56), "own")
    rows = off.rows(f"cifar10:{args.data / 'cifar10'}").take(np.arange(5000, 7000)).x
    assert isinstance(rows, np.ndarray)
    print("batch 64, mixes of exits")
    results: dict[str, object] = {
        "mixes": mixes(network, rows, trace[FIGURES].scores[:, 0], args.repeats)
    }
    plan = off.calibrate(trace[CALIBRATION], risk="accuracy_gap", at_most=0.005)
    print(f"\n{plan}\nthe certified plan, batch 1 by exit and batches of 64 and 256")
    certified = bench(network, plan, rows, batches=(1, 64, 256), repeats=args.repeats)
    print(certified, "\n", flush=True)
    results["certified"] = certified.to_json()
    results["recording"] = recording(network, rows, max(3, args.repeats // 3))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
