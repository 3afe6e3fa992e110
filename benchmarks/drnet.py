"""DRNet on CIFAR-10: a trained ResNet at 32, 24 and 16 pixels, and a predictor that chooses for
each image.

    python benchmarks/drnet.py --data DIR [--model resnet20] [--rows 10000] [--first 3]
        [--gate-rows 20000 --gate-classes 10 --gate-epochs 6] [--epochs 3] [--seeds 1]
        [--cache out] [--json FILE]

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). Training goes on from its last checkpoint
when the command is given again, and networks and traces are kept in the cache. With --gate-rows,
the predictor first learns the classes of other training rows, and then which resolution each of
them needs. Rows 1,000 to 4,999 of the test set choose plans, rows 5,000 to 9,999 are measured on
(by default; --choose and --measure take fewer). Costs are shares of the plain model's MACs at 32
pixels, the predictor included.

Controls: the pretrained model as it is, the same trained weights at one fixed resolution, a cascade
of two resolutions that asks how sure the smaller one is, and a random choice of the resolution with
the same mean cost (a mean over draws, which is a mixture of the fixed accuracies).
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import offramp as off
from offramp.augments.images import crop_flip
from offramp.contracts import Seen

# Internal: bare calls timed in turn, and the same clock as `offramp bench`.
from offramp.runtime.benching import bench

SIZES = (16, 24, 32)
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.75)
GATE = "predictor?width=16&side=16&stride=1"


def network_of(options: argparse.Namespace, example: Any) -> off.Network:
    """The pretrained model at all sizes, nothing trained yet."""
    spec = f"offramp:{options.model}"
    weights = options.data / "weights" / f"cifar10_{options.model}.safetensors"
    model = off.make_model(spec, weights if options.pretrained else None)
    return off.resolutions(
        model, example, SIZES, gate=GATE, preprocess=off.make_preprocess(spec), spec=spec
    )


def home_of(options: argparse.Namespace, seed: int) -> Path:
    """The folder of a trained network in the cache."""
    training = f"{options.rows}-{options.first}-{options.epochs}"
    gate = f"{options.gate_rows}-{options.gate_classes}-{options.gate_epochs}"
    home: Path = options.cache / f"drnet-{options.model}-{training}-gate-{gate}-{seed}"
    return home


def trained(options: argparse.Namespace, seed: int) -> off.Network:
    """The network after all phases, from the cache or trained now.

    The phases are three calls of `fit`, because the gate's own phase has other rows.
    """
    home = home_of(options, seed)
    done = home / "network"
    if done.is_dir():
        return off.load(done)
    source = f"cifar10/train:{options.data / 'cifar10'}"
    start = seed * options.rows
    end = start + options.rows
    rows = off.rows(f"{source}[{start}:{end}]")
    torch.manual_seed(seed)
    net = network_of(options, rows.take(np.arange(4)).x)
    shared: dict[str, Any] = {
        "recipe": "drnet",
        "norm": options.norm,
        "gate_rate": options.gate_rate,
        "budget": 0.5,
        "eta": 0.5,
        "augment": "crop_flip",
        "batch_size": 128,
        "seed": seed,
        "progress": False,
    }
    fit_phase(
        net,
        rows,
        home / "arms",
        first=options.first,
        epochs=0,
        keep=options.keep,
        rate=options.rate,
        **shared,
    )
    if options.gate_rows:
        # Rows that did not train the arms, because of those nearly all are answered right.
        others = off.rows(f"{source}[{end}:{end + options.gate_rows}]")
        learn_classes(net, others, options.gate_classes, seed)
        fit_phase(
            net, others, home / "gate", first=0, epochs=0, gate_epochs=options.gate_epochs, **shared
        )
    if options.epochs:
        fit_phase(
            net,
            rows,
            home / "both",
            first=0,
            epochs=options.epochs,
            second_rate=options.second_rate,
            **shared,
        )
    off.save(net, done)
    return net


def fit_phase(net: off.Network, rows: Any, folder: Path, **options: Any) -> None:
    """A call of `fit` that goes on from its last checkpoint."""
    resume = (folder / "checkpoint").is_dir()
    off.fit(net, rows, folder=folder, resume=resume, **options)


def learn_classes(net: off.Network, rows: Any, epochs: int, seed: int) -> None:
    """Train the predictor as a classifier, so that it knows what is in the images.

    Afterwards its last layer is a new one.
    """
    gate = net.gate_of("resolution")
    own = gate.rates
    gate.rates = torch.nn.Linear(own.in_features, 10)
    batch = rows.take(np.arange(len(rows)))
    x = torch.as_tensor(batch.x)
    y = torch.as_tensor(batch.y).long()
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sgd = torch.optim.SGD(gate.parameters(), 0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(x) // 256
    schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.2, total_steps=max(1, epochs * steps))
    gate.train().requires_grad_(True)
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=draw)
        for step in range(steps):
            chosen = order[256 * step : 256 * (step + 1)]
            ratings = gate.ratings(Seen(crop_flip(x[chosen]), {}))
            loss = torch.nn.functional.cross_entropy(ratings, y[chosen])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            schedule.step()
    gate.rates = own
    gate.eval()


def traced(options: argparse.Namespace, net: off.Network, seed: int) -> off.Trace:
    """The rows that choose plans, and after them those that are measured on; every arm of them."""
    path = home_of(options, seed) / "trace.npz"
    if path.is_file():
        return off.Trace.load(path)
    parts = []
    for rows in (f"[1000:{1000 + options.choose}]", f"[5000:{5000 + options.measure}]"):
        part = off.rows(f"cifar10:{options.data / 'cifar10'}{rows}")
        parts.append(part.take(np.arange(len(part))))
    x = np.concatenate([part.x for part in parts])
    y = np.concatenate([part.y for part in parts])
    trace = off.record(net, (x, y), timed=False, progress=False, batch_size=250)
    trace.save(path)
    return trace


def accuracy(trace: off.Trace, label: str) -> float:
    """The share of rows that an exit answers right."""
    return float((trace.columns[f"answer/{label}"] == trace.labels).mean())


def lines_of(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Every plan and every control: name, share of the plain MACs, accuracy."""
    net = trained(options, seed)
    trace = traced(options, net, seed)
    choosing = trace[: options.choose]
    test = trace[options.choose :]
    plain = test.price(off.Plan.never_leave(test.topology)).plain
    fixed = {}
    for size in SIZES:
        cost = test.prices.along([f"r{size}"], unit="macs", batch=1) / plain
        fixed[size] = (cost, accuracy(test, f"r{size}"))
    spec = f"offramp:{options.model}"
    model = off.make_model(spec, options.data / "weights" / f"cifar10_{options.model}.safetensors")
    whole = off.rows(f"cifar10:{options.data / 'cifar10'}[5000:{5000 + options.measure}]")
    right = 0
    preprocess = off.make_preprocess(spec)
    with torch.inference_mode():
        for batch in whole.batches(250):
            answers = model(preprocess(torch.as_tensor(batch.x))).argmax(1).numpy()
            right += int((answers == batch.y).sum())
    found = [
        {"plan": "pretrained model, 32 pixels", "cost": 1.0, "accuracy": right / options.measure}
    ]
    for size, (cost, own) in fixed.items():
        found.append({"plan": f"fixed {size} pixels, same weights", "cost": cost, "accuracy": own})
    plans = {"argmax of the predictor": off.Plan.by_hand({"resolution": (0.0, 0.0)})}
    for budget in BUDGETS:
        try:
            plan = off.calibrate(choosing, budget=budget, risk="error")
        except off.errors.OutOfBudget:
            continue  # the smallest size and the predictor cost more than that
        plans[f"best within {budget:.0%}"] = plan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level in (0.005, 0.01, 0.02):
            try:
                plan = off.calibrate(
                    choosing, risk="accuracy_gap", at_most=level, repeats="once", testing="pareto"
                )
            except off.errors.NoSafePlan:
                continue
            plans[f"certified: at most {100 * level:g} points less than r32"] = plan
    for name, plan in plans.items():
        done = test.evaluate(plan)
        cost = test.price(plan).mean / plain
        shares = dict(zip(done.exits, done.shares, strict=True))
        random = mixed(fixed, cost)
        found.append(
            {
                "plan": name,
                "cost": cost,
                "accuracy": done.accuracy,
                "random": random,
                "shares": shares,
            }
        )
    return found + cascaded(choosing, test, fixed)


