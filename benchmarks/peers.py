"""offramp beside its peers in one run: earlyon, a whole-batch exit, and a smaller static network at equal cost.

    pip install earlyon
    python benchmarks/peers.py --data DIR [--splits 200] [--repeats 9] [--only timings|plans] [--json FILE]

Same network, weights, thresholds and rows on all sides: ResNet-56 cut at layer1 and layer2, once with exits of
earlyon's own kind (mean over positions, 128 hidden units, taught by its own trainer), once with offramp's linear_grid
exits taught by cross-entropy; for the timings also the model of earlyon's README, `resnet50_ee`, with seeded weights.
DIR holds cifar10/ and weights/ (see benchmarks/fetch.py). Rows of the test set: 0-999 fit temperatures, splits of
1,000-9,999 calibrate (4,000) and give the figures (5,000). Costs are MACs, exits and gates included, in units of plain
ResNet-56. earlyon is calibrated in every setting of peers_earlyon.py; searches are timed on logits recorded before.
A target is broken when accuracy on rows not seen falls further than asked: on the 5,000 other rows of a split, and on
all 9,000 when the 4,000 are drawn from them with replacement, where nothing is left to chance but the draw. An
uncertified plan aims at the edge and breaks about half of its targets, whoever chose it; a certified one may break 5 %.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import CALIBRATION, DEVELOPMENT, FIGURES, figures
from ladder import trace_of as ladder_trace
from peers_earlyon import SETTINGS, as_exit, calibrated, earlyon, fractions_of, own_head, taught, wrapped
from peers_speed import contest, lines, quick_start
from rich.console import Console
from rich.table import Table

import offramp as off
from exits import AT, network, scored, splits, trace_of, uncertified
from offramp.calibration.calibrating import problem_of
from offramp.calibration.search import evaluate, frontier
from offramp.errors import NoSafePlan
from offramp.factories import front_of, make_model
from offramp.fitting.lessons import roll_of
from offramp.fitting.pooling import Pooling
from offramp.gates.confidence import margin, max_prob
from offramp.guarantees.risks import find_risk
from offramp.recipe import poolable

WIDTHS = dict(zip(AT, (16, 32), strict=True))
DROPS = np.concatenate([np.linspace(-0.004, 0.01, 29), np.linspace(0.012, 0.05, 20)])  # asked of offramp's own curve
EPOCHS = 20  # of earlyon's trainer, by default


@dataclass(frozen=True)
class Chosen:
    """What one way of calibrating gives: a plan, the trace with the scores that it is for, seconds; None: no plan."""

    plan: off.Plan | None
    trace: off.Trace
    seconds: float


Way = Callable[[off.Trace, np.ndarray, np.ndarray], Chosen]  # a trace, its calibration rows, rows for temperatures


def own_kind(data: Path, cache: Path) -> off.Network:
    """ResNet-56 with heads of earlyon's kind, from the cache or taught now by earlyon on features computed once."""
    place = cache / "peers-56-heads"
    if place.exists():
        return off.load(place)
    ours, _ = network(data, cache, 56, "cross-entropy")
    train = off.rows(f"cifar10/train:{data / 'cifar10'}")
    roll = roll_of(train, progress=True)
    columns = Pooling(ours, poolable(ours), 1, None, folder=cache).features(train, roll.seen.fingerprint)
    means = {name: column[:, : WIDTHS.get(name, 10)] for name, column in columns.items()}  # means come first in a grid
    assert roll.y is not None
    heads = taught(means, roll.y, EPOCHS)
    exits = {name: as_exit(head) for name, head in zip(AT, heads, strict=True)}
    spec = "offramp:resnet56"
    model = make_model(spec, data / "weights" / "cifar10_resnet56.safetensors")
    net = off.cut(
        model, train.take(np.arange(8)).x, at=AT, exits=exits, gate="max_prob", front=front_of(spec), spec=spec
    )
    net.learned = roll.seen
    off.save(net, place)
    return net


def timings(data: Path, net: off.Network, drop: float, trace: off.Trace, repeats: int, pixels: int) -> dict[str, Any]:
    """Wall-clock on ResNet-56 with earlyon's heads and on the model of its README."""
    rows = off.rows(f"cifar10:{data / 'cifar10'}").take(np.arange(5000, 6000)).x
    assert isinstance(rows, np.ndarray)
    rung, x = net.rungs[0], torch.as_tensor(rows)
    front = net.front_of(rung)
    assert front is not None
    heads = [own_head(WIDTHS[name], net.exit_of(name)).eval() for name in AT]
    ours = contest(net.model_of(rung), front, AT, heads, x, "cifar")
    found = calibrated(
        trace[CALIBRATION], trace[DEVELOPMENT], SETTINGS["confidence"], drop, fractions_of(ours.wrapper, AT)
    )
    plan = {f"thresholds by earlyon for {drop:.1%}": [found.plan.thresholds[gate][0] for gate in AT]}
    model, enlarged = quick_start(rows[:256], pixels)
    return {
        "ResNet-56, earlyon's heads": lines(ours, x, plan, repeats),
        f"resnet50_ee at {pixels} pixels, seeded weights": lines(model, enlarged, {}, repeats),
    }


