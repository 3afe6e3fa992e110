"""Does a saturated score cost certified plans anything? Beside quantiles of other rows, which know
where scores lie.

    python benchmarks/power.py [--draws 25] [--rows 2000] [--at-most 0.02] [--json FILE]

Twenty made-up populations (`populations`): at their first exit 0 to 90 % of all rows have a softmax
of exactly 1.0 in float32, and among them are a few that the network answers otherwise. Four gates
score their logits: max_prob, margin, patience and neg_entropy. Each draw of rows is calibrated
(disagreement, 95 %), and its plan is priced and judged on the whole population, where every risk is
known.

Beside it stands fixed-sequence testing over 1,000 quantiles of the scores of other rows, one
threshold shared by all gates (`shared`) or a quantile of each gate's own scores (`own`). Both are
corrected as `calibrate` is: the walk returns a plan that passed, and a row within the float band of
a threshold counts with the worse of its outcomes. `above` is by how much the certified cost lies
above the cheaper of the two. `broken` is the share of draws whose plan has a true risk above the
level, which may be 5 % and the luck of so many draws.

Shapes: M rows of a population, N rows of a draw, G gates, E exits, P plans, C classes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import offramp as off
from offramp import Trace
from offramp.errors import NoSafePlan
from offramp.gates.confidence import margin, max_prob, neg_entropy
from offramp.gates.patience import Patience

# Internal: a gate of our own functions, as the shelf makes it.
from offramp.networks.nodes import Scorer, Seen

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.header import Header

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.provenance import Origin

# Internal: a trace of made-up rows is put together by hand.
from offramp.plans.topology import Node, Topology

Array = np.ndarray[Any, np.dtype[Any]]

TIES = (0.0, 0.3, 0.5, 0.7, 0.9)  # share of rows saturated at the first exit
EXITS = (3, 5)
SURE_ERRORS = (
    0.0,
    0.004,
)  # share of saturated rows that are answered otherwise than by the last exit
CLASSES = 10
SATURATED = 19.0  # a margin from which on the softmax of ten classes is 1.0 in float32
GATES = ("max_prob", "margin", "patience", "neg_entropy")
QUANTILES = 1000
CONFIDENCE = 0.95
WORSE = 0.02  # what the certified cost may lie above the comparison


@dataclass(frozen=True)
class Population:
    """Logits of every exit for every row."""

    name: str
    logits: tuple[Array, ...]  # [M, C] float32, shallow to deep


def populations(size: int) -> Iterator[Population]:
    """Every combination of tie share, number of exits and errors among the sure."""
    for seed, (ties, exits, sure_errors) in enumerate(product(TIES, EXITS, SURE_ERRORS)):
        rng = np.random.default_rng(seed)
        hard_M = rng.random(size)
        label_M = rng.integers(0, CLASSES, size)
        logits = []
        for number in range(exits):
            depth = number / (exits - 1)
            ready_M = 1 - hard_M + 0.1 * rng.standard_normal(size)
            # 1 at the quantile that was asked for, from where on the softmax is saturated
            ready_M /= np.quantile(ready_M, 1 - ties) if ties else 1.1 * ready_M.max()
            # deeper exits are surer, and less often wrong where they are not sure
            margin_M = SATURATED * np.clip(ready_M, 0.01, None) ** (3 - 2 * depth)
            wrong_M = (1 - depth) / (1 + np.exp((ready_M - 0.6 + 0.2 * depth) / 0.06))
            wrong_M = np.where(margin_M >= SATURATED, sure_errors * (depth < 1), wrong_M)
            other_M = (label_M + rng.integers(1, CLASSES, size)) % CLASSES
            answer_M = np.where(rng.random(size) < wrong_M, other_M, label_M)
            values = 0.5 * rng.standard_normal((size, CLASSES))
            values[np.arange(size), answer_M] = -np.inf
            values[np.arange(size), answer_M] = values.max(1) + margin_M
            logits.append(values.astype(np.float32))
        yield Population(f"{ties:.0%} ties, {exits} exits, {sure_errors:.1%}", tuple(logits))


def trace_of(population: Population, gate: str) -> Trace:
    """The population as a recording with this gate at every exit but the last."""
    names = tuple(f"exit{number}" for number in range(len(population.logits)))
    logits = {
        name: torch.from_numpy(values)
        for name, values in zip(names, population.logits, strict=True)
    }
    size = len(population.logits[0])
    columns: dict[str, Any] = {"row": np.arange(size), "digest": np.arange(size).astype(np.uint64)}
    declared = {}
    functions = {"max_prob": max_prob, "margin": margin, "neg_entropy": neg_entropy}
    for index, name in enumerate(names):
        columns[f"answer/{name}"] = population.logits[index].argmax(1)
        columns[f"cost/segment/{name}"] = np.array([1.0, np.nan, np.nan])
        if name == names[-1]:
            continue
        columns[f"cost/exit/{name}"] = np.array([0.02, np.nan, np.nan])
        if gate == "patience":
            scorer = Patience(names[:index])
        else:
            scorer = Scorer(gate, functions[gate])
        seen = Seen(logits[name], logits, logits[name])
        columns[f"score/{name}"] = scorer.score(seen).numpy()
        declared[name] = scorer.score_range()
    nodes = [
        Node(name, after=tuple(names[max(index - 1, 0) : index]))
        for index, name in enumerate(names)
    ]
    topology = Topology.chain(nodes)
    origin = Origin(population.name, "torch", "float32")
    return Trace(
        columns, Header(topology, names[-1], CLASSES, population.name, "0", origin, scores=declared)
    )


@dataclass(frozen=True)
class Known:
    """What every plan does on the population."""

    scores_MG: Array
    losses_ME: Array  # int8
    cost_E: Array

    def of(self, thresholds_G: Array) -> tuple[float, float]:
        """True risk and mean cost of a plan, as a share of the plain network."""
        exits_M = np.full(len(self.losses_ME), len(self.cost_E) - 1)
        for gate in reversed(range(len(thresholds_G))):
            exits_M[self.scores_MG[:, gate] >= thresholds_G[gate]] = gate
        risk = float(self.losses_ME[np.arange(len(exits_M)), exits_M].mean())
        heads = 0.02 * np.minimum(exits_M + 1, len(self.cost_E) - 1)
        return risk, float((self.cost_E[exits_M] + heads).mean() / self.cost_E[-1])


def known(trace: Trace) -> Known:
    """Losses by disagreement with the last exit."""
    answers = trace.answers
    losses_ME = (answers != answers[:, -1:]).astype(np.int8)
    return Known(trace.scores, losses_ME, np.arange(1.0, answers.shape[1] + 1))


def tested(
    scores_NG: Array, losses_NE: Array, plans_PG: Array, at_most: float, band: float
) -> Array | None:
    """The last of the leading plans that pass the exact test, ties with the band counted as the
    worse outcome.
    """
    worst_PN = np.broadcast_to(losses_NE[:, -1], (len(plans_PG), len(losses_NE)))
    for gate in reversed(range(scores_NG.shape[1])):
        distance_PN = scores_NG[:, gate].astype(np.float64) - plans_PG[:, [gate]].astype(np.float64)
        here_N = losses_NE[:, gate]
        undecided_PN = np.where(distance_PN >= -band, np.maximum(here_N, worst_PN), worst_PN)
        worst_PN = np.where(distance_PN > band, here_N, undecided_PN)
    p_P = stats.binom.cdf(worst_PN.sum(1, dtype=np.int64), len(losses_NE), at_most)
    passed = np.logical_and.accumulate(p_P <= 1 - CONFIDENCE).sum()
    return plans_PG[passed - 1] if passed else None


def quantiles(scores_NG: Array, kind: str) -> Array:
    """Plans [P, G] at quantiles of these rows' scores, from the highest down."""
    shares = np.linspace(1, 0, QUANTILES)
    if kind == "own":
        return np.quantile(scores_NG, shares, axis=0).astype(np.float32)
    shared = np.unique(np.quantile(scores_NG, shares).astype(np.float32))[::-1]
    return np.repeat(shared[:, None], scores_NG.shape[1], axis=1)


