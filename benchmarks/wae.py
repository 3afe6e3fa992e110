"""WAE on two real tasks, beside its controls and plain down-sampling; shapes of ImageNet timed.

    python benchmarks/wae.py train --data DIR [--case vgg64] [--cache out] [--only wae] [--seed 0]
        [--epochs 1 2 1] [--rate 0.02] [--joint-rate 0.02] [--soft 0] [--rows N]
    python benchmarks/wae.py show --data DIR [--case vgg64] [--cache out] [--seed 0] [--json FILE]
    python benchmarks/wae.py times [--shapes VGG-16 ...] [--batch 1 16] [--repeats 7] [--json FILE]

There are two cases:

    resnet56  CIFAR-10 and the public ResNet-56. DIR holds cifar10/ and weights/ (see
              benchmarks/fetch.py). Of the test rows, 1,000-4,999 calibrate and 5,000-9,999 give
              the figures, which no choice here has seen.
    vgg64     Imagenette at 64 pixels, and a VGG-16 of a quarter of the widths with batch norms,
              that `train` trains first, with `--plain-epochs`. DIR holds imagenette/ with train/
              and val/: git clone https://github.com/thunderInfy/imagenette DIR/imagenette. The
              validation rows are shuffled once; 1,800 calibrate, the other 2,125 give the figures.

`train` trains each variant on the same rows, from the same weights and for the same epochs: E1 of
the auto-encoder, E2 of the classifier, E3 of both. A rate of 0.05 undoes what the public weights
know. With `--soft`, a share of the loss comes from the plain model's logits. It stops after Ctrl-C
and goes on when it is called again.
`times` takes VGG-16 and ResNet-50 at 224 pixels with random weights, beside the ratios of the paper
(VGG-16 3.13 on a CPU, ResNet-50 1.88), a VGG of 64 pixels and ResNet-56.

    plain          the model itself; of `vgg64` only
    wae            encoder, thin copy, heads A and F
    wavelet        the same with the fixed 9/7 transform (the paper's Wavelet + CNN)
    decomposition  the same without reconstruction and energy (the paper's Decomposition + CNN)
    down           the plain model on the mean over 2x2 pixels
    down18, down36 the plain model on so many pixels of a side, at about the cost of wae
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from offramp.models.wae import PLAN, Wae, wae_resnet50, wae_vgg16

# Internal: a network of one node, for models that have no exits.
from offramp.networks.members import BACKBONE, ModelSpec

# Internal: the plain network itself.
from offramp.networks.network import plain_network

# Internal: distillation, as in the recipe `wae`.
from offramp.recipes._together import soft_cross_entropy, teacher_network
from offramp.recipes.wae import WaveletLike

# Internal: times taken in turn, as in our own figures, and multiply-adds.
from offramp.runtime.measuring import interleaved, macs, ratio

SPEC = "offramp:resnet56"
VARIANTS = ("plain", "wae", "down", "down18", "down36", "wavelet", "decomposition")
SHAPES = ("VGG-16", "ResNet-50", "VGG, 64 pixels", "ResNet-56")
TEMPERATURE = 4.0
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
    classifier, and as there with a share from another model's logits.
    """

    def __init__(
        self,
        classes: int,
        joint: int,
        rate: float,
        joint_rate: float,
        original: nn.Module | None,
        soft: float,
    ) -> None:
        self.classes = classes
        self.joint = joint
        self.rate = rate
        self.joint_rate = joint_rate
        self.original = original
        self.soft = soft

    def config(self) -> dict[str, Any]:
        """The numbers; the original's weights are in the checkpoint."""
        values = super().config()
        values["original"] = self.original is not None
        return values

    def prepare(self, network: off.Network) -> None:
        """A copy of the original, which is the teacher."""
        network.auxiliary = {}
        if self.original is not None:
            network.auxiliary["original"] = teacher_network(self.original, network)

    def phases(self, network: off.Network) -> list[Phase]:
        """SGD at both rates of `wae`, with its schedule."""
        like = WaveletLike()
        parameters = tuple(network.backbone.parameters())
        teacher = None if self.original is None else "original"
        found = []
        for name, epochs, rate in (
            ("classes", self.classes, self.rate),
            ("joint", self.joint, self.joint_rate),
        ):
            sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=like.decay)
            if epochs:
                found.append(Phase(name, parameters, epochs, sgd, falling, teacher=teacher))
        return found

    def loss(self, outputs: TrainingOutputs, batch: TrainingBatch) -> Tensor:
        """Cross-entropy of the last exit with the labels, and with the original's outputs."""
        logits = outputs.logits[outputs.network.topology.exits[-1]]
        hard = cross_entropy(logits, batch.labels())
        if outputs.teacher is None:
            return hard
        soft = TEMPERATURE**2 * soft_cross_entropy(logits, outputs.teacher, TEMPERATURE)
        return (1 - self.soft) * hard + self.soft * soft


