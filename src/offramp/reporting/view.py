"""The numbers of a report: a plan and its alternatives on the rows of a trace.

Shapes: N rows, E exits. A cost is a share of the cost of the plain network in the same unit.
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
from offramp.plans.columns import BACKBONE
from offramp.plans.evaluation import Array, Evaluation
from offramp.plans.plan import Plan, choose
from offramp.plans.replay import Replay
from offramp.plans.trace import Trace

BATCHES = (1, 64)
POINTS = 60  # plans on a frontier
BINS = 10  # of a gate's scores

Unit = tuple[str, int]  # of a cost: macs or ms, and the batch size


@dataclass(frozen=True)
class Dot:
    """A network or plan as a point of cost and quality; `how` describes it in words."""

    name: str
    how: str
    quality: float
    costs: Mapping[Unit, float]


@dataclass(frozen=True)
class Bin:
    """A group of rows with neighbouring scores.

    Attributes:
        start: share of all rows with lower scores.
        end: share of all rows with lower scores or in this bin.
        low: the lowest score.
        high: the highest score.
        rows: number of rows.
        right: share of the rows that are right at this exit.
        interval: of that share, at 95 % confidence.
        reference: share of the rows that are right at the reference.
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
    """A trace under one plan.

    Quality is accuracy if the trace has labels, and otherwise agreement with the reference.
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
    def word(self) -> str:
        """The quality in one word."""
        if self.labelled:
            return "accuracy"
        return "agreement"

    @property
    def plain(self) -> str:
        """The plain network in words."""
        if self.reference == BACKBONE:
            return "the plain network"
        return f"{self.reference} alone"

    @property
    def target(self) -> Array:
        """The right answers [N]: the labels, or without labels the answers of the reference."""
        if self.trace.labels is None:
            return self.trace.answers_at(self.reference)
        return self.trace.labels

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of cost: MACs, and milliseconds if they were measured."""
        units = []
        for price in self.evaluation.prices:
            if price.plain > 0:
                units.append((price.unit, price.batch))
        return tuple(units)

    @property
    def open_gates(self) -> tuple[str, ...]:
        """Gates at which rows can leave under the plan, shallow to deep."""
        return tuple(stage.name for stage in self.replay.schedule if stage.gate)

    @property
    def last(self) -> int:
        """The index of the exit that answers all remaining rows."""
        return self.trace.topology.exit_index(self.replay.schedule.stages[-1].name)

    def quality(self, answers: Array) -> float:
        """Accuracy of answers [N], or their agreement with the reference."""
        return float((answers == self.target).mean())

    def costs(self, plan: Plan) -> dict[Unit, float]:
        """Mean cost of a plan in every unit."""
        costs = {}
        for unit in self.units:
            price = self.trace.price(plan, *unit, self.reference)
            costs[unit] = price.mean / price.plain
        return costs

    def dot(self, name: str, plan: Plan) -> Dot:
        """A plan as a point of cost and quality."""
        return Dot(
            name,
            thresholds_of(plan),
            self.quality(self.trace.replay(plan).answer),
            self.costs(plan),
        )

    def plain_dot(self) -> Dot:
        """The plain network as a point of cost and quality."""
        answers = self.trace.answers_at(self.reference)
        return Dot(
            "plain network",
            f"{self.reference}, no gate",
            self.quality(answers),
            dict.fromkeys(self.units, 1.0),
        )

    def statics(self) -> list[Dot]:
        """Every exit as a network without gates, which answers all rows there."""
        if not self.trace.topology.is_chain:
            return self._static_paths()
        dots = []
        for name in self.trace.topology.exits:
            dot = self.dot(name, Plan(thresholds={}, max_exit=name))
            dots.append(Dot(name, "static: answers every row", dot.quality, dot.costs))
        return dots

    def _static_paths(self) -> list[Dot]:
        """Every path through the forks as a network without gates."""
        topology = self.trace.topology
        if self.trace.header.settings:
            return []  # no path was recorded on its own
        plain = {}
        for unit in self.units:
            plain[unit] = self.trace.price(self.plan, *unit, self.reference).plain
        dots: list[Dot] = []
        for name in topology.exits:
            always = topology._always_before[name]
            for path in topology.paths[name]:
                answers = self.trace.columns[f"answer/{topology.label(path)}"]
                costs: dict[Unit, float] = {}
                for unit in self.units:
                    kind, batch = unit
                    along = self.trace.prices.along(path, unit=kind, batch=batch)
                    costs[unit] = along / plain[unit]
                # a path is named by the nodes that tell it from the other paths to this exit
                own_nodes = [node for node in path if node not in always]
                label = " ".join(own_nodes or [name])
                quality = self.quality(answers)
                dots.append(Dot(label, "static: answers every row", quality, costs))
        return dots

    def frontier(self, unit: Unit) -> list[Dot]:
        """The best plans that a search finds on the rows of this trace.

        Returns:
            From the cheapest on; each is better than the one before.
        """
        topology = self.trace.topology
        if not topology.gates:
            return []
        risk = find_risk("disagreement")
        if self.labelled:
            risk = find_risk("error")
        if self.trace.header.settings:
            # the plan of a setting sets every threshold to the value of the dial
            width = sum(map(topology.routes, topology.gates))
            thresholds_PG = np.repeat(np.array(self.trace.header.settings)[:, None], width, axis=1)
        elif topology.is_chain:
            problem = problem_of(self.trace, risk, self.reference, *unit)
            thresholds_PG = frontier(problem, points=POINTS).thresholds_PG
        else:
            losses_NL = self.trace.losses(risk, self.reference)
            thresholds_PG = trade_offs_of_routes(
                self.trace, losses_NL, unit=unit[0], batch=unit[1]
            ).thresholds_PG
        dots = []
        for thresholds_G in thresholds_PG:
            plan = Plan(thresholds=routed_thresholds(topology, thresholds_G))
            dots.append(self.dot("found by search", plan))
        # From cheap to dear, and of equal costs the best first: keep what improves the quality.
        better: list[Dot] = []
        for dot in sorted(dots, key=lambda dot: (dot.costs[unit], -dot.quality)):
            if not better or dot.quality > better[-1].quality:
                better.append(dot)
        return better

    def leaving(self, gate: str) -> Array:
        """Which rows would leave at a gate if all of them arrived there.

        Returns:
            A boolean for each row that has a score.
        """
        scores = self.trace.columns[f"score/{gate}"]
        thresholds = self.plan.thresholds.get(gate, (np.inf,))
        leaves: Array = choose(scores[:, None], np.asarray(thresholds, np.float32)) == 0
        return leaves[~np.isnan(scores)]

    def bins(self, gate: str) -> list[Bin]:
        """All rows with a score in bins of about the same size.

        Rows of equal score are in the same bin, so there may be fewer than `BINS` bins.
        """
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
        # the edges are scores that occur; equal quantiles become one edge
        edges = np.unique(np.quantile(scores, np.linspace(0, 1, BINS + 1), method="lower"))
        numbers = np.searchsorted(edges[1:-1], scores, side="right")  # [N] -> number of the bin
        bins = []
        counted = 0  # rows so far
        for number in np.unique(numbers):
            mask = numbers == number
            counted += int(mask.sum())
            end = counted / len(scores)
            hits = right[mask]
            bins.append(
                Bin(
                    start=float(end - mask.mean()),
                    end=float(end),
                    low=float(scores[mask].min()),
                    high=float(scores[mask].max()),
                    rows=int(mask.sum()),
                    right=float(hits.mean()),
                    interval=interval(hits * 1.0, low=0, high=1, confidence=0.95, binary=True),
                    reference=float(reference[mask].mean()),
                )
            )
        return bins

    def seen_before(self) -> int | None:
        """The number of rows of this trace that the plan was chosen or tested on.

        Returns:
            None if the plan does not record its rows, or records them in another form.
        """
        used = self.plan.rows
        if used is None or not self.comparable:
            return None
        return int(np.isin(self.trace.columns["digest"], used.digests).sum())

    @property
    def comparable(self) -> bool:
        """Whether the digests of plan and trace have the same form.

        Files of the first edition have another form.
        """
        return self.plan.rows is None or self.plan.rows.comparable(self.trace.header.digest_form)