def compared(population: Population, gate: str, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: mean cost and broken promises of each way."""
    trace = trace_of(population, gate)
    whole = known(trace)
    rng = np.random.default_rng(options.seed)
    results: dict[str, list[tuple[float, float]]] = {"offramp": [], "shared": [], "own": []}
    most = 0.0
    for _ in range(options.draws):
        rows = rng.permutation(len(trace))
        drawn = rows[: options.rows]
        others = rows[options.rows : 3 * options.rows]
        try:
            plan = off.calibrate(trace[drawn], at_most=options.at_most, confidence=CONFIDENCE)
            thresholds_G = np.array([t for (t,) in plan.thresholds.values()], np.float32)
            assert plan.price is not None
            most = max(most, plan.price.mean / plan.price.plain)
            never = not plan.open_gates()
            results["offramp"].append((0.0, 1.0) if never else whole.of(thresholds_G))
        except NoSafePlan:
            results["offramp"].append((0.0, 1.0))
        for kind in ("shared", "own"):
            plans_PG = quantiles(whole.scores_MG[others], kind)
            scores_NG = whole.scores_MG[drawn]
            band = trace.header.origin.band
            found_G = tested(scores_NG, whole.losses_ME[drawn], plans_PG, options.at_most, band)
            results[kind].append(
                (0.0, 1.0) if found_G is None else min(whole.of(found_G), (0.0, 1.0), key=_cost)
            )
    cost = {kind: float(np.mean([price for _, price in each])) for kind, each in results.items()}
    broken = {
        kind: float(np.mean([risk > options.at_most for risk, _ in each]))
        for kind, each in results.items()
    }
    first = trace.columns["score/exit0"]
    top = np.unique(first, return_counts=True)[1].max() / len(first)
    above = cost["offramp"] / min(cost["shared"], cost["own"]) - 1
    return {
        "population": population.name,
        "gate": gate,
        "largest_tie": float(top),
        "cost": cost,
        "broken": broken,
        "above": above,
        "dearest": most,
    }


def _cost(pair: tuple[float, float]) -> float:
    return pair[1]


def shown(line: dict[str, Any]) -> str:
    cost = line["cost"]
    broken = line["broken"]
    return (
        f"| {line['population']} | {line['gate']} | {line['largest_tie']:.0%} | "
        f"{cost['offramp']:.3f} | "
        f"{cost['shared']:.3f} | {cost['own']:.3f} | {line['above']:+.1%} | "
        f"{broken['offramp']:.0%} | "
        f"{max(broken['shared'], broken['own']):.0%} |"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Certified cost where scores saturate, beside quantiles of other rows."
    )
    parser.add_argument("--draws", type=int, default=25, help="calibration sets per line (25)")
    parser.add_argument("--rows", type=int, default=2000, help="rows per calibration set (2000)")
    parser.add_argument("--size", type=int, default=60_000, help="rows per population (60000)")
    parser.add_argument("--at-most", type=float, default=0.02, help="level of every promise (0.02)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)
    started = time.process_time()
    lines = []
    print(
        "| population | gate | largest tie | certified | shared | own | above | broken | theirs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for population in populations(options.size):
        for gate in GATES:
            lines.append(compared(population, gate, options))
            print(shown(lines[-1]), flush=True)
    draws = options.draws * len(lines)
    broken = float(np.mean([line["broken"]["offramp"] for line in lines]))
    allowed = stats.binom.ppf(0.999, draws, 1 - CONFIDENCE) / draws
    above = max(line["above"] for line in lines)
    dearest = max(line["dearest"] for line in lines)
    print(
        f"{len(lines)} lines of {options.draws} draws: at most {above:+.1%} above, dearest plan "
        f"{dearest:.3f}, "
        f"{broken:.2%} of {draws:,} promises broken (allowed {allowed:.2%}), "
        f"{time.process_time() - started:.0f} CPU s"
    )
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1) + "\n")
    return 0 if above <= WORSE and dearest <= 1 and broken <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
