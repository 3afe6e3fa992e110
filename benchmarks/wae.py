"""WAE on CIFAR-10 from the public ResNet-56, beside its controls and plain down-sampling; shapes of
ImageNet timed.

    python benchmarks/wae.py train --data DIR [--cache out] [--only wae] [--seed 0]
        [--epochs 1 2 1] [--rate 0.02] [--joint-rate 0.02] [--rows N]
    python benchmarks/wae.py show --data DIR [--cache out] [--seed 0] [--json FILE]
    python benchmarks/wae.py times [--shapes VGG-16 ...] [--batch 1 16] [--repeats 7] [--json FILE]

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). `train` trains each variant on the 50,000
training rows, from the same weights and for the same epochs: E1 of the auto-encoder, E2 of the
classifier, E3 of both. A rate of 0.05 undoes what the public weights know. It stops after Ctrl-C
and goes on when it is called again. `show` records the test rows: 1,000-4,999 calibrate,
5,000-9,999 give the figures, which no choice here has seen.
`times` takes VGG-16 and ResNet-50 at 224 pixels with random weights, beside the ratios of the paper
(VGG-16 3.13 on a CPU, ResNet-50 1.88), a VGG of 64 pixels and ResNet-56.

    wae            encoder, thin copy, heads A and F
    wavelet        the same with the fixed 9/7 transform (the paper's Wavelet + CNN)
    decomposition  the same without reconstruction and energy (the paper's Decomposition + CNN)
    down           ResNet-56 on the mean over 2x2 pixels
    down18         ResNet-56 on 18x18 pixels, about the cost of wae
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import offramp as off
from offramp.contracts import Phase, Recipe, TrainingBatch, TrainingOutputs
from offramp.models.resnet50 import resnet50
from offramp.models.wae import Wae, wae_resnet50, wae_vgg16

# Internal: a network of one node, for models that have no exits.
from offramp.networks.members import BACKBONE, ModelSpec

# Internal: the plain network itself.
from offramp.networks.network import plain_network
from offramp.recipes.wae import WaveletLike

# Internal: times taken in turn, as in our own figures, and multiply-adds.
from offramp.runtime.measuring import interleaved, macs, ratio

SPEC = "offramp:resnet56"
VARIANTS = ("wae", "down", "down18", "wavelet", "decomposition")
SHAPES = ("VGG-16", "ResNet-50", "VGG, 64 pixels", "ResNet-56")
CALIBRATION, FIGURES = (
    slice(0, 4000),
    slice(4000, 9000),
)  # of the rows that are recorded, which begin at 1,000
PAPER = {"VGG-16": 3.13, "ResNet-50": 1.88}  # speed-ups on a CPU


class Resized(nn.Module):
    """A model behind a resize to fewer pixels: what WAE is to beat."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model = model
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the smaller images."""
        if 2 * self.side == x.shape[-1]:
            x = nn.functional.avg_pool2d(x, 2)
        else:
            x = nn.functional.interpolate(
                x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False
            )
        logits: Tensor = self.model(x)
        return logits


class HeadA(nn.Module):
    """A WAE as far as its head A: what rows cost that leave there."""

    def __init__(self, model: Wae) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits of head A."""
        low, _ = self.model.transform(x)
        logits: Tensor = self.model.head_low(self.model.low(self.model.low_norm(low)))
        return logits


class Plain(Recipe):
    """A model's last answer by cross-entropy, in the two stages of `wae` that train the
    classifier.
    """

    def __init__(self, classes: int, joint: int, rate: float, joint_rate: float) -> None:
        self.classes = classes
        self.joint = joint
        self.rate = rate
        self.joint_rate = joint_rate

    def phases(self, network: off.Network) -> list[Phase]:
        """SGD at both rates of `wae`, with its schedule."""
        like = WaveletLike()
        parameters = tuple(network.backbone.parameters())
        found = []
        for name, epochs, rate in (
            ("classes", self.classes, self.rate),
            ("joint", self.joint, self.joint_rate),
        ):
            sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=like.decay)
            if epochs:
                found.append(Phase(name, parameters, epochs, sgd, falling))
        return found

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Tensor:
        """Cross-entropy of the last exit."""
        return cross_entropy(outputs.logits[outputs.network.topology.exits[-1]], batch.labels())


