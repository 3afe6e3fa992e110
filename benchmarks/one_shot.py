"""One-shot search from the public ResNet-20: nets found by evolution beside hand-made ones, in
accuracy and time.

    python benchmarks/one_shot.py --data DIR --cache out/one-shot [--steps 800] [--rows 20000]
        [--budgets 0.7 0.5 0.35] [--json FILE]

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). Each of the nine blocks may be dense, of
ghosts, of low rank, half as wide within, or (where shapes allow it) left out; exits may stand after
the first two stages. The supernet has two tasks: the ten classes, and animal or vehicle. It is
trained by single paths from the public weights. Budgets are shares of the dense network's
milliseconds for a row at batch 64. Test rows 0-999 judge during the search; rows 5,000-9,999 (or
fewer of them, --figures) give the figures. Found nets and hand-made ones (one option everywhere, or
blocks left out) are trained on alike, on the same rows in the same order, before they are compared.
Kendall's tau says how well the supernet ranks the networks that were trained on.

Everything that is done is kept in the cache: stop it with Ctrl-C and run it again to go on. Times
are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from scipy.stats import kendalltau
from torch import Tensor, nn

import offramp as off
from offramp.augments.images import crop_flip

# Internal: hand-made networks are judged by the same rule as found ones.
from offramp.designing.evolution import Judged, judge

# Internal: a result of the search, in an annotation.
from offramp.designing.searching import SearchResult

# Internal: hand-made networks are named as networks of the supernet.
from offramp.designing.supernet import Subnet, Supernet

# Internal: times taken in turn, as in our own figures, and multiply-adds.
from offramp.runtime.measuring import interleaved, macs, ratio

OPTIONS = ("dense", "ghost?ratio=2", "low_rank?energy=0.6", "narrow?by=2", "skip")
VEHICLES = (0, 1, 8, 9)
BATCH = 64


def rows_of(data: Path, part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors."""
    rows = off.rows(f"cifar10{part}:{data / 'cifar10'}")
    batch = rows.take(np.arange(len(rows) if count is None else count))
    return torch.as_tensor(np.asarray(batch.x)), torch.as_tensor(np.asarray(batch.y))


def vehicle(y: Tensor) -> Tensor:
    """The labels of the second task: 1 for airplanes, cars, ships and trucks."""
    return torch.isin(y, torch.tensor(VEHICLES)).long()


def uniform(supernet: Supernet, option: str, only: str = "") -> Subnet:
    """One option at every place that has it and whose name ends with `only`; dense elsewhere."""
    numbers = []
    for place, names in zip(supernet.places, supernet.names, strict=True):
        chosen = option in names and place.endswith(only)
        numbers.append(names.index(option) if chosen else 0)
    return Subnet(tuple(numbers))


def hand_made(supernet: Supernet) -> dict[str, Subnet]:
    """What somebody would try without a search."""
    nets = {f"{option} everywhere": uniform(supernet, option) for option in OPTIONS[:4]}
    nets["two blocks a stage"] = uniform(supernet, "skip", ".2")
    nets["all left out that can be"] = uniform(supernet, "skip")
    return nets


def trained_on(
    model: nn.Module, before: nn.Module, x: Tensor, y: Tensor, epochs: float, seed: int
) -> None:
    """SGD with momentum on a network of its own, in place."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    steps = max(1, int(epochs * len(x) / 128))
    optimizer = torch.optim.SGD(
        model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        picks = torch.from_numpy(order.integers(0, len(x), 128))
        logits = model(before(crop_flip(x[picks])))
        loss = nn.functional.cross_entropy(logits, y[picks])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, before: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows that a model answers right."""
    right = []
    for part, label in zip(torch.split(x, 250), torch.split(y, 250), strict=True):
        right.append((model(before(part)).argmax(1) == label).float())
    return torch.cat(right).mean().item()


def searched(args: Any, x: Tensor, y: Tensor) -> SearchResult:
    """The search within the first budget; the supernet is trained, or read from the cache."""
    spec = "offramp:resnet20"
    return off.search(
        off.make_model(spec, args.data / "weights" / "cifar10_resnet20.safetensors"),
        {"layer*.*": OPTIONS},
        {"ten": (x, y), "vehicle": (x, vehicle(y))},
        development=dict(zip(("ten", "vehicle"), judging(args), strict=True)),
        budget=args.budgets[0],
        unit="ms",
        at=("layer1", "layer2"),
        preprocess=off.make_preprocess(spec),
        spec=spec,
        steps=args.steps,
        batch_size=args.batch_size,
        augment="crop_flip",
        norm_rows=args.norm_rows,
        timing_rows=BATCH,
        population=args.population,
        generations=args.generations,
        clock=time.process_time,
        seed=args.seed,
        folder=args.cache / f"search-seed{args.seed}",
        resume=True,
    )


