"""A ladder on torch while other programs keep the cores busy: what the number of threads does.

    python benchmarks/busy.py --data DIR [--batch 64] [--batch 1] [--repeats 25] [--json FILE]

ResNet-20 and 56 on CIFAR-10. The threshold lets a quarter of the rows go on, so that a row costs
0.58 of the plain ResNet-56 in multiply-adds. Timed in turn, in wall-clock, first as the machine is
and then beside one busy loop per core:

    plain       the plain network on torch's threads
    plain, 1    the same on one thread
    run         `runner(x)` of `offramp.open` as it is by default
    run, all    with torch:threads=N, torch's own number
    run, 1      with torch:threads=1
    same        plain once more

Ratios are of medians to plain, and of means: where threads wait for each other, a few batches take
most of the time. DIR holds cifar10/ and weights/ (see benchmarks/fetch.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import ladder

import offramp as off

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import as_inputs

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.benching import plain_call

# Internal: an engine without the Runner around it.
from offramp.runtime.engine import engine_of

# Internal: the bootstrap of our own figures.
from offramp.runtime.measuring import ratio

GOES_ON = 0.25  # share of the rows
ROWS = 256
WARMUPS = 12  # batches in which the default measures
# A program that ends with the one that started it.
LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""

Call = Callable[[], object]


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many programs that compute without a pause, ended afterwards."""
    command = [sys.executable, "-c", LOOP, str(os.getpid())]
    programs = [subprocess.Popen(command) for _ in range(loops)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def threshold_of(network: off.Network, rows: np.ndarray) -> float:
    """The score that a quarter of the rows do not reach."""
    trace = off.record(network, rows, timed=False, progress=False, engine="torch:threads=1")
    return float(np.quantile(trace.scores[:, 0], GOES_ON))


def timed(calls: dict[str, Callable[[int], object]], repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds [repeats] of each call, in turn; the calls get the number of the round."""
    times = {name: list[float]() for name in calls}
    order = [*calls]
    for number in range(repeats):
        for name in order if number % 2 == 0 else reversed(order):
            start = time.perf_counter()
            calls[name](number)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def calls_of(
    network: off.Network, plan: off.Plan, rows: np.ndarray, batch: int
) -> tuple[dict[str, Callable[[int], object]], Any]:
    """What is timed; each round takes other rows. Also the Runner by default."""
    batches = [rows[start : start + batch] for start in range(0, len(rows) - batch + 1, batch)]
    runners = {"run": off.open(network, plan)}
    runners["run, all"] = off.open(network, plan, engine=f"torch:threads={torch.get_num_threads()}")
    runners["run, 1"] = off.open(network, plan, engine="torch:threads=1")
    plain = dict[str, list[Call]]()
    for name, text in (("plain", "torch"), ("plain, 1", "torch:threads=1")):
        engine, _ = engine_of(text)
        plain[name] = [plain_call(network, as_inputs(some), engine) for some in batches]
    calls = dict[str, Callable[[int], object]]()
    for name, bare in plain.items():
        calls[name] = lambda number, bare=bare: bare[number % len(bare)]()
    for name, runner in runners.items():
        calls[name] = lambda number, runner=runner: runner(batches[number % len(batches)])
    calls["same"] = calls["plain"]
    return calls, runners["run"]


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", action="append", type=int, metavar="N")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--loops", type=int, action="append", metavar="N", help="0, then per core")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = off.rows(f"cifar10:{args.data / 'cifar10'}").take(np.arange(5000, 5000 + ROWS)).x
    assert isinstance(rows, np.ndarray)
    network = ladder(args.data, (20, 56), "own").eval()
    plan = off.Plan.by_hand({network.topology.gates[0]: threshold_of(network, rows)})
    results: list[dict[str, Any]] = []
    for batch in args.batch or [64]:
        calls, runner = calls_of(network, plan, rows, batch)
        for loops in args.loops or (0, args.threads):
            with busy(loops):
                timed({"run": calls["run"]}, WARMUPS)
                times = timed(calls, args.repeats)
            load = os.getloadavg()[0]
            print(
                f"\nbatch {batch}, {loops} busy loops, {args.threads} threads, load {load:.1f}\n"
                f"{runner}"
            )
            for name, values in times.items():
                over = ratio(values, times["plain"])
                mean = values.mean() / times["plain"].mean()
                print(
                    f"{name:<9} {np.median(values):9.1f} ms {over}   of means {mean:.3f}",
                    flush=True,
                )
                results.append(
                    {"batch": batch, "loops": loops, "call": name, "ms": values.tolist()}
                )
    if args.json:
        args.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
