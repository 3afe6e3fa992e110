"""An exported folder beside `run`: the same exits and answers on all 10,000 test rows of CIFAR-10?
How long to import?

    python benchmarks/exported.py --data DIR [--cache out] [--one-file] [--json FILE]

The ResNet-56 of benchmarks/exits.py, cut at two places, under a plan certified on ONNX Runtime.
`run.py` of the folder runs in a process of its own, which has NumPy and ONNX Runtime in mind and
nothing of offramp or torch. Rows whose score lies within the float band of a threshold are told
apart. Import time: best of five fresh processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import offramp as off
from exits import network

# Internal: the decision rule and its float band are compared.
from offramp.plans.plan import BAND

IMPORTING = "import sys; sys.path.insert(0, {folder!r}); import run"
OPENING = IMPORTING + "; run.session(run.read('manifest.json')['parts'][0]['file'], 1)"


def answered(folder: Path, images: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """What run.py writes for the images, 500 at a time, and the seconds that its process took in
    all.
    """
    found: list[dict[str, np.ndarray]] = []
    start = time.perf_counter()
    for number in range(0, len(images), 500):
        np.save(folder / "rows.npy", images[number : number + 500])
        call = [sys.executable, "run.py", "rows.npy", "-o", "answers.npz"]
        subprocess.run(call, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with np.load(folder / "answers.npz") as body:
            found.append({name: body[name] for name in body.files})
    joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return joined, time.perf_counter() - start


def imported(folder: Path) -> dict[str, float]:
    """Seconds of a fresh process: Python alone, run.py imported, and its first graph opened."""
    calls = {
        "python alone": "pass",
        "import run": IMPORTING.format(folder=str(folder)),
        "import run, open the first graph": OPENING.format(folder=str(folder)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(5):
        for name, code in calls.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def compared(
    net: off.Network, plan: off.Plan, trace: off.Trace, images: np.ndarray, folder: Path
) -> dict[str, Any]:
    """Rows with other exits and other answers, in and outside the band, and the largest difference
    of logits.
    """
    there, seconds = answered(folder, images)
    runner = off.open(net, plan, engine="onnxruntime")
    parts = [runner(images[start : start + 64]) for start in range(0, len(images), 64)]
    exits = np.concatenate([part.exit.numpy() for part in parts])
    logits = np.concatenate([part.logits.numpy() for part in parts])
    near = np.zeros(len(images), bool)
    for gate, (threshold, *_) in plan.thresholds.items():
        near |= np.abs(trace.columns[f"score/{gate}"] - threshold) <= BAND
    other_exit = exits != there["exit"]
    same = ~other_exit
    return {
        "rows": len(images),
        "in the band": int(near.sum()),
        "other exit": int(other_exit.sum()),
        "other exit, outside the band": int((other_exit & ~near).sum()),
        "other answer, outside the band": int(
            ((logits.argmax(1) != there["logits"].argmax(1)) & ~near).sum()
        ),
        "largest difference of logits": float(np.abs(logits[same] - there["logits"][same]).max()),
        "seconds of run.py": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--one-file", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    net, _ = network(args.data, args.cache, 56, "hinge")
    spec = f"cifar10:{args.data / 'cifar10'}"
    trace = off.record(net, spec, timed=False, engine="onnxruntime")
    plan = off.calibrate(trace[1000:5000], risk="accuracy_gap", at_most=0.01)
    images = np.concatenate([np.asarray(batch.x) for batch in off.rows(spec).batches(1000)])
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path) / "exported"
        told = off.export(net, plan, folder, one_file=args.one_file)
        found = compared(net, plan, trace, images, folder) | imported(folder)
    table = Table("an exported folder beside run", "")
    for name, value in found.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else f"{value:,}")
    console = Console(width=100)
    console.print(str(told), table)
    if args.json:
        args.json.write_text(json.dumps(found | {"plan": str(plan)}, indent=1))


if __name__ == "__main__":
    main()
