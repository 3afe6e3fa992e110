"""Exits in a small encoder of text on SST-2: promises, costs and wall-clock on padded, ragged
batches.

    python benchmarks/sst2.py --data DIR [--cache out] [--only figures|timings]
        [--engine onnxruntime] [--json FILE]

DIR holds sst2/{train,dev}.tsv. A four-layer encoder of words learns here from nothing, with an exit
after each layer, from some of the phrases in train.tsv; networks of one, two and four layers
without exits learn alike beside it (`--alone`). 500 sentences of train.tsv, and all phrases in
them, are held out: by these the best round is kept. Only dev.tsv (872 whole sentences) is drawn
like what comes later: its first half calibrates, its second gives the figures, and 200 random
halves tell how far that depends on the rows. Cost is in units of the plain four-layer network, in
MACs. Wall-clock: each batch is padded to its own longest text, for the plain network as well;
ratios are of means over the batches, of medians over repeats. ONNX Runtime compiles for a minute or
more: name it with `--engine`. Measure where nothing else runs: `--only timings` reads the cached
network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sst2_networks import network_of
from sst2_tables import show
from sst2_texts import prepared

import offramp as off
from offramp.errors import NoSafePlan

# Internal: the bound itself is measured.
from offramp.guarantees.bounds import rows_needed

# Internal: the baseline is given what the network is given.
from offramp.networks.inputs import as_inputs

# Internal: the decision rule and its float band are compared.
from offramp.plans.plan import BAND

# Internal: the same clock as `offramp bench`.
from offramp.runtime.benching import plain_of

# Internal: the bare call of an engine is the baseline.
from offramp.runtime.engine import engine_of

# Internal: times taken in turn, as in our own figures.
from offramp.runtime.measuring import interleaved, macs, ratio

LAYERS = 4
ASKED = (
    ("disagreement", 0.01),
    ("disagreement", 0.02),
    ("disagreement", 0.05),
    ("accuracy_gap", 0.03),
)
TIMED = ("disagreement", 0.02)
BUDGETS = (0.3, 0.4, 0.6, 0.8)
ENGINES = ("torch", "onnxruntime")  # to choose from: without a choice torch alone
Answered = dict[str, Any]


def trace_of(network: off.Network, specs: dict[str, str], cache: Path, engine: str) -> off.Trace:
    """All exits on dev.tsv, padded to one length, from the cache or recorded now."""
    file = cache / f"trace-sst2-{engine}.npz"
    if file.exists() and off.Trace.load(file).header.origin.network == network.fingerprint():
        return off.Trace.load(file)
    trace = off.record(network, specs["dev"], timed=False, engine=engine, progress=False)
    trace.save(file)
    return trace


def measured(trace: off.Trace, plan: off.Plan) -> dict[str, Any]:
    """Cost, accuracy, drop, disagreement and shares on rows that the plan has not seen."""
    done = trace.evaluate(plan, risk="accuracy_gap")
    price = trace.price(plan)
    exits = trace.replay(plan)
    assert done.accuracy is not None
    assert done.plain_accuracy is not None
    return {
        "cost": price.mean / price.plain,
        "worst": price.worst / price.plain,
        "accuracy": done.accuracy,
        "accuracy_gap": done.plain_accuracy - done.accuracy,
        "disagreement": float((exits.answer != trace.answers[:, -1]).mean()),
        "shares": done.shares,
    }


def halves(rows: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Calibration and figure rows: the first and the second half, then random halves."""
    rng = np.random.default_rng(20)
    middle = rows // 2
    orders = [np.arange(rows), *(rng.permutation(rows) for _ in range(count))]
    return [(order[:middle], order[middle:]) for order in orders]


