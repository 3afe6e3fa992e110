"""What starting costs: `offramp --help`, and opening a network under a plan.

    python benchmarks/startup.py [--repeats 5]
    python benchmarks/startup.py --engine onnxruntime --engine openvino [--repeats 5]

Every measurement is a Python process of its own. It prints the median of its processor time and of
its wall-clock time, and which of the heavy packages it has loaded. Asked for: --help below 0.3 s
without torch, numpy and scipy; opening below 2 s of processor time, torch included, without scipy
and sympy.

With `--engine` it opens a saved ResNet-56, cut in four with three gates (weights not trained), on
that engine: first with an empty folder of compiled graphs, then as later processes do. Asked for:
a later process opens it in less than a second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import offramp as off

HEAVY = ("torch", "numpy", "scipy", "sympy")
TIMED = """
import json, os, sys, time
start = time.perf_counter()
{program}
times = os.times()
loaded = [name for name in {heavy} if name in sys.modules]
print(json.dumps([times.user + times.system, time.perf_counter() - start, loaded]), file=sys.stderr)
"""
PROGRAMS = {
    "offramp --help": """
sys.argv = ["offramp", "--help"]
from offramp.cli import main
try:
    main()
except SystemExit:
    pass
""",
    "import torch (for comparison)": "import torch",
    "open a ladder": """
import offramp as off
from torch import nn
net = off.ladder({"small": nn.Linear(4, 3), "large": nn.Linear(4, 3)}).eval()
off.open(net, off.Plan.by_hand({"small": 1.0}))
""",
    "open a cut model": """
import torch
import offramp as off
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
net = off.cut(model, torch.randn(4, 4), at=["1"]).eval()
off.open(net, off.Plan.by_hand({"1": 1.0}))
""",
}

OPENED = """
import json, sys, time
import torch
import offramp as off

def now():
    return time.process_time(), time.perf_counter()

times = [now()]
network = off.load({folder!r})
times.append(now())
plan = off.Plan.by_hand(dict.fromkeys(network.topology.gates, 1e30))
rows = torch.zeros(4, 3, 32, 32)
runner = off.open(network, plan, engine={engine!r}, example=rows)
times.append(now())
runner(rows[:1])
times.append(now())
print(json.dumps(times), file=sys.stderr)
"""
STEPS = ("load", "open", "first batch")


def measured(program: str) -> tuple[float, float, list[str]]:
    """Processor seconds, wall-clock seconds and heavy packages of a program in a process of its
    own.
    """
    code = TIMED.format(program=program, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cpu, wall, loaded = json.loads(done.stderr.splitlines()[-1])
    return cpu, wall, loaded


def opened(folder: Path, engine: str, compiled: Path) -> list[tuple[float, float]]:
    """Processor and wall-clock seconds of each of STEPS in a process of its own.

    Args:
        folder: of the saved network.
        engine: to open it on.
        compiled: the folder for compiled graphs.
    """
    code = OPENED.format(folder=str(folder), engine=engine)
    where = {**os.environ, "XDG_CACHE_HOME": str(compiled)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=where
    )
    times = json.loads(done.stderr.splitlines()[-1])
    steps = []
    for before, after in itertools.pairwise(times):
        steps.append((after[0] - before[0], after[1] - before[1]))
    return steps


def print_opened(engines: list[str], repeats: int) -> None:
    """Print what each step takes in a first process, and the medians over later ones."""
    model = off.make_model("offramp:resnet56").eval()
    network = off.cut(
        model, torch.randn(4, 3, 32, 32), parts=4, exits="linear", spec="offramp:resnet56"
    )
    print(f"{'':<30} {'':<12} {'processor':>10} {'wall clock':>11}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "network"
        off.save(network.eval(), saved)
        for engine in engines:
            compiled = Path(folder) / f"compiled-{engine}"
            first = opened(saved, engine, compiled)
            later = [opened(saved, engine, compiled) for _ in range(repeats)]
            for index, step in enumerate(STEPS):
                cpu, wall = first[index]
                print(f"{engine + ', first process':<30} {step:<12} {cpu:>8.2f} s {wall:>9.2f} s")
            for index, step in enumerate(STEPS):
                cpu = statistics.median(run[index][0] for run in later)
                wall = statistics.median(run[index][1] for run in later)
                print(f"{engine + ', later process':<30} {step:<12} {cpu:>8.2f} s {wall:>9.2f} s")


def main() -> None:
    """Print a line a program, or a line a step of opening."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", action="append", default=[])
    given = parser.parse_args()
    repeats = given.repeats
    if given.engine:
        print_opened(given.engine, repeats)
        return
    print(f"{'':<30} {'processor':>10} {'wall clock':>11}   loads")
    for name, program in PROGRAMS.items():
        runs = [measured(program) for _ in range(repeats)]
        cpu = statistics.median(run[0] for run in runs)
        wall = statistics.median(run[1] for run in runs)
        print(
            f"{name:<30} {cpu:>8.2f} s {wall:>9.2f} s   {', '.join(runs[0][2]) or 'none of them'}"
        )


if __name__ == "__main__":
    main()
