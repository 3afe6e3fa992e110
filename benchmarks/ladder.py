"""Ladders of the public CIFAR-10 ResNets: promises, costs and accuracies, on one split and over 200
random ones.

    python benchmarks/ladder.py --data DIR [--cache out] [--splits 200] [--draws 1000] [--json FILE]

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). Rows of the test set: 1,000-4,999
calibrate, 5,000-9,999 give the figures; the random splits have the same sizes. Cost is in units of
plain ResNet-56, in MACs. A first run records every exit on all 10,000 rows and keeps the traces in
the cache (some minutes on a laptop).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import offramp as off
from offramp.errors import NoSafePlan

# Internal: a risk by its name, for losses computed here.
from offramp.guarantees.risks import find_risk

DEVELOPMENT = slice(0, 1000)
CALIBRATION = slice(1000, 5000)
FIGURES = slice(5000, 10000)
BUDGETS = (0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.70, 0.75)
Calibrate = Callable[[off.Trace, off.Trace], off.Plan]
Split = tuple[np.ndarray, np.ndarray, np.ndarray]  # development, calibration and figure rows


def ladder(data: Path, depths: tuple[int, ...], answer: str) -> off.Network:
    """The ladder of these depths, from the public weights."""
    members: dict[str, Any] = {}
    for depth in depths:
        name = f"resnet{depth}"
        model = off.make_model(f"offramp:{name}", data / "weights" / f"cifar10_{name}.safetensors")
        members[name] = (model, off.make_preprocess(f"offramp:{name}"))
    return off.ladder(members, answer=answer).eval()


def trace_of(data: Path, cache: Path, depths: tuple[int, ...], answer: str) -> off.Trace:
    """All exits on all 10,000 test rows, from the cache or recorded now."""
    file = cache / f"trace-{'-'.join(map(str, depths))}-{answer}.npz"
    if not file.exists():
        off.record(ladder(data, depths, answer), f"cifar10:{data / 'cifar10'}", timed=False).save(
            file
        )
    return off.Trace.load(file)


def splits(count: int) -> list[Split]:
    """Random development, calibration and figure rows, of the sizes of the fixed split."""
    rng = np.random.default_rng(20)
    orders = (rng.permutation(10000) for _ in range(count))
    return [(order[:1000], order[1000:5000], order[5000:]) for order in orders]


def figures(trace: off.Trace, plan: off.Plan) -> dict[str, float]:
    """Cost, accuracy and its drop on rows that the plan has not seen."""
    done = trace.evaluate(plan, risk="accuracy_gap", reference="backbone")
    price = trace.price(plan, reference="backbone")
    assert done.accuracy is not None
    assert done.plain_accuracy is not None
    answers = trace.replay(plan).answer
    reference = trace.columns["answer/" + trace.reference("backbone")]
    return {
        "cost": price.mean / price.plain,
        "accuracy": done.accuracy,
        "drop": done.plain_accuracy - done.accuracy,
        "disagreement": float((answers != reference).mean()),
    }


def over_splits(trace: off.Trace, calibrate: Calibrate, drawn: Sequence[Split]) -> dict[str, Any]:
    """One way to calibrate, on the fixed split and over random ones."""
    try:
        plan = calibrate(trace[CALIBRATION], trace[DEVELOPMENT])
        fixed = figures(trace[FIGURES], plan) | {"plan": str(plan)}
    except NoSafePlan as nothing:
        fixed = {
            "plan": str(nothing),
            "cost": 1.0,
            "drop": 0.0,
            "disagreement": 0.0,
            "accuracy": float("nan"),
        }
    costs = []
    found = []
    start = time.perf_counter()
    for development, rows, test in drawn:
        try:
            found.append(figures(trace[test], calibrate(trace[rows], trace[development])))
            costs.append(found[-1]["cost"])
        except NoSafePlan:
            costs.append(1.0)
    low, middle, high = np.quantile(costs, [0.05, 0.5, 0.95])
    return {
        "fixed": fixed,
        "certified": len(found) / len(drawn),
        "cost": {"median": middle, "low": low, "high": high, "mean": float(np.mean(costs))},
        "cost_when_certified": float(np.median([one["cost"] for one in found])) if found else None,
        "drop": float(np.median([one["drop"] for one in found])) if found else None,
        "seconds_each": (time.perf_counter() - start) / len(drawn),
    }


def promises(
    two: off.Trace, three: off.Trace, mean: off.Trace, count: int, few: int
) -> dict[str, Any]:
    """The certified plans of the results page."""

    def gap(at_most: float, **more: Any) -> Calibrate:
        return lambda rows, _: off.calibrate(rows, risk="accuracy_gap", at_most=at_most, **more)

    def searched(rows: off.Trace, development: off.Trace) -> off.Plan:
        return off.calibrate(rows, risk="accuracy_gap", at_most=0.005, search=development)

    def agree(rows: off.Trace, _: off.Trace) -> off.Plan:
        return off.calibrate(rows, risk="disagreement", at_most=0.01)

    many = splits(count)
    some = splits(few)
    return {
        "20, 56: accuracy_gap <= 0.005": over_splits(two, gap(0.005), many),
        "20, 56: disagreement <= 0.01": over_splits(two, agree, many),
        "20, 56, mean: accuracy_gap <= 0 (backbone)": over_splits(
            mean, gap(0.0, reference="backbone"), many
        ),
        "20, 56: accuracy_gap <= 0.005, few": over_splits(two, gap(0.005), some),
        "20, 32, 56: accuracy_gap <= 0.005, shared path": over_splits(three, gap(0.005), some),
        "20, 32, 56: accuracy_gap <= 0.005, path found on development rows": over_splits(
            three, searched, some
        ),
        "20, 32, 56: accuracy_gap <= 0.005, Pareto": over_splits(
            three, gap(0.005, testing="pareto"), some
        ),
    }


def budgets(traces: dict[str, off.Trace]) -> list[dict[str, Any]]:
    """The best plan within each budget, chosen on calibration rows, against the line through the
    static networks.
    """
    three = traces["20, 32, 56"][FIGURES]
    right = {
        name: float((three.columns[f"answer/{name}"] == three.labels).mean())
        for name in three.topology.exits
    }
    prices = three.prices
    plain = prices.plain("resnet56", unit="macs", batch=1)
    costs = [prices.plain(name, unit="macs", batch=1) / plain for name in three.topology.exits]
    rows = []
    for budget in BUDGETS:
        row: dict[str, Any] = {
            "budget": budget,
            "static": float(np.interp(budget, costs, list(right.values()))),
        }
        for name, trace in traces.items():
            plan = off.calibrate(trace[CALIBRATION], budget=budget, reference="backbone")
            row[name] = figures(trace[FIGURES], plan)
        rows.append(row)
    return rows


def real_promises(trace: off.Trace, draws: int, n: int) -> dict[str, Any]:
    """Calibration rows drawn with replacement from all 10,000; broken: the risk over all of them is
    above the level.
    """
    rng = np.random.default_rng(7)
    asked = [
        ("accuracy_gap", 0.01, None),
        ("disagreement", 0.02, None),
        ("disagreement", 0.02, "betting"),
    ]
    found = {}
    for risk, level, bound in asked:
        losses = trace.losses(find_risk(risk))
        broken = certified = 0
        for _ in range(draws):
            try:
                rows = trace[rng.integers(0, 10000, n)]
                # each draw is a row of its own
                sample = off.Trace({**rows.columns, "row": np.arange(n)}, rows.header)
                plan = off.calibrate(
                    sample, risk=risk, at_most=level, bound=bound, repeats="independent"
                )
            except NoSafePlan:
                continue
            certified += 1
            broken += bool(losses[np.arange(10000), trace.replay(plan).exit].mean() > level)
        name = f"{risk} <= {level:g}, {bound or 'default'} bound, {n:,} rows"
        found[name] = {"draws": draws, "certified": certified / draws, "broken": broken / draws}
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Three tables."""
    table = Table(
        "promise",
        "fixed: cost",
        "drop",
        "certified",
        "cost: median [5 %, 95 %]",
        "mean",
        title="Certified",
    )
    for name, row in results["promises"].items():
        cost = row["cost"]
        fixed = row["fixed"]
        spread = f"{cost['median']:.3f} [{cost['low']:.3f}, {cost['high']:.3f}]"
        mean = f"{cost['mean']:.3f}"
        table.add_row(
            name,
            f"{fixed['cost']:.3f}",
            f"{fixed['drop']:+.2%}",
            f"{row['certified']:.0%}",
            spread,
            mean,
        )
    console.print(table)
    names = [key for key in results["budgets"][0] if key not in ("budget", "static")]
    table = Table(
        "budget",
        "static line",
        *names,
        title="Best accuracy within a budget (no promise), fixed split",
    )
    for row in results["budgets"]:
        cells = (
            f"{row[n]['accuracy']:.2%} at {row[n]['cost']:.3f} "
            f"({row[n]['accuracy'] - row['static']:+.2%})"
            for n in names
        )
        table.add_row(f"{row['budget']:.2f}", f"{row['static']:.2%}", *cells)
    console.print(table)
    table = Table("promise on real logits", "draws", "certified", "broken (allowed 5 % + slack)")
    for name, row in results["real"].items():
        table.add_row(name, str(row["draws"]), f"{row['certified']:.1%}", f"{row['broken']:.1%}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument(
        "--few", type=int, default=20, help="splits of the comparison of ladders (20)"
    )
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    three = trace_of(args.data, args.cache, (20, 32, 56), "own")
    two = trace_of(args.data, args.cache, (20, 56), "own")
    mean = trace_of(args.data, args.cache, (20, 56), "mean")
    results = {
        "promises": promises(two, three, mean, args.splits, args.few),
        "budgets": budgets({"20, 56": two, "20, 56, mean": mean, "20, 32, 56": three}),
        "real": real_promises(two, args.draws, 1000),
    }
    show(results, Console(width=150))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