def falling(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Tenfold at 1/2 and 3/4, as `wae` has it."""
    marks = [max(1, steps // 2), max(2, 3 * steps // 4)]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, marks)


@dataclass(frozen=True)
class Case:
    """A task, and a plain model of it.

    Attributes:
        side: of the images, in pixels.
        preprocess: of the images, as the name of a model that has the same.
        variants: what is trained, in this order.
        training: the rows that train.
        testing: the rows that calibrate, then those that give the figures.
        calibrating: how many of them calibrate.
        model: the plain model with its weights.
    """

    side: int
    preprocess: str
    variants: tuple[str, ...]
    training: Callable[[argparse.Namespace], off.Rows]
    testing: Callable[[argparse.Namespace], off.Rows]
    calibrating: int
    model: Callable[[argparse.Namespace], nn.Module]


def resnet56(args: argparse.Namespace) -> nn.Module:
    """ResNet-56 with the public weights."""
    return off.make_model(SPEC, args.data / "weights" / "cifar10_resnet56.safetensors")


def vgg64(args: argparse.Namespace) -> nn.Module:
    """The VGG of the cache, as it was trained."""
    done = place_of("plain", args) / "done.pt"
    if not done.exists():
        raise SystemExit("the plain model must be trained first: train --case vgg64 --only plain")
    net, _ = variant("plain", args)
    net.load_state_dict(torch.load(done, weights_only=True))
    return net.backbone


def vgg_narrow() -> nn.Sequential:
    """VGG-16 of a quarter of the widths, with batch norms and one linear layer, for ten classes:
    [B, 3, 64, 64] -> [B, 10].
    """
    layers = list[nn.Module]()
    width_in = 3
    for width in PLAN:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            continue
        convolution = nn.Conv2d(width_in, width // 4, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width // 4), nn.ReLU()]
        width_in = width // 4
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 10)]
    return nn.Sequential(*layers).eval()


def cifar_training(args: argparse.Namespace) -> off.Rows:
    """The training rows of CIFAR-10."""
    return off.rows(f"cifar10/train:{args.data / 'cifar10'}")


def cifar_testing(args: argparse.Namespace) -> off.Rows:
    """Its test rows but for the first thousand, on which the rates were chosen."""
    return off.rows(f"cifar10:{args.data / 'cifar10'}[1000:10000]")


def photos(split: str, args: argparse.Namespace) -> off.Rows:
    """Images of Imagenette at 64 pixels in a fixed random order, decoded once."""
    file = args.cache / f"imagenette64-{split}.npz"
    if not file.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        found = off.rows(f"imagefolder:{args.data / 'imagenette' / split}?resize=64&crop=64")
        rows = found.take(np.random.default_rng(0).permutation(len(found)))
        np.savez(file, x=np.asarray(rows.x), y=np.asarray(rows.y))
    return off.rows(f"npz:{file}")


CASES = {
    "resnet56": Case(
        32,
        SPEC,
        ("wae", "down", "down18", "wavelet", "decomposition"),
        cifar_training,
        cifar_testing,
        4000,
        resnet56,
    ),
    "vgg64": Case(
        64,
        "offramp:wae_vgg16",
        ("plain", "wae", "down", "down36", "wavelet", "decomposition"),
        partial(photos, "train"),
        partial(photos, "val"),
        1800,
        vgg64,
    ),
}


def variant(name: str, args: argparse.Namespace) -> tuple[off.Network, Recipe]:
    """The network of one variant, not yet trained, and its recipe."""
    case = CASES[args.case]
    images, classes, joint = args.epochs
    preprocess = off.make_preprocess(case.preprocess)
    if name == "plain":
        recipe = Plain(args.plain_epochs, 0, args.plain_rate, 0.0, None, 0.0)
        return plain_network(vgg_narrow(), ModelSpec(BACKBONE), preprocess), recipe
    model = case.model(args)
    original = model if args.soft else None
    example = np.zeros((4, 3, case.side, case.side), np.uint8)
    if name.startswith("down"):
        side = int(name.removeprefix("down") or case.side // 2)
        small = Resized(model, side).eval()
        plain = Plain(classes, joint, args.rate, args.joint_rate, original, args.soft)
        return plain_network(small, ModelSpec(BACKBONE), preprocess), plain
    transform = "wavelet" if name == "wavelet" else "encoder"
    half = off.wae(model, size=case.side, transform=transform)
    net = off.cut(half, example, at=half.cuts, exits="own", preprocess=preprocess)
    like_wae = partial(WaveletLike, original=original, soft=args.soft, temperature=TEMPERATURE)
    if name == "decomposition":
        together = like_wae(
            images=0, classes=0, joint=classes + joint, gamma=0.0, joint_rate=args.rate
        )
        return net, together
    staged = like_wae(
        images=images,
        classes=classes,
        joint=joint,
        rate=args.rate,
        joint_rate=args.joint_rate,
        anchor=1.0,
    )
    return net, staged


def place_of(name: str, args: argparse.Namespace) -> Path:
    """Where a trained variant is kept."""
    cache: Path = args.cache
    of = "" if args.case == "resnet56" else f"{args.case}-"
    if name == "plain":
        return cache / f"wae-{of}plain-{args.rows}-{args.plain_epochs}-seed{args.seed}"
    epochs = "-".join(map(str, args.epochs))
    rates = f"{args.rate:g}-{args.joint_rate:g}"
    soft = f"-soft{args.soft:g}" if args.soft else ""
    return cache / f"wae-{of}{name}-{args.rows}-{epochs}-{rates}{soft}-seed{args.seed}"


def train(args: argparse.Namespace) -> None:
    """Train the variants that are not there yet, and go on with one that was stopped."""
    case = CASES[args.case]
    for name in args.only or case.variants:
        path = place_of(name, args)
        done = path / "done.pt"
        if done.exists():
            continue
        torch.manual_seed(args.seed)
        net, recipe = variant(name, args)
        for value in net.parameters():
            if value.dim() == 4:  # a fifth faster on a CPU
                value.data = value.data.to(memory_format=torch.channels_last)
        rows = case.training(args)
        if args.rows < len(rows):
            rows = rows.select(slice(0, args.rows))
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
    """A trained variant and its trace on the test rows; None for one that is not trained."""
    path = place_of(name, args)
    if not (path / "done.pt").exists():
        return None
    net, _ = variant(name, args)
    net.load_state_dict(torch.load(path / "done.pt", weights_only=True))
    file = path / "trace.npz"
    if not file.exists():
        rows = CASES[args.case].testing(args)
        off.record(net.eval(), rows, timed=False).save(file)
    return net, off.Trace.load(file)


def show(args: argparse.Namespace) -> None:
    """Accuracies, costs and times of what has been trained, and the lazy high branch."""
    torch.set_num_threads(1)
    case = CASES[args.case]
    preprocess = off.make_preprocess(case.preprocess)
    assert preprocess is not None
    testing = case.testing(args)
    rows = testing.take(np.arange(case.calibrating, case.calibrating + 64)).x
    raw = torch.as_tensor(np.asarray(rows))
    x = preprocess(raw)
    plain = case.model(args)
    file = args.cache / f"wae-{args.case}.npz"
    if not file.exists():
        args.cache.mkdir(parents=True, exist_ok=True)
        whole = plain_network(plain, ModelSpec(BACKBONE), preprocess)
        off.record(whole, testing, timed=False).save(file)
    results: dict[str, Any] = {args.case: accuracies(off.Trace.load(file), case)}
    calls: dict[str, Callable[[], object]] = {args.case: lambda: plain(x)}
    results[args.case]["macs"] = macs(lambda: plain(x)) / len(x)
    for name in case.variants:
        known = trace_of(name, args) if name != "plain" else None
        if known is None:
            continue
        net, trace = known
        model = net.backbone
        calls[name] = partial(model, x)
        results[name] = accuracies(trace, case) | {"macs": macs(partial(model, x)) / len(x)}
        if not name.startswith("down"):
            results[name]["lazy"] = lazy(net, trace, raw, case, args.repeats)
    with torch.inference_mode():
        taken = interleaved(calls, repeats=args.repeats, warmup=2, clock=time.process_time)
    table = Table("variant", "M MACs", "accuracy, sum", "head A", f"times faster than {args.case}")
    for name, row in results.items():
        row["speed_up"] = vars(ratio(taken[args.case], taken[name]))
        low = f"{row['head_low']:.2%}" if "head_low" in row else ""
        speed = str(ratio(taken[args.case], taken[name]))
        table.add_row(name, f"{row['macs'] / 1e6:.1f}", f"{row['backbone']:.2%}", low, speed)
    console = Console()
    console.print(table)
    for name, row in results.items():
        if "lazy" in row:
            console.print(f"{name}, lazy: {row['lazy']}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def accuracies(trace: off.Trace, case: Case) -> dict[str, Any]:
    """Of every exit on the rows that give the figures."""
    figures = trace[case.calibrating :]
    label = figures.columns["label"]
    found: dict[str, Any] = {}
    for name in trace.topology.exits:
        answer = figures.columns[f"answer/{name}"]
        found[name] = float((answer == label).mean())
    return found


def lazy(
    net: off.Network, trace: off.Trace, raw: Tensor, case: Case, repeats: int
) -> dict[str, Any]:
    """A certified plan with the high branch where head A is not sure, and what it saves."""
    figures = trace[case.calibrating :]
    plan = off.calibrate(trace[: case.calibrating], risk="accuracy_gap", at_most=0.005)
    found = figures.evaluate(plan)
    whole = off.Plan.never_leave(net.topology)
    engine = off.open(net, plan)
    always = off.open(net, whole)
    calls = {"lazy": partial(engine, raw), "always": partial(always, raw)}
    taken = interleaved(calls, repeats=repeats, warmup=2, clock=time.process_time)
    left = figures.replay(plan).exit == 0
    faster = ratio(taken["always"], taken["lazy"])
    return {
        "accuracy": found.accuracy,
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
    parser.add_argument("--case", choices=CASES, default="resnet56")
    parser.add_argument("--only", nargs="+", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, nargs=3, default=[1, 2, 1])
    parser.add_argument("--rate", type=float, default=0.02, help="of SGD, stage 2")
    parser.add_argument("--joint-rate", type=float, default=0.02, help="of SGD, stage 3")
    parser.add_argument("--plain-epochs", type=int, default=20, help="of the plain vgg64")
    parser.add_argument("--plain-rate", type=float, default=0.05, help="of SGD, plain vgg64")
    parser.add_argument("--soft", type=float, default=0.0, help="share of the plain model's logits")
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
