"""What training costs: a joint step beside a plain training step, and a frozen backbone's features
computed once.

    python benchmarks/training_speed.py --data DIR [--rounds 5] [--steps 4] [--only steps|frozen]
        [--json FILE]

Steps: `plain` is a training step of the network without exits, written out below; `by hand` the
same with the losses of all exits; `fit` the joint recipe in off.fit, by its own clock, its rows'
reading included. All have Adam and batches of 128 of the same rows; every round runs all three and
plain again, in turn forwards and backwards. The target is fit / plain <= 1.25 + the exits' MACs in
those of the plain network.
Frozen: a fit of hinge exits on an empty cache (one pass, then the solver), a second one with other
arguments that finds the features in the cache, and a bare pass of the plain model. DIR holds
cifar10/ and weights/ (see benchmarks/fetch.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
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

# Internal: a recipe by its name, with arguments.
from offramp.fitting.training import recipe_of
from offramp.models import msdnet
from offramp.recipes.joint import Joint

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import interleaved, ratio

BATCH = 128
TARGET = 1.25
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def plain_steps(
    model: nn.Module, preprocess: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches
) -> None:
    """A plain PyTorch training loop."""
    model.train()
    for x, y in batches():
        optimizer.zero_grad()
        loss = cross_entropy(model(preprocess(x)), y)
        loss.backward()
        optimizer.step()
    model.eval()


def by_hand(network: off.Network, optimizer: torch.optim.Optimizer, batches: Batches) -> None:
    """The same on the logits of all exits."""
    network.train()
    for x, y in batches():
        optimizer.zero_grad()
        loss = torch.stack([cross_entropy(logits, y) for logits in network(x)]).sum()
        loss.backward()
        optimizer.step()
    network.eval()


def networks(data: Path) -> dict[str, off.Network]:
    """ResNet-56 with two linear exits, and the smallest usual MSDNet with its four convolutional
    ones.
    """
    x = off.rows(f"cifar10:{data / 'cifar10'}").take(np.arange(8)).x
    spec = "offramp:resnet56"
    resnet = off.make_model(spec, data / "weights" / "cifar10_resnet56.safetensors")
    model = msdnet.msdnet_even(5, classes=10).eval()
    return {
        "ResNet-56": off.cut(
            resnet, x, at=["layer1", "layer2"], preprocess=off.make_preprocess(spec)
        ),
        "MSDNet, 5 blocks": off.cut(
            model, x, at=model.cuts, exits="strided", preprocess=msdnet.preprocess()
        ),
    }


def share_of_exits(network: off.Network, x: np.ndarray) -> float:
    """The exits' MACs in those of the plain network."""
    prices = off.record(network, x[:2], timed=False, progress=False).prices
    exits = sum(
        float(np.mean(prices.parts[f"exit/{name}"][..., 0])) for name in network.topology.gates
    )
    return exits / prices.plain(network.topology.exits[-1], unit="macs", batch=1)


