"""Forks trained by reward and by gradients, beside a confidence gate on the same arms: CIFAR-10,
MNIST, a rare class.

    python benchmarks/d2nn.py --data DIR [--tasks mnist,rare,cifar10] [--rows 6000] [--epochs 4]
        [--seeds 1] [--cache out] [--json FILE]

DIR holds mnist/ and cifar10/ (see benchmarks/fetch.py). D2NN-style: the paper's formulas and tables
are not public. Three ways to train the same layout from the same start, for the layouts high-low
and cascade:

    reward      recipe d2nn: Q-heads, epsilon-greedy (on the rare class also with F-scores of
                mini-bags)
    gradient    recipe gumbel: straight-through choices, the cost in the loss
    confidence  no gate is trained: the margin of an exit at the fork (high-low) or at each stage
                (cascade) says which rows are sure; arms and exits are trained along random ways

Every network is recorded; plans within budgets are chosen on half of the held-out rows and measured
on the other half. Costs are shares of the dearest path's MACs. Networks that are done are kept in
the cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import offramp as off
from offramp import templates
from offramp.contracts import Gate, Seen

BUDGETS = (0.4, 0.6, 0.8)
WAYS = ("reward", "gradient", "confidence")


class MarginOf(Gate):
    """The margin between the two best logits of an earlier exit."""

    def __init__(self, exit_: str) -> None:
        super().__init__()
        self.reads = (exit_,)

    def score(self, seen: Seen) -> torch.Tensor:
        first, second = seen.logits[self.reads[0]].topk(2, dim=-1).values.unbind(-1)
        return first - second

    def config(self) -> dict[str, Any]:
        return {"name": "benchmarks:MarginOf", "exit_": self.reads[0]}


class Scaled(nn.Module):
    """Bytes to numbers around 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() / 127.5 - 1


