"""Choosing a resolution, and halting by position, on a device: DRNet with a ResNet-50 at 112, 168
and 224 pixels, and SACT on the stages of a ResNet-101 at 224.

    python benchmarks/paths_on_devices.py [--device cuda] [--case drnet] [--case sact]
        [--batch 1 16 64] [--repeats 15] [--json FILE]

Seeded weights and rows: time does not depend on what a network knows.

drnet: thresholds send none, half or all of the rows to the smaller sizes. Each line has the run,
the bare segments at the sizes that ran (the prediction) and the plain network at 224 pixels,
interleaved, and the plain network twice.
sact: one residual unit with its halting score and its sums on tiles drawn at random, over the same
unit on the whole map, at densities of 0.2 to 1.0. `same` is the dense unit over itself. A
ResNet-101 has 3, 4 and 23 such units; the maps of its last stage are too small for tiles.

FILE is written after every line, and what it has is not measured again: stop with Ctrl-C, and call
it again to go on. A short run on a CPU:

    python benchmarks/paths_on_devices.py --device cpu --batch 1 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import offramp as off

# Internal: the stage whose two ways of running are compared.
from offramp.layers.adaptive_depth import AdaptiveDepth
from offramp.models.cifar_bottleneck import Bottleneck
from offramp.models.resnet50 import resnet50

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import bench

SIZES = (112, 168, 224)
SHARES = {"none": 0.0, "half": 0.5, "all": 1.0}  # of the rows that take a smaller size
DENSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
# By stage of the ResNet-101: input channels, inner channels, side of the map, side of a tile, units
STAGES = {
    "stage 1: 256 x 56 x 56": (256, 64, 56, 8, 3),
    "stage 2: 512 x 28 x 28": (512, 128, 28, 7, 4),
    "stage 3: 1024 x 14 x 14": (1024, 256, 14, 7, 23),
}


class Results:
    """What was measured so far, kept in a file.

    Args:
        path: a JSON file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines = dict[str, Any]()
        if path is not None and path.exists():
            self.lines = json.loads(path.read_text(encoding="utf-8"))

    def keep(self, name: str, line: dict[str, Any]) -> None:
        """Print a line, and write it to the file."""
        self.lines[name] = line
        print(name, " ".join(f"{key} {value}" for key, value in line.items()), flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.lines, indent=1), encoding="utf-8")


def resolutions(device: str) -> off.Network:
    """A ResNet-50 with one set of batch norms for each size."""
    torch.manual_seed(0)
    example = torch.randn(2, 3, SIZES[-1], SIZES[-1])
    network = off.resolutions(resnet50().eval(), example, SIZES)
    return network.to(device)


def plan_of(network: off.Network, rows: torch.Tensor, share: float) -> off.Plan:
    """The plan that sends a share of these rows to smaller sizes, half of it to each."""
    (gate,) = network.topology.gates
    trace = off.record(network, rows, timed=False, progress=False)
    thresholds = list[float]()
    for column in network.topology.score_columns(gate):
        scores = trace.columns[column]
        if share == 0:
            thresholds.append(float("inf"))
        elif share == 1:
            thresholds.append(float("-inf"))
        else:
            thresholds.append(float(np.quantile(scores, 1 - share / 2)))
    return off.Plan.by_hand({gate: tuple(thresholds)})


def drnet(device: str, batches: list[int], repeats: int, results: Results) -> None:
    """The lines of DRNet."""
    network = resolutions(device)
    name = name_of(device)
    for batch in batches:
        shape = (batch, 3, SIZES[-1], SIZES[-1])
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        for word, share in SHARES.items():
            key = f"drnet, {name}, batch {batch}, {word} at fewer pixels"
            if key in results.lines:
                continue
            plan = plan_of(network, rows, share)
            (line,) = bench(network, plan, rows, batches=(batch,), repeats=repeats).lines
            results.keep(
                key,
                {
                    "left": "/".join(map(str, line.left)),
                    "run ms": round(line.run_ms, 3),
                    "plain ms": round(line.plain_ms, 3),
                    "over segments": str(line.over_parts),
                    "over plain": str(line.over_plain),
                    "same": str(line.same),
                },
            )


def sact(device: str, batches: list[int], repeats: int, results: Results) -> None:
    """The lines of SACT."""

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    name = name_of(device)
    for stage_name, (channels, inner, side, tile, units) in STAGES.items():
        torch.manual_seed(0)
        unit = Bottleneck(channels, inner, 1).eval()
        other = Bottleneck(channels, inner, 1).eval()
        stage = AdaptiveDepth([nn.Identity(), unit, other], channels, dims=2, tile=tile)
        stage = stage.eval().to(device)
        for batch in batches:
            key = f"sact, {name}, {stage_name}, {units} units, tiles of {tile}, batch {batch}"
            if key in results.lines:
                continue
            line = dict[str, Any]()
            with torch.inference_mode():
                state = torch.randn(batch, channels, side, side, device=device)
                for density in DENSITIES:
                    over = stage.sparse_over_dense(state, density, repeats=repeats, clock=clock)
                    line[f"{density:g}"] = round(over, 3)
                same = stage.sparse_over_dense(state, 1.0, repeats=repeats, same=True, clock=clock)
            line["same"] = round(same, 3)
            results.keep(key, line)


def name_of(device: str) -> str:
    """The card, or the device itself."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


CASES = {"drnet": drnet, "sact": sact}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = Results(args.json)
    for name in args.case or CASES:
        CASES[name](args.device, args.batch, args.repeats, results)


if __name__ == "__main__":
    main()