def ways(drop: float, fractions: Mapping[str, float]) -> dict[str, Way]:
    """Every way to choose thresholds for a drop of accuracy."""

    def peer(name: str) -> Way:
        def choose(trace: off.Trace, rows: np.ndarray, held: np.ndarray) -> Chosen:
            found = calibrated(trace[rows], trace[held], SETTINGS[name], drop, fractions)
            return Chosen(found.plan, found.scores(trace), found.seconds)

        return choose

    def ours(score: Callable[[torch.Tensor], torch.Tensor], *, certified: bool) -> Way:
        def choose(trace: off.Trace, rows: np.ndarray, _: np.ndarray) -> Chosen:
            whole = scored(trace, score)
            some, start, plan = whole[rows], time.perf_counter(), None
            try:
                calibrate = off.calibrate if certified else _uncertified
                plan = calibrate(some, risk="accuracy_gap", at_most=drop)
            except NoSafePlan:
                pass
            return Chosen(plan and off.Plan.by_hand(plan.thresholds), whole, time.perf_counter() - start)

        return choose

    return {
        **{f"earlyon, {name}": peer(name) for name in SETTINGS},
        "offramp, largest probability, no promise": ours(max_prob, certified=False),
        "offramp, margin, no promise": ours(margin, certified=False),
        "offramp, largest probability, certified 95 %": ours(max_prob, certified=True),
        "offramp, margin, certified 95 %": ours(margin, certified=True),
    }


def _uncertified(trace: off.Trace, *, risk: str, at_most: float) -> off.Plan:
    assert risk == "accuracy_gap"
    return uncertified(trace, at_most)


def over(
    trace: off.Trace, way: Way, drawn: list[tuple[np.ndarray, ...]], drop: float, static: off.Trace
) -> dict[str, Any]:
    """One way over many splits: cost, accuracy, its lead over the line of static networks, and targets broken."""
    rows_of, seconds, plans = [], [], 0
    for held, rows, test in drawn:
        chosen = way(trace, rows, held)
        plan = chosen.plan or off.Plan.never_leave(trace.chain)
        done = figures(chosen.trace[test], plan)
        line = static_line(static, trace, test)
        rows_of.append([done["cost"], done["drop"], done["accuracy"] - np.interp(done["cost"], *line)])
        seconds.append(chosen.seconds)
        plans += chosen.plan is not None
    cost, fall, lead = np.array(rows_of).T
    return {
        "plans": plans / len(drawn),
        "cost": np.quantile(cost, [0.05, 0.5, 0.95]).tolist(),
        "mean_cost": float(cost.mean()),
        "drop": np.quantile(fall, [0.05, 0.5, 0.95]).tolist(),
        "mean_drop": float(fall.mean()),
        "lead_over_static": np.quantile(lead, [0.05, 0.5, 0.95]).tolist(),
        "broken": float((fall > drop + 1e-9).mean()),
        "seconds": float(np.median(seconds)),
    }


def static_line(static: off.Trace, trace: off.Trace, rows: np.ndarray) -> tuple[list[float], list[float]]:
    """Costs and accuracies of the plain ResNets 20, 32 and 56 on these rows."""
    labels, whole = trace.labels, trace.price(off.Plan.never_leave(trace.chain)).plain
    assert labels is not None
    costs = [static.prices.plain(name, unit="macs", batch=1) / whole for name in static.chain.exits]
    answers = [static.columns[f"answer/{name}"] for name in static.chain.exits]
    answers.append(trace.columns["answer/" + trace.reference("last")])
    return [*costs, 1.0], [float((answer[rows] == labels[rows]).mean()) for answer in answers]


