"""What starting costs: `offramp --help`, and opening a ladder under a plan.

    python benchmarks/startup.py [--repeats 5]

Every measurement is a Python process of its own. It prints the median of its processor time and of
its wall-clock time, and which of the heavy packages it has loaded. Asked for: --help below 0.3 s
without torch, numpy and scipy; opening below 2 s of processor time, torch included, without scipy
and sympy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

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


def measured(program: str) -> tuple[float, float, list[str]]:
    """Processor seconds, wall-clock seconds and heavy packages of a program in a process of its
    own.
    """
    code = TIMED.format(program=program, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cpu, wall, loaded = json.loads(done.stderr.splitlines()[-1])
    return cpu, wall, loaded


def main() -> None:
    """Print a line a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
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