def promised(
    trace: off.Trace, risk: str, level: float, drawn: Sequence[tuple[np.ndarray, np.ndarray]]
) -> Answered:
    """A promise on the fixed halves and over the random ones; where nothing is safe the plain
    network runs, at 1.
    """
    found: list[dict[str, Any]] = []
    said = ""
    for number, (rows, test) in enumerate(drawn):
        try:
            plan = off.calibrate(trace[rows], risk=risk, at_most=level)
            told = str(plan)
            found.append(measured(trace[test], plan) | {"certified": True})
        except NoSafePlan as nothing:
            told = f"NoSafePlan: {nothing}"
            found.append(
                measured(trace[test], off.Plan.never_leave(trace.topology))
                | {"certified": False, "cost": 1.0}
            )
        said = said if number else told
    fixed = found[0]
    others = found[1:] or found

    def spread(name: str) -> list[float]:
        return [
            float(each) for each in np.quantile([one[name] for one in others], [0.05, 0.5, 0.95])
        ]

    return {
        "risk": risk,
        "at_most": level,
        "rows": len(drawn[0][0]),
        "how_many": {
            f"{part:g}": rows_needed(level, 0.95, observed=level * part)
            for part in (0.0, 0.25, 0.5)
        },
        "plan": said,
        "fixed": fixed,
        "certified": float(np.mean([one["certified"] for one in others])),
        "above the level on the other half": float(np.mean([one[risk] > level for one in others])),
        **{name: spread(name) for name in ("cost", "accuracy", "accuracy_gap", "disagreement")},
    }


def figures(
    net: off.Network,
    beside: dict[int, off.Network],
    trace: off.Trace,
    specs: dict[str, str],
    count: int,
) -> Answered:
    """All but wall-clock."""
    drawn = halves(len(trace), count)
    rows, test = drawn[0]
    right = trace.answers == trace.columns["label"][:, None]
    plans = {budget: off.calibrate(trace[rows], budget=budget) for budget in BUDGETS}
    x = off.rows(specs["dev"]).take(np.arange(len(trace)))
    plain = cost_of(net.backbone, x.x)
    static = {}
    for layers, network in beside.items():
        with torch.inference_mode():
            answer = (
                network.backbone(**{name: torch.as_tensor(value) for name, value in x.x.items()})
                .argmax(1)
                .numpy()
            )
        cost = cost_of(network.backbone, x.x) / plain
        static[layers] = {
            "cost": cost,
            "all": float((answer == x.y).mean()),
            "test": float((answer == x.y)[test].mean()),
        }
    steps = [trace.prices.plain(name, unit="macs", batch=1) for name in trace.topology.exits]
    return {
        "exits": {
            name: {
                "cost": step / steps[-1],
                "all": float(right[:, index].mean()),
                "test": float(right[test, index].mean()),
            }
            for index, (name, step) in enumerate(zip(trace.topology.exits, steps, strict=True))
        },
        "static": static,
        "macs": steps[-1],
        "promises": [promised(trace, risk, level, drawn) for risk, level in ASKED],
        "budgets": {budget: measured(trace[test], plan) for budget, plan in plans.items()},
    }


def cost_of(model: torch.nn.Module, x: Any) -> float:
    """MACs of one row of the longest texts."""
    two = {name: torch.as_tensor(value[:2]) for name, value in x.items()}
    return macs(lambda: model(**two)) / 2


def ragged(rows: off.Rows, numbers: np.ndarray) -> dict[str, torch.Tensor]:
    """These rows, padded to the longest of them."""
    x = rows.take(numbers).x
    assert isinstance(x, dict)
    longest = int(x["attention_mask"].sum(1).max())
    return {name: torch.as_tensor(value[:, :longest]).contiguous() for name, value in x.items()}


def in_batches(
    rows: off.Rows, numbers: np.ndarray, size: int, most: int
) -> list[tuple[np.ndarray, Any]]:
    """Batches in the order of the rows, whole ones only, each padded to its own longest text."""
    starts = range(0, len(numbers) - size + 1, size)[:most]
    return [
        (numbers[start : start + size], ragged(rows, numbers[start : start + size]))
        for start in starts
    ]


def agreed(
    runner: off.Runner, plan: off.Plan, trace: off.Trace, batches: list[tuple[np.ndarray, Any]]
) -> Answered:
    """Rows with another exit or answer than the replay of the trace, in which all texts have one
    length.
    """
    numbers = np.concatenate([each for each, _ in batches])
    replay = trace[numbers].replay(plan)
    part = trace[numbers]
    found = [runner(x) for _, x in batches]
    exits = np.concatenate([one.exit.numpy() for one in found])
    answers = np.concatenate([one.logits.argmax(1).numpy() for one in found])
    near = np.zeros(len(numbers), bool)
    for gate, (threshold, *_) in plan.thresholds.items():
        near |= np.abs(part.columns[f"score/{gate}"] - threshold) <= BAND
    other = (exits != replay.exit) | (answers != replay.answer)
    return {
        "rows": len(numbers),
        "in the band": int(near.sum()),
        "other, outside": int((other & ~near).sum()),
    }