def steps(network: off.Network, rows: off.Rows | Any, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per step and their ratios."""
    member = network.members[0]
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    assert preprocess is not None
    taken = rows.select(slice(0, count * BATCH))
    whole = taken.take(np.arange(len(taken)))
    data = (np.asarray(whole.x), np.asarray(whole.y))
    parts = [np.arange(start, start + BATCH) for start in range(0, len(taken), BATCH)]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for positions in parts:
            yield torch.as_tensor(data[0][positions]), torch.as_tensor(data[1][positions])

    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-5) for part in (model, network)]
    plain = partial(plain_steps, model, preprocess, optimizers[0], batches)
    recipe = Joint(epochs=1, rate=1e-5)
    calls: dict[str, Callable[[], float]] = {
        "plain": partial(_seconds, plain),
        "by hand": partial(_seconds, partial(by_hand, network, optimizers[1], batches)),
        "fit": lambda: (
            off.fit(network, data, recipe=recipe, batch_size=BATCH, progress=False).seconds
        ),
        "plain again": partial(_seconds, plain),
    }
    reading = interleaved(
        {"read": lambda: [taken.take_x(positions) for positions in parts]}, repeats=rounds
    )["read"]
    times = {name: value / count for name, value in _in_turn(calls, rounds).items()}
    every = {
        "fit / plain": ("fit", "plain"),
        "by hand / plain": ("by hand", "plain"),
        "fit / by hand": ("fit", "by hand"),
    }
    every["plain / plain"] = ("plain again", "plain")
    exits = share_of_exits(network, data[0])
    return {
        "ms": {name: float(np.median(value)) for name, value in times.items()},
        "read_ms": float(np.median(reading)) / count,
        "exits_share": exits,
        "target": TARGET + exits,
        **{name: vars(ratio(times[a], times[b])) for name, (a, b) in every.items()},
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds [rounds] by each call's own clock, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for turn in range(rounds + 1):
        for name, call in order if turn % 2 == 0 else reversed(order):
            times[name].append(call() * 1e3)
    return {name: np.array(values[1:]) for name, values in times.items()}


def frozen(network: off.Network, rows: off.Rows | Any, rounds: int) -> dict[str, Any]:
    """Seconds of a first fit, of a second one on the same backbone, and of a bare pass of the plain
    model.
    """
    member = network.members[0]
    model = network.model_of(member)
    preprocess = network.preprocess_of(member)
    assert preprocess is not None

    def bare() -> None:
        with torch.inference_mode():
            for batch in rows.batches(BATCH):
                model(preprocess(torch.as_tensor(batch.x)))

    def fit(cache: str, regularizer: float) -> float:
        recipe = recipe_of("hinge", regularizer=regularizer)
        start = time.perf_counter()
        solving.append(off.fit(network, rows, recipe=recipe, cache=cache, progress=False).seconds)
        return time.perf_counter() - start

    found: dict[str, list[float]] = {"bare pass": [], "first fit": [], "second fit": []}
    solving: list[float] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            found["bare pass"].append(_seconds(bare))
            found["first fit"].append(fit(cache, 1e-4))
            found["second fit"].append(fit(cache, 1e-3))
    times = {name: np.array(values) for name, values in found.items()}
    return {
        "rows": len(rows),
        "seconds": {name: float(np.median(values)) for name, values in times.items()},
        "solving": float(np.median(solving)),
        "first / bare pass": vars(ratio(times["first fit"], times["bare pass"])),
        "second / first": vars(ratio(times["second fit"], times["first fit"])),
    }


def show(results: dict[str, Any], console: Console) -> None:
    """A table of steps and one of the frozen backbone."""
    names = ("fit / plain", "by hand / plain", "fit / by hand", "plain / plain")
    table = Table(
        "network",
        "plain ms",
        "fit ms",
        "of which reading",
        *names,
        "exits' MACs",
        "target: fit / plain <=",
    )
    for title, row in results.get("steps", {}).items():
        cells = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[name]) for name in names]
        ms = (f"{row['ms']['plain']:.0f}", f"{row['ms']['fit']:.0f}", f"{row['read_ms']:.1f}")
        table.add_row(title, *ms, *cells, f"{row['exits_share']:.2%}", f"{row['target']:.3f}")
    if "steps" in results:
        console.print(table)
    if "frozen" in results:
        row = results["frozen"]
        table = Table("hinge, frozen ResNet-56", "seconds", title=f"{row['rows']:,} rows")
        for name, seconds in (row["seconds"] | {"of which solving": row["solving"]}).items():
            table.add_row(name, f"{seconds:.2f}")
        for name in ("first / bare pass", "second / first"):
            table.add_row(name, "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[name]))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps of each call (4)")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the frozen fits (2,000)")
    parser.add_argument("--only", choices=("steps", "frozen"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    train = off.rows(f"cifar10/train:{args.data / 'cifar10'}")
    found = networks(args.data)
    results: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.only != "steps":  # before steps change the weights
        results["frozen"] = frozen(
            found["ResNet-56"], train.select(slice(0, args.rows)), args.rounds
        )
    if args.only != "frozen":
        results["steps"] = {
            name: steps(one, train, args.steps, args.rounds) for name, one in found.items()
        }
    show(results, Console(width=170))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