def curve(trace: off.Trace, drawn: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """offramp's uncertified plans: mean drop and mean cost on the figure rows of all splits, by the drop asked for."""
    risk, drops, costs = find_risk("accuracy_gap"), [], []
    plain = trace.price(off.Plan.never_leave(trace.chain)).plain
    for _, rows, test in drawn:
        front = frontier(problem_of(trace[rows], risk), points=400)
        places = [np.flatnonzero(front.loss_P <= max(level, front.loss_P.min()))[0] for level in DROPS]
        loss_P, cost_P = evaluate(problem_of(trace[test], risk), front.thresholds_PG[places])
        drops.append(loss_P)
        costs.append(cost_P / plain)
    return np.mean(drops, 0), np.mean(costs, 0)


def at_batch(trace: off.Trace, plan: off.Plan, batch: int) -> dict[str, float]:
    """Cost and accuracy when a batch leaves where all of its rows are sure, as earlyon and whole batches do."""
    gates = [gate for gate in trace.chain.gates if gate in plan.open_gates()]
    cost_E, last = trace.prices.to_exit(gates, None), len(trace.chain.exits) - 1
    exits = np.full(len(trace), last)
    for gate in reversed(gates):
        sure = trace.columns[f"score/{gate}"] >= np.float32(plan.thresholds[gate][0])
        for start in range(0, len(trace), batch):
            if sure[start : start + batch].all():
                exits[start : start + batch] = trace.chain.place(gate)
    right = trace.answers[np.arange(len(trace)), exits] == trace.labels
    return {"cost": float(cost_E[exits].mean() / trace.price(plan).plain), "accuracy": float(right.mean())}


def plans_of(
    trace: off.Trace, static: off.Trace, drop: float, fractions: Mapping[str, float], count: int
) -> dict[str, Any]:
    """Targets, costs and search times of all ways on one network."""
    drawn = [tuple(parts) for parts in splits(count)]
    rng = np.random.default_rng(22)
    again = [(np.arange(1000), rng.integers(1000, 10000, 4000), np.arange(1000, 10000)) for _ in range(count)]
    found, equal = dict[str, Any](), {}
    curves = {
        name: curve(scored(trace, score), drawn) for name, score in (("probability", max_prob), ("margin", margin))
    }
    for name, way in ways(drop, fractions).items():
        found[name] = over(trace, way, drawn, drop, static)
        found[name]["broken_of_population"] = over(trace, way, again, drop, static)["broken"]
        if name.startswith("earlyon"):
            at = {score: float(np.interp(found[name]["mean_drop"], *one)) for score, one in curves.items()}
            equal[name] = {"earlyon": found[name]["mean_cost"], **at}
            fixed = way(trace, np.arange(10000)[CALIBRATION], np.arange(1000))
            assert fixed.plan is not None
            found[name]["batch 64"] = at_batch(fixed.trace[FIGURES], fixed.plan, 64)
            found[name]["batch 1"] = at_batch(fixed.trace[FIGURES], fixed.plan, 1)
    return {"ways": found, "equal_accuracy": equal}


def show(results: Mapping[str, Any], console: Console) -> None:
    """A table of timings per model, then two of plans per network."""
    for title, rows in results.get("timings", {}).items():
        names = ["offramp / earlyon", "offramp / earlyon, row by row", "offramp / whole batch", "offramp / plain"]
        names += ["earlyon / plain", "plain / plain"]
        table = Table("rows", "left", "offramp ms", *names, title=title)
        for name, row in rows.items():
            cells = ["{value:.2f} [{low:.2f}, {high:.2f}]".format(**row[one]) if one in row else "" for one in names]
            table.add_row(name, "/".join(map(str, row["left"])), f"{row['ms']['offramp']:.1f}", *cells)
        console.print(table)
    for title, result in results.get("plans", {}).items():
        heads = (
            "cost: 5, 50, 95 %",
            "drop",
            "beside static",
            "broken",
            "broken of all",
            "search s",
            "cost at batch 64",
        )
        table = Table("way", *heads, title=f"{title}: accuracy may fall by {results['drop']:.1%}")
        for name, row in result["ways"].items():
            spread = [", ".join(f"{value:.3f}" for value in row[key]) for key in ("cost", "drop")]
            shares = [f"{row[key]:.0%}" for key in ("broken", "broken_of_population")]
            whole = f"{row['batch 64']['cost']:.3f}" if "batch 64" in row else f"{row['cost'][1]:.3f}"
            lead = f"{row['lead_over_static'][1]:+.2%}"
            table.add_row(name, *spread, lead, *shares, f"{row['seconds']:.3f}", whole)
        console.print(table)
        table = Table("cost at equal accuracy, no promise", "earlyon", "offramp, probability", "offramp, margin")
        for name, row in result["equal_accuracy"].items():
            table.add_row(name, *(f"{value:.3f}" for value in row.values()))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--drop", type=float, default=0.01, help="of accuracy, asked of every side (0.01)")
    parser.add_argument("--pixels", type=int, default=64, help="side of the images of resnet50_ee (64; 224 is its own)")
    parser.add_argument("--only", choices=("timings", "plans"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    net = own_kind(args.data, args.cache)
    trace = trace_of(args.data, args.cache, "peers-56-heads", lambda: net)
    results: dict[str, Any] = {"earlyon": earlyon().__version__, "torch": torch.__version__, "drop": args.drop}
    results["threads"] = torch.get_num_threads()
    if args.only != "plans":
        results["timings"] = timings(args.data, net, args.drop, trace, args.repeats, args.pixels)
    if args.only != "timings":
        ours = trace_of(
            args.data, args.cache, "56-cross-entropy", lambda: network(args.data, args.cache, 56, "cross-entropy")[0]
        )
        static = ladder_trace(args.data, args.cache, (20, 32), "own")
        heads = [own_head(WIDTHS[name]) for name in AT]
        model = wrapped(net.model_of(net.rungs[0]), AT, heads, SETTINGS["confidence"], (3, 32, 32))
        fractions = fractions_of(model, AT)
        both = {"earlyon's heads": trace, "linear_grid exits": ours}
        results["plans"] = {k: plans_of(one, static, args.drop, fractions, args.splits) for k, one in both.items()}
    show(results, Console(width=170))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