def cascaded(
    choosing: off.Trace, test: off.Trace, fixed: dict[int, tuple[float, float]]
) -> list[dict[str, Any]]:
    """The same weights as a cascade: 24 pixels first, and 32 as well for the least sure rows.

    A row that goes on pays for both sizes. The margin below which it does is chosen so that a given
    share of the other rows goes on.
    """
    lines = []
    for share in (0.1, 0.2, 0.3):
        threshold = np.quantile(margin(choosing, 24), share)
        goes_on = margin(test, 24) < threshold
        answers = np.where(goes_on, test.columns["answer/r32"], test.columns["answer/r24"])
        lines.append(
            {
                "plan": f"no predictor: 24 pixels, 32 too for {share:.0%}",
                "cost": fixed[24][0] + float(goes_on.mean()) * fixed[32][0],
                "accuracy": float((answers == test.labels).mean()),
            }
        )
    return lines


def margin(trace: off.Trace, size: int) -> Any:
    """The distance between the two largest logits at one size, [N]."""
    ordered = np.sort(trace.columns[f"logits/r{size}"], axis=1)
    return ordered[:, -1] - ordered[:, -2]


def mixed(fixed: dict[int, tuple[float, float]], cost: float) -> float:
    """The best accuracy of a random choice between two sizes with this mean cost, which pays for no
    predictor.
    """
    points = sorted(fixed.values())
    return float(np.interp(cost, [cost for cost, _ in points], [own for _, own in points]))


