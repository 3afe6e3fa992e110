"""What rows that repeat do to a promise, and what each way to count them does about it.

    python benchmarks/repeats.py [--draws 400] [--json FILE]

60 rows are drawn from a population of 8,000 whose true risks are known, and each is copied k times
under numbers of its own. A promise is broken when its plan has a true risk above the level; a share
of 1 - confidence may be. "independent" is wrong here, and shows what a bound makes of copies that
it takes for draws. The last lines draw from discrete data, where contents repeat by nature and
"independent" is right, and try twenty orders of the same rows.

Internals (chain, header, origin) make the population: it is no network's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import offramp as off
from offramp.errors import NoSafePlan, OverlappingRows

# Internal: a risk by its name, for losses computed here.
from offramp.guarantees.risks import find_risk

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.header import Header

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.provenance import Origin

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.topology import Node, Topology

SIZE = 8000
ROWS = 60
CLASSES = 5
LEVEL = 0.05
Array = np.ndarray[Any, np.dtype[Any]]


def population(contents: int, seed: int) -> off.Trace:
    """A small exit that is surer where it is right, and a large one, on `contents` different rows,
    SIZE in all.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, contents)
    hard = rng.random(contents)
    sure = hard + 0.15 * rng.standard_normal(contents)
    columns = {
        "digest": rng.integers(0, 2**63, contents).astype(np.uint64),
        "label": label,
        "answer/small": np.where(sure < 0.8, label, (label + 1) % CLASSES),
        "answer/large": np.where(hard < 0.95, label, (label + 2) % CLASSES),
        "score/small": (4 - 4 * hard).astype(np.float32),
    }
    every = np.arange(SIZE) if contents == SIZE else rng.choice(contents, SIZE)
    columns = {name: column[every] for name, column in columns.items()} | {"row": np.arange(SIZE)}
    prices = {
        "cost/segment/small": np.array([1.0, np.nan, np.nan]),
        "cost/segment/large": np.array([8.0, np.nan, np.nan]),
    }
    topology = Topology.chain([Node("small"), Node("large")])
    header = Header(
        topology, "large", CLASSES, "population", "0" * 16, Origin("0" * 16, "torch", "float32")
    )
    return off.Trace(columns | prices, header)


def drawn(rows: off.Trace, picked: Array) -> off.Trace:
    """Some rows, under numbers of their own."""
    some = rows[picked]
    return off.Trace({**some.columns, "row": np.arange(len(picked))}, some.header)


def measure(
    rows: off.Trace, sample: Callable[[int], off.Trace], draws: int, orders: int = 1, **asked: Any
) -> dict[str, Any]:
    """Of `draws` samples: shares that were refused, that gave a plan, and whose plan breaks the
    promise.
    """
    losses = rows.losses(find_risk(asked.get("risk", "disagreement")))
    refused = made = broken = 0
    for seed in range(draws):
        trace = sample(seed)
        rng = np.random.default_rng(seed)
        plans = []
        for _ in range(orders):
            try:
                plans.append(off.calibrate(trace[rng.permutation(len(trace))], **asked))
            except NoSafePlan:
                continue
            except OverlappingRows:
                refused += 1
                break
        if plans:
            best = min(plans, key=lambda plan: plan.price.mean)
            made += 1
            broken += bool(
                losses[np.arange(SIZE), rows.replay(best).exit].mean() > asked["at_most"]
            )
    return {"refused": refused / draws, "promised": made / draws, "broken": broken / draws}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What rows that repeat do to a promise.")
    parser.add_argument("--draws", type=int, default=400, help="calibration sets per line (400)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)
    continuous = population(SIZE, 1)
    discrete = population(60, 2)

    def copies(times: int) -> Callable[[int], off.Trace]:
        def sample(seed: int) -> off.Trace:
            rng = np.random.default_rng(seed)
            return drawn(continuous, np.repeat(rng.choice(SIZE, ROWS, replace=False), times))

        return sample

    def discretely(seed: int) -> off.Trace:
        return drawn(discrete, np.random.default_rng(seed).integers(0, SIZE, 300))

    def without_copies(seed: int) -> off.Trace:
        return drawn(continuous, np.random.default_rng(seed).choice(SIZE, 300, replace=False))

    lines: list[dict[str, Any]] = []

    def line(name: str, **found: Any) -> None:
        lines.append({"rows": name, **found})
        print(
            f"{name:<44} {found['refused']:8.1%} {found['promised']:9.1%} {found['broken']:8.2%}",
            flush=True,
        )

    print(f"{'rows':<44} {'refused':>8} {'promised':>9} {'broken':>8}")
    for times in (1, 2, 3, 10, 40):
        for repeats in (None, "once", "independent"):
            found = measure(
                continuous, copies(times), options.draws, at_most=LEVEL, repeats=repeats
            )
            line(f"{ROWS} rows {times} times, repeats={repeats}", **found)
    for bound in ("binomial", "betting"):
        asked = {"at_most": 0.1, "repeats": "independent", "bound": bound}
        line(
            f"discrete, independent, {bound}",
            **measure(discrete, discretely, options.draws, **asked),
        )
    asked = {"risk": "accuracy_gap", "at_most": LEVEL}
    line(
        "best of 20 orders", **measure(continuous, without_copies, options.draws // 4, 20, **asked)
    )
    allowed = float(stats.binom.ppf(0.999, options.draws, 0.05)) / options.draws
    print(f"allowed: {allowed:.2%} of {options.draws} draws")
    if options.json:
        options.json.write_text(
            json.dumps({"draws": options.draws, "allowed": allowed, "lines": lines}, indent=1)
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