def thresholds_of(plan: Plan) -> str:
    """The open gates of a plan with their thresholds, in words."""
    gates = list[str]()
    for gate, values in plan.thresholds.items():
        if min(values) < np.inf:
            thresholds = [f"{value:.4g}" for value in values]
            gates.append(f"{gate} ≥ " + ", ".join(thresholds))
    if not gates:
        return "no row leaves early"
    shown = gates[:6]
    if len(gates) > 6:
        shown.append(f"and {len(gates) - 6} more")
    return "; ".join(shown)


def view_of(trace: Trace, plan: Plan) -> View:
    """A trace under a plan, with everything evaluated that a report shows.

    Args:
        trace: with at least one row.
        plan: of the same network.

    Returns:
        The view.

    Raises:
        BadData: the trace has no rows.
        Mismatch: the plan belongs to another network.
    """
    if not len(trace):
        raise BadData("the trace must have at least one row, got 0")
    reference = "last"
    if plan.promise:
        reference = plan.promise.reference
    try:
        evaluation = trace.evaluate(plan, batches=BATCHES)
    # the risk of the promise is not built in, or needs labels or logits that this trace lacks
    except InvalidArgument:
        risk = "disagreement"
        if trace.labels is not None:
            risk = "accuracy_gap"
        evaluation = trace.evaluate(plan, risk=risk, reference=reference, batches=BATCHES)
    return View(trace, plan, evaluation, trace.replay(plan), trace.reference(reference))
