"""Does a promise hold? Draw many calibration sets from populations whose true risks are known, and
count.

    python benchmarks/promises.py [--data DIR] [--json FILE]

Every valid risk x bound x testing, on populations made to be hard: the risk is not monotone along
the path and stands a hair above the level at its edge. A promise is broken when the plan returned
has a true risk above the level; the share of draws in which that happens may be 1 - confidence,
plus the luck of so many draws. `--data DIR` adds populations of your own rows: `.npz` files with
scores [M, E-1], answers [M, E], labels [M].

Shapes: M rows of a population, N rows of a draw, E exits, P plans along the path.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

# Internal: the search itself is measured.
from offramp.calibration.calibrating import SEARCH_SHARE

# Internal: the order in which candidates are tested is measured.
from offramp.calibration.candidates import in_order

# Internal: the bound itself is measured.
from offramp.guarantees.bounds import Bound, find_bound

# Internal: a risk by its name, for losses computed here.
from offramp.guarantees.risks import NAMED, Risk, losses_of

# Internal: the tests themselves are measured.
from offramp.guarantees.testing import fixed_sequence, order_from, split_from

# Internal: the decision rule and its float band are compared.
from offramp.plans.plan import choose

FloatArray = npt.NDArray[np.float64]
COSTS = (0.2, 0.5, 1.0)
PLANS = 40
EDGE = 12
ROWS = 20_000


@dataclass(frozen=True)
class Population:
    """Rows whose every risk is known, and a path of one shared threshold fixed beforehand (first:
    +inf).
    """

    name: str
    scores_MG: npt.NDArray[np.float32]
    answers_ME: npt.NDArray[np.int64]
    labels_M: npt.NDArray[np.int64]
    path_P: npt.NDArray[np.float32]
    edge: int  # the plan whose true risk stands a hair above the level

    @cached_property
    def exits_PM(self) -> npt.NDArray[np.int64]:
        """Where each row leaves under each plan."""
        gates = self.scores_MG.shape[1]
        return np.stack(
            [choose(self.scores_MG, np.full(gates, t, np.float32)) for t in self.path_P]
        )

    def losses_PM(self, risk: Risk) -> npt.NDArray[Any]:
        losses_ME = losses_of(risk, self.answers_ME, self.labels_M, self.answers_ME.shape[1] - 1)
        small_ME = losses_ME.astype(np.int8) if risk.values else losses_ME
        return small_ME[np.arange(len(small_ME)), self.exits_PM]

    def costs_P(self) -> FloatArray:
        exits = self.answers_ME.shape[1]
        if exits == len(COSTS):
            cost_E = np.array(COSTS)
        else:
            cost_E = np.arange(1, exits + 1) / exits
        costs_P: FloatArray = cost_E[self.exits_PM].mean(axis=1)
        return costs_P


# A testing sees one draw's losses [P, N], each plan's cost and a function losses -> p-values (of
# any of its plans, on any of its rows), and returns the plan that it promises, or None. Further
# ones (a split into search and certify rows) go beside `fixed_path`.
PValues = Callable[[npt.NDArray[Any]], FloatArray]
Testing = Callable[[npt.NDArray[Any], FloatArray, PValues, float, str], "int | None"]


def fixed_path(
    losses_PN: npt.NDArray[Any],
    costs_P: FloatArray,
    p_values: PValues,
    delta: float,
    fingerprint: str,
) -> int | None:
    """Fixed-sequence testing along the path, on all rows."""
    count = fixed_sequence(p_values(losses_PN), delta)
    return count - 1 if count else None


@dataclass(frozen=True)
class Outcome:
    broken: float  # share of draws whose plan has a true risk above the level
    promised: float  # share of draws with a plan at all
    mean_cost: float  # of the plans returned; a draw without one costs 1


def pareto(
    losses_PN: npt.NDArray[Any],
    costs_P: FloatArray,
    p_values: PValues,
    delta: float,
    fingerprint: str,
) -> int | None:
    """Candidates ordered on 40 % of the rows as `calibrate` orders them, tested on the others."""
    searched, certified = split_from(fingerprint, losses_PN.shape[1], SEARCH_SHARE)
    order = in_order(p_values(losses_PN[:, searched]), costs_P)
    safe = order[: fixed_sequence(p_values(losses_PN[np.ix_(order, certified)]), delta)]
    return int(safe[np.argmin(costs_P[safe])]) if len(safe) else None


def simulate(
    risk: Risk,
    bound: Bound,
    draw: Population,
    *,
    n: int,
    draws: int,
    level: float,
    delta: float,
    seed: int,
    test: Testing = fixed_path,
) -> Outcome:
    """Calibrate on `draws` samples of n rows and look up what was promised in the population."""
    losses_PM = draw.losses_PM(risk)
    costs_P = draw.costs_P()
    true_P = losses_PM.mean(axis=1, dtype=np.float64)
    rng = np.random.default_rng(seed)
    plans = []
    for i in range(draws):
        fingerprint = f"{draw.name}/{seed}/{i}"

        def p_values(losses_PN: npt.NDArray[Any], fingerprint: str = fingerprint) -> FloatArray:
            order = order_from(fingerprint, losses_PN.shape[1])
            return bound(losses_PN, level, low=risk.low, high=risk.high, delta=delta, order=order)

        losses_PN = losses_PM.take(rng.integers(losses_PM.shape[1], size=n), axis=1)
        plans.append(test(losses_PN, costs_P, p_values, delta, fingerprint))
    some = np.array([plan for plan in plans if plan is not None], dtype=np.intp)
    cost = (costs_P[some].sum() + draws - len(some)) / draws
    return Outcome(float((true_P[some] > level).sum() / draws), len(some) / draws, float(cost))


def hard_level(risk: Risk, population: Population) -> float:
    """A level just under the true risk at the population's edge."""
    return float(population.losses_PM(risk)[population.edge].mean(dtype=np.float64)) * (1 - 1e-4)


