"""What skipping is worth on a device: ResNet-50 and ViT-B/16 at 224 px and ResNet-56 at 32, at
batch 1, 16 and 256.

    python benchmarks/devices.py [--device cuda] [--engine torch ...] [--model resnet50 ...]
        [--json FILE]

Seeded weights and rows: time does not depend on what a network knows. Each model is cut into three,
and thresholds let none, half of the rows at each gate, or all leave. Every line has run beside the
bare segments (the prediction) and beside the plain network, interleaved, and the plain network
twice. On a GPU it is also counted how often a batch waits for the device: once per gate and once
for the answers is what the runner promises, whatever is carried on. `from host` is the same batch
handed over in pinned memory, beside the one that lies on the device. ResNet-50 and ViT-B/16 need
timm (`pip install -e '.[hub]'`). A short run on a CPU:

    python benchmarks/devices.py --device cpu --engine torch --model resnet56 --batch 1 16
        --repeats 3
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

import offramp as off
from offramp.errors import BadNetwork, InvalidArgument

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import bench

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import interleaved, ratio

MODELS = {
    "resnet50": ("timm:resnet50", 224),
    "vit_b16": ("timm:vit_base_patch16_224", 224),
    "resnet56": ("offramp:resnet56", 32),
}
ENGINES = {
    "cuda": (
        "torch",
        "torch:bf16,channels_last",
        "torch:cuda_graphs",
        "torch:cuda_graphs,bf16,channels_last",
    ),
    "cpu": ("torch", "torch:bf16,channels_last"),
}
LEAVING = {
    "none": None,
    "half": 0.5,
    "all": 0.0,
}  # the share of scores below the threshold of every gate


def network_of(name: str, device: str) -> off.Network:
    """A model with seeded weights, cut into three."""
    torch.manual_seed(0)
    spec, pixels = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that nobody has trained
        model = off.make_model(spec, fetch=False)
        return off.cut(model, torch.randn(2, 3, pixels, pixels), parts=3, exits="linear").to(device)


def plan_of(network: off.Network, rows: torch.Tensor, below: float | None) -> off.Plan:
    """Thresholds at a quantile of the scores of these rows."""
    if below is None:
        return off.Plan.by_hand(dict.fromkeys(network.topology.gates, 1e30))
    with torch.inference_mode():
        scores = {name: score for name, _, score in network.walk(rows) if score is not None}
    return off.Plan.by_hand(
        {name: float(score.float().quantile(below)) for name, score in scores.items()}
    )


def waits(runner: Any, rows: torch.Tensor) -> int | None:
    """How often a batch waits for a GPU; None elsewhere."""
    if not rows.is_cuda:
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            runner(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)


def measured(
    network: off.Network, rows: torch.Tensor, engine: str, repeats: int
) -> list[dict[str, object]]:
    """The lines of one batch on one engine."""
    found: list[dict[str, object]] = []
    for leaving, below in LEAVING.items():
        plan = plan_of(network, rows, below)
        runner = off.open(network, plan, engine=engine, example=rows)
        line = bench(
            network, plan, rows, batches=(len(rows),), repeats=repeats, engine=engine
        ).lines[0]
        count = waits(runner, rows)
        ratios = f"over parts {line.over_parts}  over plain {line.over_plain}  same {line.same}"
        left = "/".join(map(str, line.left))
        print(
            f"{len(rows):>5}  {leaving:<5} {left:<12} {line.run_ms:8.2f} ms  {ratios}  waits "
            f"{count}",
            flush=True,
        )
        found.append({"leaving": leaving, "waits": count, **vars(line), **_ratios(line)})
    if rows.is_cuda:
        found.append(from_host(runner, rows, repeats))
    return found


def from_host(runner: Any, rows: torch.Tensor, repeats: int) -> dict[str, object]:
    """The last plan on a batch that lies in the host's pinned memory, over one that lies on the
    device.
    """
    pinned = rows.cpu().pin_memory()
    times = interleaved(
        {"host": lambda: runner(pinned), "device": lambda: runner(rows)}, repeats=repeats, warmup=2
    )
    over = ratio(times["host"], times["device"])
    print(f"{len(rows):>5}  from host, over device {over}", flush=True)
    return {"leaving": "from host", "over_device": vars(over)}


def _ratios(line: Any) -> dict[str, object]:
    return {name: vars(getattr(line, name)) for name in ("over_parts", "over_plain", "same")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engine", nargs="+", metavar="ENGINE")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, object] = {"device": args.device, "torch": torch.__version__}
    for name in args.model:
        network = network_of(name, args.device)
        pixels = MODELS[name][1]
        for engine in args.engine or ENGINES.get(args.device.partition(":")[0], ENGINES["cpu"]):
            print(f"\n{name} on {args.device}, {engine}")
            for batch in args.batch:
                rows = torch.randn(
                    batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)
                ).to(args.device)
                try:
                    results[f"{name} {engine} {batch}"] = measured(
                        network, rows, engine, args.repeats
                    )
                except (InvalidArgument, BadNetwork) as problem:
                    print(f"{batch:>5}  refused: {problem}", flush=True)
                    results[f"{name} {engine} {batch}"] = str(problem)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