def conv(width_in: int, width: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


def head(width: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def network_of(
    layout: str, way: str, channels: int, classes: int, example: Any, seed: int
) -> off.Network:
    """A layout before training; small enough for a CPU."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(Scaled(), *conv(channels, 16, 2))
    if layout == "cascade":
        stages = [
            trunk,
            nn.Sequential(*conv(16, 32, 2), *conv(32, 32)),
            nn.Sequential(*conv(32, 64, 2), *conv(64, 64)),
        ]
        stages[-1] = nn.Sequential(stages[-1], head(64, classes))
        gate = "margin" if way == "confidence" else "controller"
        return templates.cascade(
            [stage.eval() for stage in stages], example=example, exit="linear_grid", gate=gate
        )
    low = nn.Sequential(*conv(16, 32, 2)).eval()
    high = nn.Sequential(*conv(16, 32, 2), *conv(32, 64), *conv(64, 32)).eval()
    answers = head(32, classes).eval()
    if way != "confidence":
        return templates.high_low(trunk.eval(), low, high, answers, example=example)
    steps = [
        ("trunk", trunk.eval()),
        off.Leave("look", "linear_grid", "margin"),
        off.Fork("capacity", {"low": low, "high": high}, MarginOf("look")),
        ("head", answers),
    ]
    return off.route(steps, example=example)


def data_of(options: argparse.Namespace, task: str, seed: int) -> tuple[Any, Any, int, int]:
    """Training rows, held-out rows, channels and classes of a task."""
    start = seed * options.rows
    if task == "cifar10":
        home = options.data / "cifar10"
        train = off.rows(f"cifar10/train:{home}[{start}:{start + options.rows}]")
        held = off.rows(f"cifar10:{home}[1000:{1000 + options.held}]")
        return train, held, 3, 10
    home = options.data / "mnist"
    train = off.rows(f"mnist/train:{home}[{start}:{start + options.rows}]")
    held = off.rows(f"mnist:{home}[0:{options.held}]")
    if task == "mnist":
        return train, held, 1, 10
    found = []
    for rows in (train, held):  # the digit 9 among all others: one in ten
        batch = rows.take(np.arange(len(rows)))
        found.append((batch.x, (batch.y == 9).astype(np.int64)))
    return found[0], found[1], 1, 2


def trained(options: argparse.Namespace, task: str, layout: str, way: str, seed: int) -> off.Trace:
    """The recorded held-out rows of a trained network, from the cache or made now."""
    path = options.cache / f"d2nn-{task}-{layout}-{way}-{options.rows}-{options.epochs}-{seed}.npz"
    if path.is_file():
        return off.Trace.load(path)
    train, held, channels, classes = data_of(options, task, seed)
    example = train[0][:4] if isinstance(train, tuple) else train.take(np.arange(4)).x
    net = network_of(layout, way, channels, classes, example, seed)
    warm = options.epochs
    fit: dict[str, Any] = {
        "batch_size": 64,
        "seed": seed,
        "progress": False,
        "rate": 2e-3,
        "warm": warm,
    }
    if way == "confidence":
        fit.pop("warm")
        off.fit(net, train, recipe="random_ways", epochs=options.epochs + warm, **fit)
    elif way == "gradient":
        off.fit(
            net, train, recipe="gumbel", epochs=options.epochs, budget=0.6, gate_rate=5e-3, **fit
        )
    else:
        bags = {"aim": "f_score", "positive": 1} if way == "reward in bags" else {}
        off.fit(
            net,
            train,
            recipe="d2nn",
            epochs=options.epochs,
            weight=0.9,
            gate_rate=5e-3,
            **bags,
            **fit,
        )
    trace = off.record(net, held, timed=False, progress=False, batch_size=250)
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.save(path)
    return trace


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--tasks", default="mnist,rare,cifar10")
    parser.add_argument("--layouts", default="high-low,cascade")
    parser.add_argument(
        "--rows", type=int, default=6000, help="of the training set, for each seed others"
    )
    parser.add_argument("--held", type=int, default=4000, help="held-out rows")
    parser.add_argument(
        "--epochs", type=int, default=4, help="along random ways, and as many with gates"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = []
    for task in options.tasks.split(","):
        for layout in options.layouts.split(","):
            for seed in range(options.seeds):
                ways = [*WAYS, "reward in bags"] if task == "rare" else [*WAYS]
                for way in ways:
                    trace = trained(options, task, layout, way, seed)
                    every += figures(trace, task, layout, way, seed)
    print_table(every)
    if options.json:
        options.json.write_text(json.dumps(every, indent=1), encoding="utf-8")


def figures(trace: off.Trace, task: str, layout: str, way: str, seed: int) -> list[dict[str, Any]]:
    """Accuracy (and F-score of the rare class) at each budget, and of the dearest path."""
    half = len(trace) // 2
    choosing = trace[:half]
    test = trace[half:]
    plain = test.price(off.Plan.never_leave(test.topology)).plain
    plans = {"dearest path": off.Plan.never_leave(test.topology)}
    for budget in BUDGETS:
        try:
            plans[f"{budget:.0%}"] = off.calibrate(choosing, budget=budget, risk="error")
        except off.errors.OutOfBudget:
            continue
    found = []
    for name, plan in plans.items():
        done = test.replay(plan)
        line = {"task": task, "layout": layout, "way": way, "seed": seed, "budget": name}
        line["cost"] = test.price(plan).mean / plain
        line["accuracy"] = float((done.answer == test.labels).mean())
        if task == "rare":
            positive = test.labels == 1
            right = float((done.answer[positive] == 1).sum())
            line["f_score"] = 2 * right / max(1.0, float((done.answer == 1).sum() + positive.sum()))
        found.append(line)
    return found


def print_table(every: list[dict[str, Any]]) -> None:
    """Means over seeds."""
    table = Table(
        title="accuracy, % (F-score of the rare class, %) at a share of the dearest path's MACs"
    )
    for column in ("task", "layout", "gate", "budget", "cost", "accuracy", "F-score"):
        table.add_column(column)
    keys = list(
        dict.fromkeys((line["task"], line["layout"], line["way"], line["budget"]) for line in every)
    )
    for key in keys:
        lines = [
            line
            for line in every
            if (line["task"], line["layout"], line["way"], line["budget"]) == key
        ]
        own = 100 * np.array([line["accuracy"] for line in lines])
        spread = f"{own.mean():.2f}" + (f" ± {own.std(ddof=1):.2f}" if len(own) > 1 else "")
        scores = [100 * line["f_score"] for line in lines if "f_score" in line]
        cost = np.mean([line["cost"] for line in lines])
        table.add_row(*key, f"{cost:.3f}", spread, f"{np.mean(scores):.1f}" if scores else "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