def steady(
    name: str, seed: int, better: int, bumps: tuple[tuple[int, int, int], ...]
) -> Population:
    """A population from its risk curve: `bumps` are (from plan, to plan, rows that are wrong in
    between).

    Bump rows leave wrongly at exit 2 from the first plan on, and rightly at exit 1 from the second
    on. `better` rows are answered wrongly by the reference and rightly by exit 1, from just before
    the edge on. The rest is answered alike by all exits and leaves anywhere.
    """
    rng = np.random.default_rng(seed)
    labels_M = rng.integers(5, size=ROWS)
    answers_ME = np.repeat(labels_M[:, None], 3, axis=1)
    # the plan from which on a gate lets the row leave
    leaves_MG = rng.integers(1, 2 * PLANS, size=(ROWS, 2))
    start = 0
    for first, last, rows in bumps:
        bump = slice(start, start := start + rows)
        answers_ME[bump, 1] = (labels_M[bump] + rng.integers(1, 5, size=rows)) % 5
        leaves_MG[bump] = (last, first)
    saved = slice(start, start := start + better)
    answers_ME[saved, 1:] = ((labels_M[saved] + 1) % 5)[:, None]
    leaves_MG[saved] = rng.integers(EDGE - 3, EDGE, size=(better, 1))
    always = slice(start, start + ROWS // 50)
    # wrong everywhere: an error, never a gap
    answers_ME[always] = ((labels_M[always] + 1) % 5)[:, None]
    path_P = np.append(np.inf, np.arange(PLANS - 1, 0, -1)).astype(np.float32)
    return Population(
        name, (PLANS - leaves_MG).astype(np.float32), answers_ME, labels_M, path_P, EDGE
    )


def populations(data: Path | None) -> Iterator[Population]:
    far = 2 * PLANS
    yield steady("edge", 1, 0, ((3, far, 300), (EDGE, far, 700)))
    yield steady(
        "waves",
        2,
        0,
        ((3, far, 200), (6, 9, 100), (EDGE, far, 740), (EDGE, 16, 60), (20, 24, 65), (28, far, 70)),
    )
    yield steady("mixed", 3, 400, ((3, far, 200), (5, 8, 200), (EDGE, far, 1200), (25, far, 1500)))
    for file in sorted(data.glob("*.npz")) if data else ():
        with np.load(file, allow_pickle=False) as npz:
            scores = npz["scores"].astype(np.float32)
            steps = np.quantile(scores[np.isfinite(scores)], np.linspace(1, 0, PLANS)[1:])
            path_P = np.append(np.inf, np.unique(steps)[::-1]).astype(np.float32)
            yield Population(
                file.stem, scores, npz["answers"], npz["labels"], path_P, len(path_P) // 2
            )


def distance(answers: Any, labels: Any, reference: int) -> Any:
    """A user's own risk, neither 0/1 nor symmetric: how far the answer is from the label, 0 to
    1.
    """
    return (np.minimum(np.abs(answers - labels[:, None]), 4) / 4) ** 2


RISKS = (*NAMED, Risk("distance", 0.0, 1.0, True, False, distance))


def measure(
    data: Path | None, n: int, draws: int, confidence: float, seed: int
) -> Iterator[dict[str, Any]]:
    """One row of the table per population, risk, bound and testing."""
    delta = 1 - confidence
    allowed = float(stats.binom.ppf(0.999, draws, delta)) / draws
    for population in populations(data):
        for risk in RISKS:
            level = hard_level(risk, population)
            for name, test in product(
                ("binomial", "hoeffding_bentkus", "betting"), (fixed_path, pareto)
            ):
                if level <= max(risk.low, 0.0) or (name == "binomial" and not risk.binary):
                    continue
                bound = find_bound(name, risk)
                outcome = simulate(
                    risk,
                    bound,
                    population,
                    n=n,
                    draws=draws,
                    level=level,
                    delta=delta,
                    seed=seed,
                    test=test,
                )
                yield {
                    "population": population.name,
                    "risk": risk.name,
                    "bound": name,
                    "testing": test.__name__,
                    "level": level,
                    **asdict(outcome),
                    "allowed": allowed,
                    "kept": outcome.broken <= allowed,
                }


HEAD = (
    f"{'population':<11} {'risk':<13} {'bound':<18} {'testing':<11} {'level':>7} "
    f"{'broken':>8} {'allowed':>8}  cost"
)


def shown(line: dict[str, Any]) -> str:
    return (
        f"{line['population']:<11} {line['risk']:<13} {line['bound']:<18} {line['testing']:<11} "
        f"{line['level']:7.2%} {line['broken']:8.2%} {line['allowed']:8.2%} "
        f"{line['mean_cost']:5.3f}" + ("" if line["kept"] else "  BROKEN")
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Do the promises hold? Simulated where every true risk is known."
    )
    parser.add_argument("--data", type=Path, help="folder of .npz files: scores, answers, labels")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--draws", type=int, default=1000, help="calibration sets per line (1000)")
    parser.add_argument("--rows", type=int, default=1000, help="rows per calibration set (1000)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of every promise (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    lines = []
    print(HEAD)
    for line in measure(
        options.data, options.rows, options.draws, options.confidence, options.seed
    ):
        lines.append(line)
        print(shown(line), flush=True)
    kept = all(line["kept"] for line in lines)
    seconds = time.perf_counter() - started
    verdict = "all kept" if kept else "BROKEN"
    print(
        f"{len(lines)} lines of {options.draws} draws of {options.rows} rows: {verdict}, "
        f"{seconds:.0f} s"
    )
    if options.json:
        about = {key: value for key, value in vars(options).items() if key not in ("json", "data")}
        options.json.write_text(
            json.dumps({**about, "seconds": round(seconds, 1), "lines": lines}, indent=1) + "\n"
        )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
