"""B-AlexNet and B-ResNet-110 on CIFAR-10 by joint training, beside the plain networks.

    python benchmarks/branchy.py --data DIR [--net alexnet|resnet110] [--cache out] [--device cuda]
        [--json FILE]

DIR holds cifar10/ (see benchmarks/fetch.py). As `lenet.py` does for B-LeNet: the trunk alone, then
trunk and branches together from there, with a rate that falls to 0 in each phase; the plain network
gets as many epochs in all. Rows are flipped and shifted by default (`--plain` leaves them as they
are, as the authors do). Thresholds are entropies in nats, those of the paper and of a
re-implementation, fixed beforehand. The certified plan comes from test rows 1,000-4,999; all
figures are over 5,000-9,999. The depth of branch 1 (the paper's Figure 5) is
compare/branchynet-depth.toml.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lenet import Alone, right
from rich.console import Console
from rich.table import Table

import offramp as off

# Internal: an augmentation by its name on the shelf.
from offramp._support.find import find

# Internal: the frontier that a paper draws, which is no plan.
from offramp.calibration.branchynet_grid import above, grid_plans

# Internal: the frontier that a paper draws, which is no plan.
from offramp.calibration.branchynet_grid import front as front_through
from offramp.recipes.joint import Joint


@dataclass(frozen=True)
class Net:
    """A network of the paper: its model, cuts and exits, the batch, the grid, and two pairs of
    entropies.
    """

    spec: str
    at: tuple[str, str]
    exits: str
    batch: int
    grid: str
    paper: tuple[float, float]
    again: tuple[float, float]


NETS = {
    "alexnet": Net(
        "offramp:alexnet",
        ("conv2", "conv3"),
        "b_alexnet",
        512,
        "alexnet",
        (1e-4, 0.05),
        (0.05, 1.0),
    ),
    "resnet110": Net(
        "offramp:resnet110_branchy",
        ("stem", "layer1"),
        "b_resnet",
        64,
        "lenet",
        (0.3, 0.2),
        (1e-4, 1e-4),
    ),
}


def untrained(net: Net, seed: int, example: Any) -> off.Network:
    """The trunk with its branches, nothing trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return off.cut(
            off.make_model(net.spec),
            example,
            at=net.at,
            exits=net.exits,
            gate="neg_entropy",
            preprocess=off.make_preprocess(net.spec),
            spec=net.spec,
        )


def network(args: argparse.Namespace, kind: str, seed: int) -> off.Network:
    """A plain network (under untrained branches) or one with its branches, from the cache or
    trained now.
    """
    net = NETS[args.net]
    train = off.rows(f"cifar10/train:{args.data / 'cifar10'}")
    if args.rows:
        train = train.select(slice(0, args.rows))
    marks = [args.net, kind, args.alone, args.joint, seed]
    marks += [f"first{args.rows}"] * bool(args.rows) + ["plain"] * args.plain
    path = args.cache / "-".join(map(str, marks))
    if not path.exists():
        made = untrained(net, seed, train.take(np.arange(8)).x).to(args.device)
        plain = Alone(alone=args.alone + args.joint, decay=True)
        both = Joint(alone=args.alone, epochs=args.joint, decay=True)
        augment = None if args.plain else find("augments", "crop_flip")
        recipe = plain if kind == "plain" else both
        print(
            off.fit(made, train, recipe=recipe, batch_size=net.batch, seed=seed, augment=augment),
            flush=True,
        )
        off.save(made.to("cpu"), path)
    return off.load(path)


def measured(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Accuracies of both networks, and what leaves where."""
    net = NETS[args.net]
    rows = off.rows(f"cifar10:{args.data / 'cifar10'}")
    branchy = network(args, "branchy", seed)
    test = rows.select(slice(5000, 10_000))
    held = off.record(branchy, rows.select(slice(1000, 5000)), timed=False)
    trace = off.record(branchy, test, timed=False)
    found: dict[str, Any] = {"seed": seed, "plain": right(network(args, "plain", seed), test)}
    found["exits"] = [float((trace.answers[:, index] == trace.labels).mean()) for index in range(3)]
    for name, entropies in (("paper", net.paper), ("again", net.again)):
        pairs = zip(net.at, entropies, trace.scores.T, strict=False)
        plan = off.Plan.by_hand(
            {gate: float(above(-entropy, scores)) for gate, entropy, scores in pairs}
        )
        found[name] = told(trace.evaluate(plan))
    try:
        plan = off.calibrate(held, risk="accuracy_gap", at_most=0.01)
        found["certified"] = told(trace.evaluate(plan)) | {"plan": str(plan)}
    except off.errors.NoSafePlan as problem:
        found["certified"] = {"refused": str(problem)}
    points = front_through(grid_plans(held, grid=net.grid))
    found["screening"] = [[one.accuracy, one.cost, dict(one.thresholds)] for one in points]
    return found


def told(done: Any) -> dict[str, Any]:
    """An evaluation as plain data."""
    return {
        "accuracy": done.accuracy,
        "leave": [float(share) for share in done.shares],
        "cost": done.prices[0].mean / done.prices[0].plain,
    }


def show(seeds: list[dict[str, Any]], console: Console) -> None:
    """A row per seed: accuracy, shares that leave, and cost as a part of the plain network's."""
    table = Table(
        "seed", "plain", "exits", "entropies of the paper", "of the re-implementation", "certified"
    )
    for one in seeds:
        cells = [" ".join(f"{value:.2%}" for value in one["exits"])]
        for name in ("paper", "again", "certified"):
            part = one[name]
            leave = " ".join(f"{share:.0%}" for share in part.get("leave", ()))
            cells.append(
                f"{part['accuracy']:.2%}; {leave}; {part['cost']:.2f}" if "cost" in part else "none"
            )
        table.add_row(str(one["seed"]), f"{one['plain']:.2%}", *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--net", choices=[*NETS], default="alexnet")
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--alone",
        type=int,
        default=20,
        help="epochs of the trunk alone (20; the code has 50 or 100)",
    )
    parser.add_argument(
        "--joint", type=int, default=30, help="epochs of all together (30; the code has 100)"
    )
    parser.add_argument("--rows", type=int, default=0, help="train by the first so many rows only")
    parser.add_argument("--plain", action="store_true", help="no augmentation")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seeds = [measured(args, seed) for seed in range(args.seeds)]
    show(seeds, Console(width=150))
    if args.json:
        args.json.write_text(json.dumps({"seeds": seeds}, indent=1))


if __name__ == "__main__":
    main()
