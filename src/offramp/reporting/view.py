"""What the page shows, as numbers: a plan and its neighbours on the rows of a trace.

Shapes: N rows, E exits. A cost is a share of the plain network's in the same unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from offramp.calibration.calibrating import problem_of
from offramp.calibration.descending import trade_offs_of_routes
from offramp.calibration.routed import thresholds_of as routed_thresholds
from offramp.calibration.search import frontier
from offramp.errors import BadData, InvalidArgument
from offramp.guarantees.bounds import interval
from offramp.guarantees.risks import find_risk
from offramp.plans.evaluation import Array, Evaluation
from offramp.plans.plan import Plan, choose
from offramp.plans.trace import BACKBONE, Replay, Trace

BATCHES = (1, 64)
POINTS = 60  # plans on a frontier
BINS = 10  # of a gate's scores

Unit = tuple[str, int]  # of a cost: macs or ms, and the batch size


@dataclass(frozen=True)
class Dot:
    """A place on the plane of cost and quality; `how` says in words what it is."""

    name: str
    how: str
    quality: float
    costs: Mapping[Unit, float]


@dataclass(frozen=True)
class Bin:
    """Rows of neighbouring scores: from which share of all rows to which, and how many of them are
    right.
    """

    start: float
    end: float
    low: float
    high: float
    rows: int
    right: float
    interval: tuple[float, float]
    reference: float


@dataclass(frozen=True)
class View:
    """A trace seen under one plan. Quality is accuracy, or without labels agreement with the
    reference.
    """

    trace: Trace
    plan: Plan
    evaluation: Evaluation
    replay: Replay
    reference: str

    @property
    def labelled(self) -> bool:
        """Whether the truth is known."""
        return self.trace.labels is not None

    @property
    def plain(self) -> str:
        """The plain network in words."""
        if self.reference == BACKBONE:
            return "the plain network"
        return f"{self.reference} alone"

    @property
    def target(self) -> Array:
        """What an answer should be [N]: the label, or without labels the reference's answer."""
        labels = self.trace.labels
        return self.trace.answers_at(self.reference) if labels is None else labels

    @property
    def units(self) -> tuple[Unit, ...]:
        """What costs are told in: MACs, and milliseconds where they were measured."""
        return tuple(
            (price.unit, price.batch) for price in self.evaluation.prices if price.plain > 0
        )

    @property
    def open_gates(self) -> tuple[str, ...]:
        """Gates at which rows can leave under the plan, shallow to deep."""
        return tuple(stage.name for stage in self.replay.schedule if stage.gate)

    @property
    def last(self) -> int:
        """The place of the exit that answers whatever is left."""
        return self.trace.topology.exit_index(self.replay.schedule.stages[-1].name)

    def quality(self, answers: Array) -> float:
        """Accuracy of answers [N], or their agreement with the reference."""
        return float((answers == self.target).mean())

    def costs(self, plan: Plan) -> dict[Unit, float]:
        """Mean cost of a plan in every unit."""
        prices = {unit: self.trace.price(plan, *unit, self.reference) for unit in self.units}
        return {unit: price.mean / price.plain for unit, price in prices.items()}

    def dot(self, name: str, plan: Plan) -> Dot:
        """A plan as a place on the plane."""
        return Dot(
            name,
            thresholds_of(plan),
            self.quality(self.trace.replay(plan).answer),
            self.costs(plan),
        )

    def plain_dot(self) -> Dot:
        """The plain network as a place on the plane."""
        answers = self.trace.answers_at(self.reference)
        return Dot(
            "plain network",
            f"{self.reference}, no gate",
            self.quality(answers),
            dict.fromkeys(self.units, 1.0),
        )

    def statics(self) -> list[Dot]:
        """Every exit as a network of its own: all rows are answered there, and no gate is run."""
        if not self.trace.topology.is_chain:
            return self._static_paths()
        alone = [(name, Plan(thresholds={}, max_exit=name)) for name in self.trace.topology.exits]
        return [
            Dot(name, "static: answers every row", dot.quality, dot.costs)
            for name, dot in ((name, self.dot(name, plan)) for name, plan in alone)
        ]

    def _static_paths(self) -> list[Dot]:
        """Every path through the forks as a network of its own, without gates."""
        topology = self.trace.topology
        if self.trace.header.settings:
            return []  # no path was recorded on its own
        plain = {
            unit: self.trace.price(self.plan, *unit, self.reference).plain for unit in self.units
        }
        dots = list[Dot]()
        for name in topology.exits:
            for path in topology.paths[name]:
                answers = self.trace.columns[f"answer/{topology.label(path)}"]
                costs = dict[Unit, float]()
                for unit in self.units:
                    costs[unit] = (
                        self.trace.prices.along(path, unit=unit[0], batch=unit[1]) / plain[unit]
                    )
                taken = [one for one in path if one not in topology._always_before[name]] or [name]
                dots.append(
                    Dot(" ".join(taken), "static: answers every row", self.quality(answers), costs)
                )
        return dots

    def frontier(self, unit: Unit) -> list[Dot]:
        """The best plans that a search finds on these very rows, from the cheapest, each better
        than the one before.
        """
        topology = self.trace.topology
        if not topology.gates:
            return []
        risk = find_risk("error" if self.labelled else "disagreement")
        if self.trace.header.settings:
            width = sum(topology.routes(gate) for gate in topology.gates)
            thresholds_PG = np.repeat(np.array(self.trace.header.settings)[:, None], width, axis=1)
        elif topology.is_chain:
            thresholds_PG = frontier(
                problem_of(self.trace, risk, self.reference, *unit), points=POINTS
            ).thresholds_PG
        else:
            losses_NL = self.trace.losses(risk, self.reference)
            thresholds_PG = trade_offs_of_routes(
                self.trace, losses_NL, unit=unit[0], batch=unit[1]
            ).thresholds_PG
        plans = [Plan(thresholds=routed_thresholds(topology, row)) for row in thresholds_PG]
        dots = [self.dot("found by search", plan) for plan in plans]
        better: list[Dot] = []
        for dot in sorted(dots, key=lambda dot: (dot.costs[unit], -dot.quality)):
            if not better or dot.quality > better[-1].quality:
                better.append(dot)
        return better

    def leaving(self, gate: str) -> Array:
        """Which of the rows with a score the gate would let leave, if all of them arrived."""
        scores = self.trace.columns[f"score/{gate}"]
        thresholds = self.plan.thresholds.get(gate, (np.inf,))
        taken: Array = choose(scores[:, None], np.asarray(thresholds, np.float32)) == 0
        return taken[~np.isnan(scores)]

    def bins(self, gate: str) -> list[Bin]:
        """All rows with a score, by score; rows of equal score stand in the same bin."""
        if f"score/{gate}" not in self.trace.columns or f"answer/{gate}" not in self.trace.columns:
            # a fork has no answer of its own, and one that several paths lead to has several
            return []
        scores = self.trace.columns[f"score/{gate}"]
        known = ~np.isnan(scores)
        scores = scores[known]
        target = self.target[known]
        if not len(scores):
            return []
        right = self.trace.columns[f"answer/{gate}"][known] == target
        reference = self.trace.answers_at(self.reference)[known] == target
        edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1), method="lower"))
        places = np.searchsorted(edges[1:-1], scores, side="right")
        rows = [places == index for index in np.unique(places)]
        ends = np.cumsum([mine.sum() for mine in rows]) / len(scores)
        return [
            Bin(
                start=float(end - mine.mean()),
                end=float(end),
                low=float(scores[mine].min()),
                high=float(scores[mine].max()),
                rows=int(mine.sum()),
                right=float(right[mine].mean()),
                interval=interval(right[mine] * 1.0, low=0, high=1, confidence=0.95, binary=True),
                reference=float(reference[mine].mean()),
            )
            for mine, end in zip(rows, ends, strict=True)
        ]

    def seen_before(self) -> int | None:
        """How many of these rows the plan was chosen or tested on; None when the plan does not
        say.
        """
        used = self.plan.rows
        if used is None or not self.comparable:
            return None
        return int(np.isin(self.trace.columns["digest"], used.digests).sum())

    @property
    def comparable(self) -> bool:
        """Whether the digests of plan and trace have one form; files of the first edition have
        another.
        """
        return self.plan.rows is None or self.plan.rows.comparable(self.trace.header.digest_form)


def thresholds_of(plan: Plan) -> str:
    """The open gates of a plan with their thresholds, in words."""
    gates = list[str]()
    for gate, values in plan.thresholds.items():
        if min(values) < np.inf:
            gates.append(f"{gate} ≥ " + ", ".join(f"{value:.4g}" for value in values))
    more = [f"and {len(gates) - 6} more"] if len(gates) > 6 else []
    return "; ".join(gates[:6] + more) or "no row leaves early"


def view_of(trace: Trace, plan: Plan) -> View:
    """A trace under a plan. Raises BadData for a trace without rows, Mismatch for a plan of another
    network.
    """
    if not len(trace):
        raise BadData("the trace must have at least one row, got 0")
    asked = plan.promise.reference if plan.promise else "last"
    try:
        evaluation = trace.evaluate(plan, batches=BATCHES)
    # the promise's risk is the user's own, or needs labels or logits that are not here
    except InvalidArgument:
        risk = "accuracy_gap" if trace.labels is not None else "disagreement"
        evaluation = trace.evaluate(plan, risk=risk, reference=asked, batches=BATCHES)
    return View(trace, plan, evaluation, trace.replay(plan), trace.reference(asked))
