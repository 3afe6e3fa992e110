"""A cut LeNet on MNIST-shaped rows in both memory formats: MACs, CPU time and wall-clock beside the
plain network.

    python benchmarks/memory_format.py [--repeats 15]

Rows come as NumPy gives them (`pixels[:, None]`, whose free stride torch takes for channels last),
as contiguous tensors, and as tensors that are channels last. All calls of a format are interleaved;
A/A is the plain network beside itself. One thread. The weights are random: what is timed does not
depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

import offramp as off

BATCH = 64


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall-clock and CPU milliseconds of each call, interleaved."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            call()
            if turn >= 2:  # the first two warm up
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: tuple(1e3 * np.median(np.array(each), axis=0)) for name, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = off.make_model("offramp:lenet").eval()
    pixels = np.random.default_rng(0).random((BATCH, 28, 28), dtype=np.float32)
    formats = {
        "NumPy, one channel": pixels[:, None],
        "contiguous": torch.tensor(pixels)[:, None].contiguous(),
        "channels last": torch.empty_strided((BATCH, 1, 28, 28), (784, 1, 28, 1)).copy_(
            torch.tensor(pixels)[:, None]
        ),
    }
    first = next(
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)
    )
    net = off.cut(model, formats["contiguous"][:8], at=[first])
    leaves = off.open(net, off.Plan.by_hand({first: -1e9}))
    print(f"B-LeNet cut after {first}, all {BATCH} rows leave there; medians of {args.repeats}")
    print(
        f"{'format':<20} {'run / plain, wall':>18} {'CPU':>6} {'A/A':>6} {'run ms':>8} "
        f"{'plain ms':>9}"
    )
    for name, rows in formats.items():
        x = torch.as_tensor(rows)

        def plain(x: torch.Tensor = x) -> object:
            with torch.inference_mode():
                return model(x)

        def run(rows: object = rows) -> object:
            return leaves(rows)

        found = medians({"run": run, "plain": plain, "again": plain}, args.repeats)
        wall = found["run"][0] / found["plain"][0]
        cpu = found["run"][1] / found["plain"][1]
        same = found["again"][0] / found["plain"][0]
        print(
            f"{name:<20} {wall:>18.2f} {cpu:>6.2f} {same:>6.2f} {found['run'][0]:>8.3f} "
            f"{found['plain'][0]:>9.3f}"
        )


if __name__ == "__main__":
    main()
