"""How long does calibrate take, and how much memory, for how many rows and exits?

    python benchmarks/calibrate_scale.py [--sizes 20000x4 100000x12]
        [--aims path gap budget pareto] [--json FILE]
    python benchmarks/calibrate_scale.py --sizes 1000000x4 100000x12

A made-up trace without logits is calibrated on each aim: `path` (disagreement, the exact bound),
`gap` (accuracy gap, the betting bound), `budget` (60 % of the plain network) and `pareto` (accuracy
gap). Seconds are CPU time of the process; memory is the peak of what Python and numpy allocated
meanwhile beyond the trace, as tracemalloc sees it, and as a multiple of the trace's own bytes.
Tracing slows Python down a little, so the two are measured in two runs of the same call.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import offramp as off
from offramp import Trace
from offramp.errors import NoSafePlan

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.header import Header

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.provenance import Origin

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.scores import ScoreRange

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.topology import Node, Topology

AIMS: dict[str, dict[str, Any]] = {
    "path": {"risk": "disagreement", "at_most": 0.03},
    "gap": {"risk": "accuracy_gap", "at_most": 0.005},
    "budget": {"budget": 0.6},
    "pareto": {"risk": "accuracy_gap", "at_most": 0.005, "testing": "pareto"},
}
SIZES = ("20000x4", "20000x12")
CLASSES = 10


def made_up(rows: int, exits: int, seed: int = 0) -> Trace:
    """A trace of margins: exits get better, and are surer of easy rows. Logits are not kept."""
    rng = np.random.default_rng(seed)
    names = tuple(f"exit{number}" for number in range(exits))
    label = rng.integers(0, CLASSES, rows)
    hard = rng.random(rows)
    columns: dict[str, Any] = {
        "row": np.arange(rows),
        "digest": rng.permutation(rows).astype(np.uint64),
        "label": label,
    }
    for number, name in enumerate(names):
        skill = 0.7 + 0.25 * number / (exits - 1)
        room = skill - hard + 0.1 * rng.standard_normal(rows)
        columns[f"answer/{name}"] = np.where(room > 0, label, (label + 1) % CLASSES)
        columns[f"cost/segment/{name}"] = np.array([1.0, np.nan, np.nan])
        if name != names[-1]:
            columns[f"cost/exit/{name}"] = np.array([0.01, np.nan, np.nan])
            columns[f"score/{name}"] = (8 * np.abs(room) * rng.random(rows) ** 0.2).astype(
                np.float32
            )
    nodes = [
        Node(name, after=tuple(names[max(index - 1, 0) : index]))
        for index, name in enumerate(names)
    ]
    topology = Topology.chain(nodes)
    header = Header(
        topology=topology,
        reference=names[-1],
        classes=CLASSES,
        data="made-up",
        data_fingerprint=f"{rows}x{exits}/{seed}",
        origin=Origin("made-up", "torch", "float32"),
        scores=dict.fromkeys(topology.gates, ScoreRange(low=0.0)),
    )
    return Trace(columns, header)


def measured(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """What a call returns, its CPU seconds, and the peak bytes of a second call."""
    started = time.process_time()
    result = call()
    seconds = time.process_time() - started
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, seconds, peak


def line(trace: Trace, size: str, aim: str) -> dict[str, Any]:
    """One line of the table."""

    def calibrated() -> float:
        try:
            price = off.calibrate(trace, **AIMS[aim]).price
        except NoSafePlan:
            return float("nan")
        assert price is not None
        return price.mean / price.plain

    cost, seconds, peak = measured(calibrated)
    own = sum(column.nbytes for column in trace.columns.values())
    return {
        "size": size,
        "aim": aim,
        "seconds": seconds,
        "peak_mb": peak / 1e6,
        "peak": peak / own,
        "cost": cost,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="CPU time and peak memory of calibrate.")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ROWSxEXITS")
    parser.add_argument("--aims", nargs="+", default=tuple(AIMS), choices=tuple(AIMS))
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)
    lines = []
    print(
        f"{'rows x exits':<14} {'aim':<7} {'CPU s':>7} {'peak MB':>8} {'x trace':>8}  cost of plain"
    )
    for size in options.sizes:
        rows, exits = map(int, size.split("x"))
        trace = made_up(rows, exits)
        for aim in options.aims:
            found = line(trace, size, aim)
            lines.append(found)
            print(
                f"{size:<14} {aim:<7} {found['seconds']:7.2f} {found['peak_mb']:8.1f} "
                f"{found['peak']:8.2f}"
                f"  {found['cost']:.3f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
