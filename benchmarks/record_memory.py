"""Peak memory of recording, saving and loading a trace with many logits, over the size of the
logits.

    python benchmarks/record_memory.py
    python benchmarks/record_memory.py --rows 5000 --stream

The first: C = 1000, N = 50,000, K = 5, which is 1.0 GB of logits. The second: fewer rows, from a
stream of unknown length.

Each step runs in a process of its own. Its peak counts from what the process held when the step
began, so that Python and torch do not count.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import offramp as off

INPUTS = 16
STEPS = ("record", "save", "load", "answers")


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def network(exits: int, classes: int) -> off.Network:
    """A ladder of linear models: its logits are all that is large."""
    torch.manual_seed(0)
    models = {f"member{index}": nn.Linear(INPUTS, classes) for index in range(exits)}
    return off.ladder(models).eval()


def data(rows: int, *, stream: bool) -> object:
    """Seeded rows, as one array or as batches that come one after the other."""
    x = np.random.default_rng(0).normal(size=(rows, INPUTS)).astype(np.float32)
    if not stream:
        return x

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, rows, 100):
            yield x[start : start + 100]

    return batches()


def measure(step: str, rows: int, exits: int, classes: int, *, stream: bool, file: Path) -> int:
    """The peak of one step in bytes, over what was held before it."""
    warnings.simplefilter("ignore")
    if step == "load":
        off.Trace.load  # noqa: B018  imported before the count begins
        before = peak_bytes()
        off.Trace.load(file)
        return peak_bytes() - before
    net = network(exits, classes)
    # what is imported and compiled once
    off.record(net, data(64, stream=False), timed=False, progress=False)
    before = peak_bytes()
    keep = "answers" if step == "answers" else "logits"
    trace = off.record(net, data(rows, stream=stream), timed=False, progress=False, keep=keep)
    if step == "save":
        trace.save(file)  # the trace is held as well: recorded and written within one process
    return peak_bytes() - before


def main() -> int:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--exits", type=int, default=5)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--stream", action="store_true", help="a stream whose length is not known")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a .json to write")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    shape = {"rows": asked.rows, "exits": asked.exits, "classes": asked.classes}
    if asked.step is not None:
        print(measure(asked.step, **shape, stream=asked.stream, file=asked.file))
        return 0
    logits = 4 * asked.rows * asked.exits * asked.classes
    print(
        f"{asked.rows:,} rows, {asked.exits} exits, {asked.classes:,} classes: {logits / 1e9:.2f} "
        f"GB of logits"
    )
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            command = [
                sys.executable,
                __file__,
                "--step",
                step,
                "--file",
                str(Path(folder) / "trace.npz"),
            ]
            command += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
            command += ["--stream"] if asked.stream else []
            peaks[step] = int(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
            print(
                f"{step:>8}  {peaks[step] / 1e9:6.3f} GB  {peaks[step] / logits:5.2f} x the logits"
            )
    if asked.json is not None:
        body = {**shape, "stream": asked.stream, "logits": logits, "peaks": peaks}
        asked.json.write_text(json.dumps(body, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