def falling(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Tenfold at 1/2 and 3/4, as `wae` has it."""
    marks = [max(1, steps // 2), max(2, 3 * steps // 4)]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, marks)


def variant(name: str, args: argparse.Namespace) -> tuple[off.Network, Recipe]:
    """The network of one variant, not yet trained, and its recipe."""
    images, classes, joint = args.epochs
    model = off.make_model(SPEC, args.data / "weights" / "cifar10_resnet56.safetensors")
    preprocess = off.make_preprocess(SPEC)
    example = np.zeros((4, 3, 32, 32), np.uint8)
    if name.startswith("down"):
        side = 18 if name == "down18" else 16
        small = Resized(model, side).eval()
        recipe = Plain(classes, joint, args.rate, args.joint_rate)
        return plain_network(small, ModelSpec(BACKBONE), preprocess), recipe
    transform = "wavelet" if name == "wavelet" else "encoder"
    half = off.wae(model, torch.zeros(2, 3, 32, 32), transform=transform)
    net = off.cut(half, example, at=half.cuts, exits="own", preprocess=preprocess)
    if name == "decomposition":
        together = WaveletLike(
            images=0, classes=0, joint=classes + joint, gamma=0.0, joint_rate=args.rate
        )
        return net, together
    recipe = WaveletLike(
        images=images,
        classes=classes,
        joint=joint,
        rate=args.rate,
        joint_rate=args.joint_rate,
        anchor=1.0,
    )
    return net, recipe


def place_of(name: str, args: argparse.Namespace) -> Path:
    """Where a trained variant is kept."""
    epochs = "-".join(map(str, args.epochs))
    rates = f"{args.rate:g}-{args.joint_rate:g}"
    cache: Path = args.cache
    return cache / f"wae-{name}-{args.rows}-{epochs}-{rates}-seed{args.seed}"


def train(args: argparse.Namespace) -> None:
    """Train the variants that are not there yet, and go on with one that was stopped."""
    for name in args.only or VARIANTS:
        path = place_of(name, args)
        done = path / "done.pt"
        if done.exists():
            continue
        torch.manual_seed(args.seed)
        net, recipe = variant(name, args)
        for value in net.parameters():
            if value.dim() == 4:  # a fifth faster on a CPU
                value.data = value.data.to(memory_format=torch.channels_last)
        rows = off.rows(f"cifar10/train:{args.data / 'cifar10'}").select(slice(0, args.rows))
        history = off.fit(
            net,
            rows,
            recipe=recipe,
            batch_size=128,
            seed=args.seed,
            augment="crop_flip",
            folder=path,
            resume=(path / "checkpoint").exists(),
        )
        (path / "history.json").write_text(json.dumps([vars(epoch) for epoch in history.epochs]))
        torch.save(net.state_dict(), done)
        print(f"{name}\n{history}", flush=True)


def trace_of(name: str, args: argparse.Namespace) -> tuple[off.Network, off.Trace] | None:
    """A trained variant and its trace on test rows 1,000-9,999; None for one that is not
    trained.
    """
    path = place_of(name, args)
    if not (path / "done.pt").exists():
        return None
    net, _ = variant(name, args)
    net.load_state_dict(torch.load(path / "done.pt", weights_only=True))
    file = path / "trace.npz"
    if not file.exists():
        rows = f"cifar10:{args.data / 'cifar10'}[1000:10000]"
        off.record(net.eval(), rows, timed=False).save(file)
    return net, off.Trace.load(file)


def show(args: argparse.Namespace) -> None:
    """Accuracies, costs and times of what has been trained, and the lazy high branch."""
    torch.set_num_threads(1)
    preprocess = off.make_preprocess(SPEC)
    assert preprocess is not None
    rows = off.rows(f"cifar10:{args.data / 'cifar10'}").take(np.arange(5000, 5064)).x
    raw = torch.as_tensor(np.asarray(rows))
    x = preprocess(raw)
    plain = off.make_model(SPEC, args.data / "weights" / "cifar10_resnet56.safetensors")
    whole = plain_network(plain, ModelSpec(BACKBONE), preprocess)
    file = args.cache / "wae-resnet56.npz"
    if not file.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        off.record(whole, f"cifar10:{args.data / 'cifar10'}[1000:10000]", timed=False).save(file)
    results: dict[str, Any] = {"resnet56": accuracies(off.Trace.load(file))}
    calls: dict[str, Callable[[], object]] = {"resnet56": lambda: plain(x)}
    results["resnet56"]["macs"] = macs(lambda: plain(x)) / len(x)
    for name in VARIANTS:
        known = trace_of(name, args)
        if known is None:
            continue
        net, trace = known
        model = net.backbone
        calls[name] = partial(model, x)
        results[name] = accuracies(trace) | {"macs": macs(partial(model, x)) / len(x)}
        if not name.startswith("down"):
            results[name]["lazy"] = lazy(net, trace, raw, args.repeats)
    with torch.inference_mode():
        taken = interleaved(calls, repeats=args.repeats, warmup=2, clock=time.process_time)
    table = Table("variant", "M MACs", "accuracy, sum", "head A", "times faster than resnet56")
    for name, row in results.items():
        row["speed_up"] = vars(ratio(taken["resnet56"], taken[name]))
        low = f"{row['head_low']:.2%}" if "head_low" in row else ""
        speed = str(ratio(taken["resnet56"], taken[name]))
        table.add_row(name, f"{row['macs'] / 1e6:.1f}", f"{row['backbone']:.2%}", low, speed)
    console = Console()
    console.print(table)
    for name, row in results.items():
        if "lazy" in row:
            console.print(f"{name}, lazy: {row['lazy']}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def accuracies(trace: off.Trace) -> dict[str, Any]:
    """Of every exit on test rows 5,000-9,999."""
    label = trace.columns["label"][FIGURES]
    found: dict[str, Any] = {}
    for name in trace.topology.exits:
        answer = trace.columns[f"answer/{name}"][FIGURES]
        found[name] = float((answer == label).mean())
    return found


def lazy(net: off.Network, trace: off.Trace, raw: Tensor, repeats: int) -> dict[str, Any]:
    """A certified plan with the high branch where head A is not sure, and what it saves."""
    plan = off.calibrate(trace[CALIBRATION], risk="accuracy_gap", at_most=0.005)
    figures = trace[FIGURES].evaluate(plan)
    whole = off.Plan.never_leave(net.topology)
    engine = off.open(net, plan)
    always = off.open(net, whole)
    calls = {"lazy": partial(engine, raw), "always": partial(always, raw)}
    taken = interleaved(calls, repeats=repeats, warmup=2, clock=time.process_time)
    left = trace[FIGURES].replay(plan).exit == 0
    faster = ratio(taken["always"], taken["lazy"])
    return {
        "accuracy": figures.accuracy,
        "left_at_head_a": float(left.mean()),
        "left_in_timed_batch": int((engine(raw).exit == 0).sum()),
        "faster_than_always": str(faster),
        "plan": str(plan),
    }


def vgg_plain(features: nn.Module, side: int) -> nn.Module:
    """VGG-16 with its 4,096 wide layers on maps of a side."""
    return nn.Sequential(
        features,
        nn.Flatten(),
        nn.Linear(512 * side * side, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 1000),
    ).eval()


def shapes_of(names: list[str]) -> dict[str, tuple[int, nn.Module, Wae, nn.Module]]:
    """By name: pixels of a side, the model, its WAE, and the model on half the pixels; with random
    weights.
    """
    found: dict[str, tuple[int, nn.Module, Wae, nn.Module]] = {}
    if "VGG-16" in names:
        half = wae_vgg16().eval()
        found["VGG-16"] = (224, vgg_plain(half.low, 7), half, Resized(vgg_plain(half.low, 4), 112))
    if "ResNet-50" in names:
        model = resnet50().eval()
        found["ResNet-50"] = (224, model, wae_resnet50().eval(), Resized(model, 112))
    if "VGG, 64 pixels" in names:
        body = wae_vgg16().low
        vgg = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
        found["VGG, 64 pixels"] = (64, vgg, off.wae(vgg, size=64), Resized(vgg, 32))
    if "ResNet-56" in names:
        small = off.make_model(SPEC)
        found["ResNet-56"] = (32, small, off.wae(small, size=32), Resized(small, 16))
    return found


def times(args: argparse.Namespace) -> None:
    """The model, its WAE, as far as head A, and half the pixels, in turn."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    table = Table("shape", "batch", "variant", "G MACs", "ms a row", "times faster", "paper, CPU")
    for name, (side, plain, half, fewer) in shapes_of(args.shapes).items():
        models = {"plain": plain, "wae": half, "wae, head A": HeadA(half), "half": fewer}
        for batch in args.batch:
            x = torch.rand(batch, 3, side, side)
            calls = {key: partial(model, x) for key, model in models.items()}
            with torch.inference_mode():
                taken = interleaved(calls, repeats=args.repeats, warmup=1, clock=time.process_time)
            for key, call in calls.items():
                cost = macs(call) / batch / 1e9
                each = float(np.median(taken[key])) / batch
                faster = ratio(taken["plain"], taken[key])
                paper = f"{PAPER[name]:.2f}" if key == "wae" and name in PAPER else ""
                row = (name, str(batch), key, f"{cost:.3f}", f"{each:.2f}", str(faster), paper)
                table.add_row(*row)
                results["/".join(row[:3])] = {
                    "macs": cost,
                    "ms": each,
                    "faster": vars(faster),
                }
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "show", "times"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--only", nargs="+", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs=3, default=[1, 2, 1])
    parser.add_argument("--rate", type=float, default=0.02, help="of SGD, stage 2")
    parser.add_argument("--joint-rate", type=float, default=0.02, help="of SGD, stage 3")
    parser.add_argument(
        "--rows", type=int, default=50_000, help="training rows; fewer is a rougher, faster look"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        {"train": train, "show": show, "times": times}[args.what](args)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from here") from None


if __name__ == "__main__":
    main()