def timed(options: argparse.Namespace, seed: int) -> str:
    """Wall-clock at batch 1 and 64 beside bare segments and the plain path."""
    net = trained(options, seed)
    trace = traced(options, net, seed)
    plan = off.calibrate(trace[: options.choose], budget=0.5, risk="error")
    rows = off.rows(f"cifar10:{options.data / 'cifar10'}[5000:5064]")
    x = rows.take(np.arange(64)).x
    import time

    return str(
        bench(net, plan, x, batches=(1, 64), repeats=options.repeats, clock=time.process_time)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--rows", type=int, default=10_000, help="of the training set, for each seed others"
    )
    parser.add_argument("--first", type=int, default=3, help="epochs of all resolutions together")
    parser.add_argument("--epochs", type=int, default=3, help="epochs with the predictor")
    parser.add_argument(
        "--gate-rows", type=int, default=0, help="more training rows, for the predictor alone"
    )
    parser.add_argument(
        "--gate-classes", type=int, default=10, help="epochs in which it learns their classes"
    )
    parser.add_argument(
        "--gate-epochs", type=int, default=6, help="epochs in which it learns what they need"
    )
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--second-rate", type=float, default=0.001)
    parser.add_argument("--gate-rate", type=float, default=0.01)
    parser.add_argument("--norm", default="frozen", help="moving or frozen in the second phase")
    parser.add_argument(
        "--keep",
        type=float,
        default=0.5,
        help="share of a smaller size's loss trained by the largest",
    )
    parser.add_argument(
        "--choose", type=int, default=4000, help="test rows from 1,000 on that choose plans"
    )
    parser.add_argument(
        "--measure", type=int, default=5000, help="test rows from 5,000 on that are measured on"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = [lines_of(options, seed) for seed in range(options.seeds)]
    table = Table(
        title=f"{options.model} on CIFAR-10, {options.rows:,} training rows, {options.seeds} seeds"
    )
    for head in ("plan", "cost", "accuracy, %", "random choice, %", "rows at 16/24/32"):
        table.add_column(head)
    names = [line["plan"] for line in every[0]]
    for name in names:
        lines = [line for lines in every for line in lines if line["plan"] == name]
        cost = np.mean([line["cost"] for line in lines])
        own = 100 * np.array([line["accuracy"] for line in lines])
        random = [100 * line["random"] for line in lines if "random" in line]
        shares = [f"{share:.0%}" for share in lines[0].get("shares", {}).values()]
        spread = f"{own.mean():.2f}" + (f" ± {own.std(ddof=1):.2f}" if len(own) > 1 else "")
        table.add_row(
            name,
            f"{cost:.3f}",
            spread,
            f"{np.mean(random):.2f}" if random else "",
            "/".join(shares),
        )
    Console().print(table)
    times = timed(options, 0)
    print(times)
    if options.json:
        options.json.write_text(
            json.dumps({"lines": every, "times": times}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