def judging(args: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rows that judge, with the labels of both tasks."""
    x, y = rows_of(args.data, "", args.judging)
    return (x, y), (x, vehicle(y))


def figures(
    args: Any, first: SearchResult, nets: dict[str, Judged], x: Tensor, y: Tensor
) -> dict[str, Any]:
    """Train each network on, or read it from the cache; its accuracies, its size and its model."""
    before = off.make_preprocess("offramp:resnet20")
    assert before is not None
    start, stop = map(int, args.figures.split(":"))
    test_x, test_y = rows_of(args.data, "")
    test_x = test_x[start:stop]
    test_y = test_y[start:stop]
    results: dict[str, Any] = {}
    for name, judged in nets.items():
        model = first.model(judged)
        options = "-".join(map(str, judged.subnet.options))
        file = args.cache / f"trained-{args.trained_on:g}-seed{args.seed}-{options}.safetensors"
        begun = time.process_time()
        if file.exists():
            model.load_state_dict(load_file(file))
        else:
            trained_on(model, before, x, y, args.trained_on, args.seed)
            save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
        results[name] = {
            "network": first.told(judged),
            "supernet": judged.accuracy,
            "table_ms": judged.cost,
            "accuracy": accuracy(model, before, test_x, test_y),
            "macs": macs(partial(model, before(test_x[:2]))) / 2,
            "cpu_seconds": time.process_time() - begun,
            "model": model,
        }
        print(f"{name}: {results[name]['accuracy']:.4f}", flush=True)
    return results


def timed(results: dict[str, Any], x: Tensor, repeats: int) -> None:
    """Times of all networks in turn, at batch 64, and once more of the dense one (A/A)."""
    calls = {name: partial(row["model"], x) for name, row in results.items()}
    calls["again"] = partial(results["dense everywhere"]["model"], x)
    with torch.inference_mode():
        taken = interleaved(calls, repeats=repeats, warmup=2, clock=time.process_time)
    for name, row in results.items():
        row["ms"] = float(np.median(taken[name])) / len(x)
        row["time_of_dense"] = vars(ratio(taken[name], taken["dense everywhere"]))
        row["shown"] = str(ratio(taken[name], taken["dense everywhere"]))
    print("the dense network beside itself:", ratio(taken["again"], taken["dense everywhere"]))


def dominated_by(name: str, results: dict[str, Any]) -> list[str]:
    """The hand-made networks that are at least as accurate and as fast as a network, and better in
    one of the two.
    """
    own = results[name]
    better = []
    for other, row in results.items():
        as_good = row["accuracy"] >= own["accuracy"] and row["ms"] <= own["ms"]
        differs = (row["accuracy"], row["ms"]) != (own["accuracy"], own["ms"])
        if not other.startswith("found") and as_good and differs:
            better.append(other)
    return better


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out/one-shot"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument(
        "--rows", type=int, default=None, help="training rows; all of them where it is left out"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--judging", type=int, default=1000)
    parser.add_argument("--figures", default="5000:10000", help="test rows of the figures")
    parser.add_argument("--norm-rows", type=int, default=500)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--trained-on", type=float, default=0.5, help="epochs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    x, y = rows_of(args.data, "/train", args.rows)
    first = searched(args, x, y)
    # without exits, for a comparison with plain networks
    found = {budget: first.again(budget=budget, exits=False) for budget in args.budgets}
    other = first.again(budget=args.budgets[0], task="vehicle")

    # hand-made networks, judged in the supernet like the found ones
    nets = dict[str, Judged]()
    searcher = first.searcher
    # an internal table of the search: milliseconds of the parts, as they were measured
    (table,) = searcher.state.tables.values()
    picks = np.sort(np.random.default_rng(args.seed).permutation(len(x))[: args.norm_rows])
    for name, subnet in hand_made(first.supernet).items():
        judged = judge(first.supernet, subnet, "ten", judging(args)[0], x[picks], costs=table)
        assert judged is not None
        nets[name] = judged
    for budget, result in found.items():
        nets[f"found, budget {budget:g}"] = result.best
    results = figures(args, first, nets, x, y)
    before = off.make_preprocess("offramp:resnet20")
    assert before is not None
    timed(results, before(rows_of(args.data, "", BATCH)[0]), args.repeats)

    table_ = Table("network", "M MACs", "ms a row", "time of dense", "in the supernet", "trained")
    for name, row in results.items():
        ends = (f"{row['supernet']:.2%}", f"{row['accuracy']:.2%}")
        table_.add_row(name, f"{row['macs'] / 1e6:.1f}", f"{row['ms']:.3f}", row["shown"], *ends)
    Console(width=120).print(table_)
    for name in results:
        if name.startswith("found"):
            better = dominated_by(name, results) or ["none"]
            print(f"{name}: {results[name]['network']}")
            print(f"    dominated by {', '.join(better)}")
    tau = kendalltau(
        [row["supernet"] for row in results.values()], [row["accuracy"] for row in results.values()]
    )
    print(
        f"Kendall's tau of the supernet's ranking over {len(results)} networks: {tau.statistic:.2f}"
    )
    for result in (*found.values(), first, other):
        print(result)
    if args.json:
        told = dict[str, Any]()
        for name, row in results.items():
            told[name] = {key: value for key, value in row.items() if key != "model"}
        searches = [result.to_json() for result in (*found.values(), first, other)]
        body = {"networks": told, "searches": searches, "tau": float(tau.statistic)}
        args.json.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
