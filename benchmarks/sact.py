"""Sparse against dense units of spatially adaptive computation (SACT): where tiles pay on this
machine.

    python benchmarks/sact.py [--repeats 7] [--only ResNet-32] [--cpu-time] [--json FILE]

One residual unit with its halting score and its sums, on tiles drawn at random at densities of 0.2
to 1.0, over the same on the whole map: a ratio of medians of calls that take turns. `same` is the
dense call over itself, which tells how noisy the clock is. Stages are those of CIFAR ResNets (batch
64) and of ResNet-50 at 224 pixels (batch 8). The break-even is the largest density up to which
tiles were quicker; `AdaptiveDepth.tuned` sets it so for a stage. Real ponder maps put the active
positions of an image together; if they were spread at random, nearly every tile would be active.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from offramp.layers.adaptive_depth import AdaptiveDepth
from offramp.layers.residual import Block
from offramp.models.cifar_bottleneck import Bottleneck

DENSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
STAGES: dict[str, tuple[Any, int, int, int]] = {
    "ResNet-32, stage 1: 16 x 32 x 32": (lambda: Block(16, 16), 16, 32, 64),
    "ResNet-32, stage 2: 32 x 16 x 16": (lambda: Block(32, 32), 32, 16, 64),
    "ResNet-32, stage 3: 64 x 8 x 8": (lambda: Block(64, 64), 64, 8, 64),
    "ResNet-50, stage 1: 256 x 56 x 56": (lambda: Bottleneck(256, 64, 1), 256, 56, 8),
    "ResNet-50, stage 2: 512 x 28 x 28": (lambda: Bottleneck(512, 128, 1), 512, 28, 8),
    "ResNet-50, stage 3: 1024 x 14 x 14": (lambda: Bottleneck(1024, 256, 1), 1024, 14, 8),
}
TILES = (4, 7, 8, 14)


def measured(
    name: str, tile: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any] | None:
    """Ratios of a stage at all densities; None where no two whole tiles fit side by side."""
    unit, channels, side, batch = STAGES[name]
    if side % tile or side < 2 * tile:
        return None
    torch.manual_seed(0)
    stage = AdaptiveDepth(
        [nn.Identity(), unit().eval(), unit().eval()], channels, dims=2, tile=tile
    ).eval()
    with torch.inference_mode():
        state = torch.randn(batch, channels, side, side)
        ratios = {
            density: stage.sparse_over_dense(state, density, repeats=repeats, clock=clock)
            for density in DENSITIES
        }
        same = stage.sparse_over_dense(state, 1.0, repeats=repeats, same=True, clock=clock)
    paying = 0.0
    for density, ratio in ratios.items():
        if ratio >= 1:
            break
        paying = density
    return {"ratios": ratios, "same": same, "break-even": paying}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="stages with this in their name")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, on a machine that others use too"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = Table("stage", "tile", *(f"{density:g}" for density in DENSITIES), "same", "break-even")
    results = dict[str, Any]()
    for name in [name for name in STAGES if args.only in name]:
        for tile in TILES:
            found = measured(
                name, tile, args.repeats, time.process_time if args.cpu_time else time.perf_counter
            )
            if found is None:
                continue
            results[f"{name}, tile {tile}"] = found
            cells = [f"{ratio:.2f}" for ratio in found["ratios"].values()]
            table.add_row(
                name, str(tile), *cells, f"{found['same']:.2f}", f"{found['break-even']:g}"
            )
            print(name, tile, cells, flush=True)
    Console(width=120).print(table)
    if args.json:
        args.json.write_text(json.dumps(results | {"threads": torch.get_num_threads()}, indent=1))


if __name__ == "__main__":
    main()
