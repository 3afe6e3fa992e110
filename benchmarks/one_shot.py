"""One-shot search from the public ResNet-20: nets found by evolution beside hand-made ones, in
accuracy and time.

    python benchmarks/one_shot.py --data DIR [--steps 2000] [--trained-on 1]
        [--budgets 0.7 0.5 0.35] [--json FILE]

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). Each of the nine blocks may be dense, of
ghosts, of low rank, half as wide within, or (where shapes allow it) left out; exits may stand after
the first two stages. The supernet has two tasks: the ten classes, and animal or vehicle. It is
trained by single paths from the public weights. Budgets are shares of the dense network's
milliseconds for a row at the batch size. Test rows 0-999 judge during the search; rows 5,000-9,999
give the figures. Found nets and hand-made ones (one option everywhere) are trained on alike, for
`--trained-on` epochs, before they are compared. Kendall's tau says how well the supernet ranks the
networks that were trained on.
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
from scipy.stats import kendalltau
from torch import Tensor, nn

import offramp as off
from offramp.augments.images import crop_flip

# Internal: the search itself is measured; the face has no verb for it yet.
from offramp.designing.evolution import CostTable, cost_table, evolve, judge

# Internal: the training of a supernet.
from offramp.designing.single_path import reestimate, train_supernet

# Internal: the supernet itself.
from offramp.designing.supernet import Subnet, Supernet

# Internal: times taken in turn, as in our own figures, and multiply-adds.
from offramp.runtime.measuring import interleaved, macs, ratio

OPTIONS = ("dense", "ghost?ratio=2", "low_rank?energy=0.6", "narrow?by=2")
VEHICLES = (0, 1, 8, 9)
BLOCKS = tuple(f"1.layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3))
TAPS = ("1.layer1", "1.layer2")


def supernet_of(data: Path, batch: int) -> Supernet:
    """The supernet, with the public weights."""
    spec = "offramp:resnet20"
    model = off.make_model(spec, data / "weights" / "cifar10_resnet20.safetensors")
    preprocess = off.make_preprocess(spec)
    assert preprocess is not None
    choices = {}
    for name in BLOCKS:
        changes_shape = name.endswith(".0") and "layer1" not in name
        choices[name] = OPTIONS if changes_shape else (*OPTIONS, "skip")
    example = torch.zeros(batch, 3, 32, 32, dtype=torch.uint8)
    heads = {"ten": None, "vehicle": 2}
    return Supernet(
        nn.Sequential(preprocess, model), choices, example, head="1.linear", heads=heads, exits=TAPS
    )


def rows_of(data: Path, part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors."""
    rows = off.rows(f"cifar10{part}:{data / 'cifar10'}")
    batch = rows.take(np.arange(len(rows) if count is None else count))
    return torch.as_tensor(np.asarray(batch.x)), torch.as_tensor(np.asarray(batch.y))


def uniform(supernet: Supernet, option: str) -> Subnet:
    """One option at every place that has it."""
    return Subnet(tuple(names.index(option) if option in names else 0 for names in supernet.names))


