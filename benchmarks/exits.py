"""Exits inside the public CIFAR-10 ResNets, trained on a frozen backbone: costs, promises, hinge
against cross-entropy.

    python benchmarks/exits.py --data DIR [--cache out] [--splits 200] [--json FILE]

DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). All 50,000 training rows train; rows of
the test set: 0-999 choose the regularizer, 1,000-4,999 calibrate, 5,000-9,999 give the figures;
beside them random splits of these two parts. Cost is in units of the plain ResNet-56 in MACs. A
first run takes some minutes: one pass over the training rows per model, whose pooled features are
kept in the cache, and one over the test rows per recipe.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import CALIBRATION, FIGURES, Split, figures, ladder, over_splits
from rich.console import Console
from rich.table import Table

import offramp as off

# Internal: the search itself is measured.
from offramp.calibration.calibrating import problem_of

# Internal: the search itself is measured.
from offramp.calibration.search import cheapest, frontier

# Internal: a recipe by its name, with arguments.
from offramp.fitting.training import recipe_of
from offramp.gates.confidence import margin, max_logit, max_prob, neg_entropy

# Internal: a risk by its name, for losses computed here.
from offramp.guarantees.risks import find_risk

AT = ("layer1", "layer2")
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "hinge": ("hinge", {}),
    "crammer-singer": ("hinge", {"kind": "crammer_singer"}),
    "cross-entropy": ("cross_entropy", {}),
}
SCORES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "hinge, margin": ("hinge", margin),
    "hinge, largest output (the paper's)": ("hinge", max_logit),
    "crammer-singer, margin": ("crammer-singer", margin),
    "cross-entropy, margin": ("cross-entropy", margin),
    "cross-entropy, largest probability": ("cross-entropy", max_prob),
    "cross-entropy, entropy": ("cross-entropy", neg_entropy),
}
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9)


def network(data: Path, cache: Path, depth: int, recipe: str) -> tuple[off.Network, dict[str, Any]]:
    """A ResNet cut at two places and trained, from the cache or now; and what training it took."""
    path = cache / f"exits-{depth}-{recipe}"
    told = cache / f"exits-{depth}-{recipe}.json"
    if path.exists() and told.exists():
        return off.load(path), json.loads(told.read_text())
    spec = f"offramp:resnet{depth}"
    model = off.make_model(spec, data / "weights" / f"cifar10_resnet{depth}.safetensors")
    preprocess = off.make_preprocess(spec)
    development = off.rows(f"cifar10:{data / 'cifar10'}").select(slice(0, 1000))
    net = off.cut(model, development.take(np.arange(8)).x, at=AT, preprocess=preprocess, spec=spec)
    train = off.rows(f"cifar10/train:{data / 'cifar10'}")
    train.take(np.arange(1))  # decoded once, outside the clock
    name, arguments = RECIPES[recipe]
    start = time.perf_counter()
    history = off.fit(
        net, train, recipe=recipe_of(name, **arguments), development=development, cache=cache
    )
    whole = {
        "seconds": time.perf_counter() - start,
        "solving": history.seconds,
        "history": str(history),
    }
    off.save(net, path)
    told.write_text(json.dumps(whole))
    return net, whole


def one_pass(net: off.Network, data: Path) -> float:
    """Seconds of one pass of the plain model over the training rows, timed alone."""
    member = net.members[0]
    model = net.model_of(member)
    preprocess = net.preprocess_of(member)
    train = off.rows(f"cifar10/train:{data / 'cifar10'}")
    assert preprocess is not None
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in train.batches(128):
            model(preprocess(torch.as_tensor(batch.x)))
    return time.perf_counter() - start


def only_time(data: Path, file: Path | None) -> None:
    """How long training takes, and one plain pass before and after it."""
    with tempfile.TemporaryDirectory() as empty:
        spec = "offramp:resnet56"
        bare = off.ladder(
            [
                (off.make_model(spec), off.make_preprocess(spec)),
                (off.make_model(spec), off.make_preprocess(spec)),
            ]
        )
        found = {"pass": one_pass(bare, data)}
        net, told = network(data, Path(empty), 56, "hinge")
        found |= {
            "fit": told["seconds"],
            "solving": told["solving"],
            "pass again": one_pass(net, data),
        }
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items()))
    if file:
        file.write_text(json.dumps(found, indent=1))


def trace_of(data: Path, cache: Path, name: str, make: Callable[[], off.Network]) -> off.Trace:
    """All exits on all 10,000 test rows, from the cache or recorded now."""
    file = cache / f"trace-{name}.npz"
    if not file.exists():
        off.record(make(), f"cifar10:{data / 'cifar10'}", timed=False).save(file)
    return off.Trace.load(file)


def scored(trace: off.Trace, score: Callable[[torch.Tensor], torch.Tensor]) -> off.Trace:
    """The same trace with another score of the same logits."""
    logits = {
        gate: torch.from_numpy(trace.columns[f"logits/{gate}"]) for gate in trace.topology.gates
    }
    return replace(
        trace,
        columns={**trace.columns, **{f"score/{g}": score(v).numpy() for g, v in logits.items()}},
    )


def uncertified(rows: off.Trace, at_most: float) -> off.Plan:
    """The cheapest plan whose accuracy on these rows is at most `at_most` below that of the plain
    network.
    """
    problem = problem_of(rows, find_risk("accuracy_gap"), "last", "macs", 64, None)
    found = cheapest(problem, at_most).thresholds_G
    return off.Plan.by_hand(
        {gate: float(t) for gate, t in zip(rows.topology.gates, found, strict=True)}
    )


def splits(count: int) -> list[Split]:
    """Random calibration and figure rows among rows 1,000-9,999; rows 0-999 had a part in
    training.
    """
    rng = np.random.default_rng(21)
    orders = (1000 + rng.permutation(9000) for _ in range(count))
    return [(np.arange(1000), order[:4000], order[4000:]) for order in orders]


def along(rows: off.Trace, test: off.Trace) -> list[float]:
    """Accuracy on `test` of the best plans within the budgets, chosen on `rows`."""
    problem = problem_of(rows, find_risk("error"), "last", "macs", 64, None)
    plain = rows.price(off.Plan.never_leave(rows.topology)).plain
    curve = frontier(problem, points=400)
    found = []
    for budget in BUDGETS:
        index = int(
            np.flatnonzero(curve.cost_P <= budget * plain)[
                np.argmin(curve.loss_P[curve.cost_P <= budget * plain])
            ]
        )
        plan = off.Plan.by_hand(
            dict(zip(rows.topology.gates, map(float, curve.thresholds_PG[index]), strict=True))
        )
        accuracy = test.evaluate(plan).accuracy
        assert accuracy is not None
        found.append(accuracy)
    return found


def at_equal_cost(traces: dict[str, off.Trace], count: int) -> dict[str, Any]:
    """Accuracy within budgets for every recipe and score, on the fixed split and over random
    ones.
    """
    fixed = {name: along(trace[CALIBRATION], trace[FIGURES]) for name, trace in traces.items()}
    drawn: dict[str, list[list[float]]] = {name: [] for name in traces}
    for _, rows, test in splits(count):
        for name, trace in traces.items():
            drawn[name].append(along(trace[rows], trace[test]))
    ours = np.array(drawn["hinge, margin"])
    found = {}
    for name in traces:
        behind = ours - np.array(drawn[name])
        found[name] = {
            "fixed": fixed[name],
            "median": np.median(drawn[name], axis=0).tolist(),
            "hinge_ahead": np.quantile(behind, [0.05, 0.5, 0.95], axis=0).T.tolist(),
        }
    return found


def drop(trace: off.Trace, count: int) -> dict[str, Any]:
    """The uncertified plan for a drop of one point, on the fixed split and over random ones."""
    plan = uncertified(trace[CALIBRATION], 0.01)
    drawn = [
        figures(trace[test], uncertified(trace[rows], 0.01)) for _, rows, test in splits(count)
    ]
    spread = {
        key: np.quantile([one[key] for one in drawn], [0.05, 0.5, 0.95]).tolist()
        for key in ("cost", "drop")
    }
    return {"fixed": figures(trace[FIGURES], plan) | {"plan": str(plan)}, **spread}


def rows_of_the_paper(trace: off.Trace) -> dict[str, Any]:
    """The d-gate paper's thresholds (2.5, 2.5) and (1.0, 2.0) on its own score, the largest
    output.
    """
    found = {}
    for pair in ((2.5, 2.5), (1.0, 2.0)):
        plan = off.Plan.by_hand(dict(zip(trace.topology.gates, pair, strict=True)))
        found[str(pair)] = figures(trace[FIGURES], plan)
    return found


def promises(
    trace: off.Trace, cut_ladder: off.Trace, plain_ladder: off.Trace, count: int
) -> dict[str, Any]:
    """Certified plans; thresholds of several gates are searched on rows 0-999 (or as many drawn
    ones).
    """

    def shared(rows: off.Trace, _: off.Trace) -> off.Plan:
        return off.calibrate(rows, risk="accuracy_gap", at_most=level)

    def searched(rows: off.Trace, development: off.Trace) -> off.Plan:
        return off.calibrate(rows, risk="accuracy_gap", at_most=level, search=development)

    found = dict[str, Any]()
    drawn = splits(count)
    level = 0.01
    found["cut 56: accuracy_gap <= 0.01, shared path"] = over_splits(trace, shared, drawn)
    found["cut 56: accuracy_gap <= 0.01, path found on development rows"] = over_splits(
        trace, searched, drawn
    )
    level = 0.005
    found["plain ladder 20, 56: accuracy_gap <= 0.005"] = over_splits(plain_ladder, shared, drawn)
    found["cut ladder 20, 56: accuracy_gap <= 0.005, shared path"] = over_splits(
        cut_ladder, shared, drawn
    )
    found["cut ladder 20, 56: accuracy_gap <= 0.005, found on development rows"] = over_splits(
        cut_ladder, searched, drawn
    )
    return found


def show(results: dict[str, Any], console: Console) -> None:
    """Four tables."""
    table = Table("certified", "fixed: cost", "drop", "certified", "cost: median [5 %, 95 %]")
    for name, row in results["promises"].items():
        cost = row["cost"]
        fixed = row["fixed"]
        spread = f"{cost['median']:.3f} [{cost['low']:.3f}, {cost['high']:.3f}]"
        table.add_row(
            name, f"{fixed['cost']:.3f}", f"{fixed['drop']:+.2%}", f"{row['certified']:.0%}", spread
        )
    console.print(table)
    table = Table(
        "drop <= 1 point on calibration rows, uncertified",
        "fixed: cost",
        "drop",
        "cost: 5, 50, 95 %",
        "drop",
    )
    for name, row in results["drop"].items():
        spread = [", ".join(f"{value:.3f}" for value in row[key]) for key in ("cost", "drop")]
        table.add_row(name, f"{row['fixed']['cost']:.3f}", f"{row['fixed']['drop']:+.2%}", *spread)
    console.print(table)
    table = Table("accuracy within a budget, fixed | median; hinge, margin", *map(str, BUDGETS))
    for name, row in results["equal_cost"].items():
        cells = [f"{a:.2%} | {b:.2%}" for a, b in zip(row["fixed"], row["median"], strict=True)]
        table.add_row(name, *cells)
    for name, row in list(results["equal_cost"].items())[1:]:
        ahead = (f"{mid:+.2%} [{low:+.2%}, {high:+.2%}]" for low, mid, high in row["hinge_ahead"])
        table.add_row(f"ahead of {name}", *ahead)
    console.print(table)
    table = Table("thresholds of the d-gate paper", "cost", "accuracy", "drop")
    for name, row in results["paper"].items():
        table.add_row(name, f"{row['cost']:.3f}", f"{row['accuracy']:.2%}", f"{row['drop']:+.2%}")
    console.print(table)
    for name, row in results["fitting"].items():
        console.print(
            f"{name}: fit {row['seconds']:.1f} s, of which solving {row['solving']:.1f} "
            f"s\n{row['history']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument(
        "--only-time", action="store_true", help="train once without a cache, and time a plain pass"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.only_time:
        return only_time(args.data, args.json)
    nets = {name: network(args.data, args.cache, 56, name) for name in RECIPES}
    traces = {
        name: trace_of(args.data, args.cache, f"56-{name}", lambda n=name: nets[n][0])
        for name in RECIPES
    }
    small = network(args.data, args.cache, 20, "hinge")
    both = trace_of(
        args.data,
        args.cache,
        "cut-20-56",
        lambda: off.ladder({"resnet20": small[0], "resnet56": nets["hinge"][0]}),
    )
    plain = trace_of(args.data, args.cache, "20-56-own", lambda: ladder(args.data, (20, 56), "own"))
    each = {name: scored(traces[recipe], score) for name, (recipe, score) in SCORES.items()}
    results: dict[str, Any] = {
        "fitting": {name: told for name, (_, told) in nets.items()} | {"resnet20, hinge": small[1]},
        "promises": promises(traces["hinge"], both, plain, args.splits),
        "drop": {name: drop(trace, args.splits) for name, trace in traces.items()},
        "equal_cost": at_equal_cost(each, args.splits),
        "paper": rows_of_the_paper(each["hinge, largest output (the paper's)"]),
    }
    show(results, Console(width=170))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return None


if __name__ == "__main__":
    main()