def over(above: np.ndarray, below: np.ndarray) -> list[float]:
    """Mean(above) / mean(below) over batches [n], with a 90 % interval by drawing batches again."""
    picks = np.random.default_rng(0).integers(0, len(above), (1000, len(above)))
    low, high = np.quantile(above[picks].mean(1) / below[picks].mean(1), [0.05, 0.95])
    return [float(above.mean() / below.mean()), float(low), float(high)]


def timed(
    net: off.Network, plan: off.Plan, trace: off.Trace, rows: off.Rows, engine: str, repeats: int
) -> Answered:
    """A plan beside the plain network on the rows of the second half, in batches of 1 and of 32."""
    runner = off.open(net, plan, engine=engine)
    found = {}
    plain_on = plain_of(net, as_inputs(next(rows.batches(2)).x), engine_of(engine)[0])
    test = np.arange(len(trace) // 2, len(trace))
    for size, most in ((1, 60), (32, 13)):
        ms = []
        batches = in_batches(rows, test, size, most)
        for _, x in batches:
            plain = plain_on(as_inputs(x))
            calls = {"plain": plain, "run": lambda x=x: runner(x), "same": plain}
            times = interleaved(calls, repeats=repeats, warmup=1)
            ms.append([np.median(times[name]) for name in calls])
        whole, run, same = np.array(ms).T
        found[str(size)] = {
            "batches": len(ms),
            "plain_ms": float(whole.mean()),
            "run_ms": float(run.mean()),
            "run/plain": over(run, whole),
            "plain/plain": over(same, whole),
            "medians: run/plain": vars(ratio(run, whole)),
        }
    return found | {"replay": agreed(runner, plan, trace, in_batches(rows, test, 32, 13))}


def halving(trace: off.Trace) -> off.Plan:
    """Thresholds at the median score of the rows that arrive: a mix of exits, where a promise may
    need but one.
    """
    here = np.ones(len(trace), bool)
    found = {}
    for index, gate in enumerate(trace.topology.gates):
        found[gate] = float(np.median(trace.scores[here, index]))
        here &= trace.scores[:, index] < found[gate]
    return off.Plan.by_hand(found)


def timings(
    net: off.Network, specs: dict[str, str], cache: Path, engines: Sequence[str], repeats: int
) -> Answered:
    """Wall-clock on each engine under a certified plan, and by hand where half leave at each
    gate.
    """
    rows = off.rows(specs["dev"])
    found = dict[str, Any]()
    for engine in engines:
        trace = trace_of(net, specs, cache, engine)
        half = trace[: len(trace) // 2]
        plans = {"half leave at each gate": halving(half)}
        try:
            risk, level = TIMED
            plans = {f"{risk} <= {level:g}": off.calibrate(half, risk=risk, at_most=level)} | plans
        except NoSafePlan as nothing:
            print(engine, nothing)
        for name, plan in plans.items():
            told = measured(trace[len(trace) // 2 :], plan)
            found[f"{engine}, {name}"] = {"macs": told["cost"], "shares": told["shares"]} | timed(
                net, plan, trace, rows, engine, repeats
            )
            print(engine, name, json.dumps(found[f"{engine}, {name}"]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("out"))
    parser.add_argument("--only", choices=("figures", "timings"))
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument(
        "--rows", type=int, nargs=2, default=(16000, 6000), help="short and long phrases that train"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="at most so many times through them (2)"
    )
    parser.add_argument(
        "--alone", type=int, nargs="*", default=(1, 2, 4), help="layers of those without exits"
    )
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3, help="of each batch (3)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    specs, words = prepared(args.data, args.cache, tuple(args.rows))
    net = network_of(specs, words, args.cache, LAYERS, False, args.rounds)
    results: Answered = {"threads": torch.get_num_threads()}
    if args.only != "timings":
        beside = {
            layers: network_of(specs, words, args.cache, layers, True, args.rounds)
            for layers in args.alone
        }
        trace = trace_of(net, specs, args.cache, "torch")
        results["figures"] = figures(net, beside, trace, specs, args.halves)
    if args.only != "figures":
        results["timings"] = timings(net, specs, args.cache, args.engine or ["torch"], args.repeats)
    show(results, Console(width=150))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