def trained_on(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """SGD with momentum on a network of its own, in place."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    for _ in range(steps):
        picks = torch.from_numpy(order.integers(0, len(x), 128))
        loss = nn.functional.cross_entropy(model(crop_flip(x[picks])), y[picks])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows that a model answers right."""
    right = []
    for part, label in zip(torch.split(x, 250), torch.split(y, 250), strict=True):
        right.append((model(part).argmax(1) == label).float())
    return torch.cat(right).mean().item()


def found_by_search(
    supernet: Supernet,
    task: str,
    judging: tuple[Tensor, Tensor],
    norm: Tensor,
    table: CostTable,
    args: Any,
) -> dict[str, Any]:
    """The best network within each budget, with exits and without."""
    whole = table.whole(supernet.dense, task)
    found = {}
    for share in args.budgets:
        options = {
            "costs": table,
            "budget": share * whole,
            "population": args.population,
            "seed": args.seed,
        }
        start = time.process_time()
        search = evolve(supernet, task, judging, norm, generations=args.generations, **options)
        bare = [one for one in search.candidates if not one.subnet.exits]
        print(f"{task}, budget {share}: {supernet.told(search.best.subnet)}", flush=True)
        found[str(share)] = {
            "best": search.best,
            "bare": bare[0] if bare else None,
            "judged": len(search.candidates),
            "seconds": time.process_time() - start,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--rows", type=int, default=None, help="training rows; all of them where it is left out"
    )
    parser.add_argument("--judging", type=int, default=1000)
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--trained-on", type=int, default=1, help="epochs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    supernet = supernet_of(args.data, args.batch)
    print(f"{supernet.size:,} networks", flush=True)
    x, y = rows_of(args.data, "/train", args.rows)
    test_x, test_y = rows_of(args.data, "")
    kept = args.cache / f"one-shot-{args.steps}-{len(x)}-seed{args.seed}.pt"
    if kept.exists():
        supernet.load_state_dict(torch.load(kept, weights_only=True))
    else:
        vehicle = torch.isin(y, torch.tensor(VEHICLES)).long()
        tasks = {"ten": (x, y), "vehicle": (x, vehicle)}
        train_supernet(
            supernet, tasks, steps=args.steps, rate=0.02, augment=crop_flip, seed=args.seed
        )
        args.cache.mkdir(parents=True, exist_ok=True)
        torch.save(supernet.state_dict(), kept)
    table = cost_table(
        supernet, unit="ms", rows=args.batch, repeats=args.repeats, clock=time.process_time
    )
    judging = test_x[: args.judging], test_y[: args.judging]
    norm = x[:1000]
    found = found_by_search(supernet, "ten", judging, norm, table, args)
    vehicle_y = torch.isin(judging[1], torch.tensor(VEHICLES)).long()
    other = found_by_search(supernet, "vehicle", (judging[0], vehicle_y), norm, table, args)

    nets: dict[str, Subnet] = {
        f"{option} everywhere": uniform(supernet, option) for option in OPTIONS
    }
    for share, one in found.items():
        if one["bare"] is not None:
            nets[f"found, budget {share}"] = one["bare"].subnet
    models = dict[str, nn.Module]()
    results = dict[str, Any]()
    for name, subnet in nets.items():
        before = judge(supernet, subnet, "ten", judging, norm, costs=table)
        assert before is not None
        model = supernet.extract(subnet, "ten")
        reestimate(model, torch.split(norm, 200))
        trained_on(model, x, y, args.trained_on, args.seed)
        models[name] = model
        results[name] = {
            "supernet": before.accuracy,
            "accuracy": accuracy(model, test_x[5000:], test_y[5000:]),
            "macs": macs(partial(model, test_x[:2])) / 2,
        }
        print(name, results[name], flush=True)
    calls = {
        name: partial(model, test_x[5000 : 5000 + args.batch]) for name, model in models.items()
    }
    with torch.inference_mode():
        taken = interleaved(calls, repeats=args.repeats, warmup=1, clock=time.process_time)
    table_ = Table(
        "network", "M MACs", "ms a row", "time of dense", "in the supernet", "trained on"
    )
    for name, row in results.items():
        row["ms"] = float(np.median(taken[name])) / args.batch
        slower = ratio(taken[name], taken["dense everywhere"])
        row["time_of_dense"] = vars(slower)
        ends = (f"{row['supernet']:.2%}", f"{row['accuracy']:.2%}")
        table_.add_row(name, f"{row['macs'] / 1e6:.1f}", f"{row['ms']:.3f}", str(slower), *ends)
    Console().print(table_)
    tau = kendalltau(
        [row["supernet"] for row in results.values()], [row["accuracy"] for row in results.values()]
    )
    print(
        f"Kendall's tau of the supernet's ranking over {len(results)} networks: {tau.statistic:.2f}"
    )
    for task, by_budget in (("ten", found), ("vehicle", other)):
        for share, one in by_budget.items():
            best = one["best"]
            print(
                f"{task}, mean budget {share}: {best.accuracy:.2%} on the rows that judge, exits "
                f"{best.subnet.exits}, "
                f"{one['judged']} judged in {one['seconds']:.0f} s"
            )
    if args.json:
        told = {"networks": results, "tau": float(tau.statistic)}
        args.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
