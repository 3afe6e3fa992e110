"""Fine-tune a trained CIFAR ResNet with halting units (ACT, SACT), in pieces, and measure what it
spends.

    python benchmarks/halting.py train --data DIR --per position --out out/sact32 [--depth 32]
        [--minutes 9]
    python benchmarks/halting.py figures --data DIR --out out/sact32
    python benchmarks/halting.py clock --data DIR --out out

DIR holds cifar10/ and weights/ (see benchmarks/README.md). `train` begins with the pretrained
weights, or goes on where it stopped: call it again until it says that it is done. Batches are
shifted by up to 4 pixels and flipped; the seed and the number of the step alone decide how.
`figures` runs test rows 5,000 to 9,999, which trained nothing: accuracy, the share of multiply-adds
at active positions as the paper counts them (dilated by one position before a second 3x3
convolution) and their spread over images; and what the plain network does on the same rows. `clock`
times an ACT model under the Runner, with untrained scores and thresholds set by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d

import offramp as off
from offramp.contracts import Seen
from offramp.layers.adaptive_depth import depths, stages_of
from offramp.models import cifar_resnet
from offramp.recipes.pondered import priced

STAGES = ["layer1", "layer2", "layer3"]
BATCH = 64
README = {"model": "ResNet-32, SACT, tau 0.01, from scratch", "ratio": 0.60, "accuracy": 0.9182}


def plain(data: Path, depth: int) -> nn.Module:
    """The pretrained network."""
    model: nn.Module = getattr(cifar_resnet, f"resnet{depth}")()
    model.load_state_dict(
        load_file(data / "weights" / f"cifar10_resnet{depth}.safetensors"), strict=False
    )
    return model.eval()


def images(data: Path, rows: str) -> tuple[Tensor, Tensor]:
    """Images, normalised, and labels."""
    source = off.rows(rows.format(data / "cifar10"))
    # decodes all PNGs, for half a minute where there are 50,000
    taken = source.take(np.arange(len(source)))
    preprocess = cifar_resnet.preprocess()
    with torch.no_grad():
        return preprocess(torch.as_tensor(taken.x)), torch.as_tensor(taken.y)


def augmented(x: Tensor, draw: torch.Generator) -> Tensor:
    """Shifted by up to four pixels and flipped: [B, 3, 32, 32]."""
    padded = nn.functional.pad(x, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (len(x), 2), generator=draw).tolist()
    flips = (torch.rand(len(x), generator=draw) < 0.5).tolist()
    found = torch.empty_like(x)
    for row, ((down, across), flip) in enumerate(zip(shifts, flips, strict=True)):
        one = padded[row, :, down : down + 32, across : across + 32]
        found[row] = one.flip(2) if flip else one
    return found


def train(args: argparse.Namespace) -> None:
    """A piece of the fine-tuning."""
    torch.manual_seed(args.seed)
    model = off.halting(plain(args.data, args.depth), STAGES, per=args.per, bias=args.bias)
    model.train()
    scores = [value for stage in stages_of(model).values() for value in stage.halts.parameters()]
    known = {id(value) for value in scores}
    rest = [value for value in model.parameters() if id(value) not in known]
    groups = [{"params": rest, "lr": args.rate}, {"params": scores, "lr": args.rate * args.faster}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)
    step = 0
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "state.pt"
    if file.exists():
        kept = torch.load(file, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step = kept["step"]
    x, y = images(args.data, args.train)
    begun = time.perf_counter()
    rates = [args.rate, args.rate * args.faster]
    while step < args.steps and time.perf_counter() - begun < 60 * args.minutes:
        draw = torch.Generator().manual_seed(1_000_003 * args.seed + step)
        rows = torch.randint(0, len(x), (BATCH,), generator=draw)
        left = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * left
        tau = args.tau * min(1.0, step / max(1, args.ramp))
        with priced(model, tau):
            loss = cross_entropy(model(augmented(x[rows], draw)), y[rows])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(
                f"step {step} of {args.steps}: loss {loss.item():.3f}, "
                f"{time.perf_counter() - begun:.0f} s",
                flush=True,
            )
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, file
    )
    print("done" if step >= args.steps else "call again", flush=True)
    if step >= args.steps:
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()},
            args.out / "model.safetensors",
        )
        told = {
            name: getattr(args, name)
            for name in ("depth", "per", "tau", "steps", "rate", "faster", "bias", "seed")
        }
        told["batch"] = BATCH
        (args.out / "settings.json").write_text(json.dumps(told))


def spent(model: nn.Module, costs: dict[str, Tensor]) -> Tensor:
    """Multiply-adds of the units' convolutions [B], at active positions as the paper counts them;
    stem and head too.
    """
    rows = len(next(iter(costs.values())))
    macs = torch.full((rows,), float(3 * 16 * 9 * 32 * 32 + 64 * 10))
    for name, stage in stages_of(model).items():
        cost = costs[name]
        side = 32 // 2 ** STAGES.index(name)
        if stage.per == "sample":
            cost = cost.expand(-1, 1, side, side)
        units = cost.ceil() - 1  # N of each position
        for number, unit in enumerate(stage.units):
            active = (units > number).float()
            if stage.per == "position":
                wide = max_pool2d(active, 3, stride=1, padding=1)
            else:
                wide = active
            for conv, mask in ((unit.conv1, wide), (unit.conv2, active)):
                macs = macs + mask.sum((1, 2, 3)) * conv.weight.numel()
            if number < len(stage.halts):
                here = active.sum((1, 2, 3))
                for part in stage.halts[number].modules():
                    if isinstance(part, nn.Conv2d):  # the one on means runs once an image
                        if part.kernel_size == (3, 3):
                            times = here
                        else:
                            times = (here > 0).float()
                        macs = macs + times * part.weight.numel()
    return macs


def figures(args: argparse.Namespace) -> None:
    """Accuracy and cost on rows that trained nothing."""
    told = json.loads((args.out / "settings.json").read_text())
    bare = plain(args.data, told["depth"])
    model = off.halting(bare, STAGES, per=told["per"])
    model.load_state_dict(load_file(args.out / "model.safetensors"))
    x, y = images(args.data, args.rows)
    right = list[Tensor]()
    plainly = list[Tensor]()
    macs = list[Tensor]()
    units = dict[str, list[float]]()
    with torch.inference_mode():
        for start in range(0, len(x), 250):
            part = x[start : start + 250]
            labels = y[start : start + 250]
            right.append(model(part).argmax(1) == labels)
            plainly.append(bare(part).argmax(1) == labels)
            costs = depths(model, part)
            macs.append(spent(model, costs))
            for name, cost in costs.items():
                units.setdefault(name, []).append(float((cost.ceil() - 1).mean()))
    whole = dense_macs(told["depth"])
    share = torch.cat(macs) / whole
    found: dict[str, Any] = {
        "settings": told,
        "rows": len(x),
        "accuracy": float(torch.cat(right).float().mean()),
        "plain accuracy": float(torch.cat(plainly).float().mean()),
        "MACs of the plain network": whole,
        "share of its MACs": float(share.mean()),
        "spread over images": float(share.std()),
        "units": {name: float(np.mean(each)) for name, each in units.items()},
        "beside": README,
    }
    print(json.dumps(found, indent=1))
    (args.out / "figures.json").write_text(json.dumps(found, indent=1))


def clock(args: argparse.Namespace) -> None:
    """Processor time of an ACT model under the Runner over that of the plain network, batch 64."""
    bare = plain(args.data, args.depth)
    torch.manual_seed(args.seed)
    model = off.halting(bare, STAGES, per="sample", bias=args.bias)
    x, _ = images(args.data, args.rows)
    x = x[:64]
    net = off.unrolled(model, x[:2])
    gates = net.topology.gates
    firsts = [f"{name}-0" for name in STAGES]
    plans = {"nobody leaves": off.Plan.by_hand(dict.fromkeys(gates, math.inf))}
    plans["all leave after the first unit"] = off.Plan.by_hand(dict.fromkeys(gates, -1.0))
    # at the first unit of each stage half of the rows leave, others go through all of it
    halves = dict[str, float]()
    for name in firsts:
        seen = list[Tensor]()
        # before `open`, because a Runner notices new hooks
        hook = net.backbone[name].register_forward_hook(
            lambda _m, _x, out, seen=seen: seen.append(out)
        )
        off.open(net, off.Plan.by_hand(halves | {name: -1.0}))(x)
        hook.remove()
        halves[name] = float(net.gate_of(name).score(Seen(seen[-1], {})).median())
    plans["half leave after the first unit"] = off.Plan.by_hand(halves)
    calls: dict[str, Any] = {name: off.open(net, plan) for name, plan in plans.items()}
    # a bias of -3: all units
    calls["nobody leaves, the model itself"] = off.halting(bare, STAGES, per="sample")
    calls["nobody leaves, the model itself, positions"] = off.halting(bare, STAGES)
    with torch.inference_mode():
        times = dict[str, list[float]]()
        for turn in range(args.repeats + 1):
            for name, call in {"plain": bare, "plain again": bare, **calls}.items():
                begun = time.process_time()
                call(x)
                if turn:
                    times.setdefault(name, []).append(time.process_time() - begun)
    medians = {name: float(np.median(each)) for name, each in times.items()}
    print(
        json.dumps({name: median / medians["plain"] for name, median in medians.items()}, indent=1)
    )


def dense_macs(depth: int) -> float:
    """Of the plain network."""
    blocks = (depth - 2) // 6
    total = 3 * 16 * 9 * 32 * 32 + 64 * 10
    before = 16
    for number, width in enumerate((16, 32, 64)):
        positions = (32 // 2**number) ** 2
        total += positions * 9 * width * (before + (2 * blocks - 1) * width)
        before = width
    return float(total)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "figures", "clock"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--per", choices=("position", "sample"), default="position")
    parser.add_argument(
        "--tau",
        type=float,
        default=0.01,
        help="the price of a unit (0.01, as in the authors' README)",
    )
    parser.add_argument(
        "--bias", type=float, default=-1.0, help="of the scores at the start; the paper's is -3"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--ramp", type=int, default=50, help="steps over which the price rises to tau"
    )
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument(
        "--faster", type=float, default=10.0, help="times the rate for the halting scores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7, help="of the clock")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this piece")
    parser.add_argument(
        "--train",
        default="cifar10/train:{}",
        help="the rows that train; an npz of them opens sooner",
    )
    parser.add_argument("--rows", default="cifar10/test:{}[5000:10000]", help="for figures")
    args = parser.parse_args()
    {"train": train, "figures": figures, "clock": clock}[args.what](args)


if __name__ == "__main__":
    main()
