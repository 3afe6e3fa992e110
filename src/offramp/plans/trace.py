"""Scores, answers and costs of every sample at every exit, as named columns. No torch.

    logits/<exit>   [N, C] float32      kept unless keep="answers"
    answer/<exit>   [N]    int64        the arg max of the logits, first of equals
    ..../backbone           logits and answer of the plain last model, where the last exit gives
                            something else (a mean)
    score/<gate>    [N]    float32      with K > 2 successors: score/<gate>@<route>, K-1 columns
    label, row      [N]    int64        label may be missing; row is the number in the data's source
    digest          [N]    uint64       of a row's content, so that overlap is noticed
    learned         [N]    bool         whether `fit` trained the network with this row; absent
                                        where nothing was fitted
    cost/<part>     [3] or [N, 3]       MACs per row, milliseconds per call a, milliseconds per row
                                        b (a + b n)

In a network with forks an answer depends on the path of a row: every path is recorded, at most
sixteen to a node. An exit or a gate to which several lead stands among the columns as <name>#0,
<name>#1, in the order of `Topology.paths`. With more paths the network is recorded at settings of
one dial, a threshold that all gates share; setting 0 closes all:

    setting/exit#<s>, setting/answer#<s>, setting/why#<s>  [N] int64, setting/near#<s> [N] bool,
    setting/<node>#<s> [N] bool (whether the node ran)

A part is segment/<node>, exit/<node> or gate/<node>; where milliseconds were measured also runner,
runner/<gate> and plain (see pricing). Milliseconds are NaN when they were not measured, MACs of a
segment where they are not known.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from offramp._support.arguments import require_confidence, require_count, require_flag, require_kind
from offramp._support.files import from_document, read_arrays, to_document, write_arrays
from offramp._support.find import find
from offramp.errors import BadData, BadFile, InvalidArgument, Mismatch, NoisyTimings
from offramp.guarantees.bounds import interval
from offramp.guarantees.risks import Risk, find_risk, losses_of
from offramp.plans.digests import digests_of
from offramp.plans.draws import canonical, distinct, one_of_each, repeated, require_repeats
from offramp.plans.evaluation import Evaluation, Measured, worst_class
from offramp.plans.plan import Plan, Price, choose
from offramp.plans.pricing import Prices
from offramp.plans.provenance import FORM, Origin, RecordedRows, SeenRows, form_of, largest_of
from offramp.plans.schedule import Schedule, Stage
from offramp.plans.scores import ScoreRange
from offramp.plans.signature import is_label
from offramp.plans.topology import LEAVE, Node, Topology
from offramp.plans.topology import Path as Passed

SCHEMA = 1
BACKBONE = "backbone"
WHY = ("gate", "end", "deepest", "deadline", "unavailable")
# timings of one call that differ by more are said to be noisy wherever they are used
LARGE_NOISE = 0.25
COLUMNS = {  # by the first word of their names: the kinds of NumPy types
    "logits": "f",
    "score": "f",
    "cost": "f",
    "answer": "iu",
    "label": "iu",
    "row": "iu",
    "digest": "u",
    "learned": "b",
}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Header:
    """What the columns are about. `trained` is False while an exit was never trained.

    digest_form: see SeenRows. scores: what each gate declares of its scores; of a gate that is not
    named nothing is known. noise: how far the same call's milliseconds lay apart while they were
    measured (0.1: by 10 %); None where nothing was measured, or before this was recorded. settings:
    the thresholds of the dial, the first +inf; empty where every path was recorded.
    """

    topology: Topology
    reference: str
    classes: int
    data: str
    data_fingerprint: str
    origin: Origin
    class_names: tuple[str, ...] | None = None
    trained: bool = True
    digest_form: int = FORM
    scores: Mapping[str, ScoreRange] = field(default_factory=dict)
    noise: float | None = None
    settings: tuple[float, ...] = ()


@dataclass(frozen=True)
class Replay:
    """What a plan does to the rows of a trace.

    Attributes:
        exit: the exit that answers [N], an index into the topology's `exits`.
        answer: [N].
        why: [N], an index into WHY.
        ran: bool [N, stages], which stages of the schedule ran for each row.
        output: the recorded answer [N], an index into the topology's `exit_labels`: of a chain the
            same as `exit`.
        schedule: what the plan runs.
    """

    exit: Array
    answer: Array
    why: Array
    ran: Array
    output: Array
    schedule: Schedule

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Replay of {len(self.exit):,} rows through {self.ran.shape[1]} stages>"


@dataclass(frozen=True)
class Visit:
    """Rows that arrive at a stage on the same path.

    Attributes:
        number: of the stage.
        stage: the stage.
        label: what the stage is called among the columns of this path.
        rows: row numbers [n].
        scores: float32 [n, K - 1] of a stage that decides; None otherwise.
        chosen: which edge [n] each row takes.
    """

    number: int
    stage: Stage
    label: str
    rows: Array
    scores: Array | None
    chosen: Array


@dataclass(frozen=True)
class Trace:
    """Named columns and a header; frozen.

    Rows are selected by a slice, by their positions, or by a boolean mask: `trace[1000:5000]`,
    `trace[[3, 8]]`, `trace[trace.labels == 2]`. A position that is named twice gives a row twice,
    which `calibrate` refuses.
    """

    columns: Mapping[str, Array]
    header: Header

    def __post_init__(self) -> None:
        needed = ["row", "digest", *(f"answer/{label}" for label in self.topology.exit_labels)]
        for label in self.topology.gate_labels:
            needed += self.topology.score_columns(label)
        missing = [name for name in needed if name not in self.columns]
        if missing:
            raise BadData(f"the trace has no column {', '.join(missing)}; record again")
        n = len(self.columns["row"])
        for name, column in self.columns.items():
            if not name.startswith("cost/") and len(column) != n:
                raise BadData(f"column {name!r} has {len(column)} rows, expected {n}; record again")

    def __len__(self) -> int:
        return len(self.columns["row"])

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Trace: {self}>"

    def __str__(self) -> str:
        kind = "labelled" if self.labels is not None else "unlabelled"
        return (
            f"Trace of {len(self):,} {kind} rows of {self.header.data}, exits "
            f"{', '.join(self.topology.exits)}"
        )

    def __getitem__(self, rows: slice | Array) -> Trace:
        def of(name: str, column: Array) -> Array:
            per_row = not name.startswith("cost/") or column.ndim == 2
            return column[rows] if per_row else column

        columns = {name: of(name, column) for name, column in self.columns.items()}
        mark_of = columns["digest"]
        mark = hashlib.sha256(mark_of.tobytes()).hexdigest()[:16]
        which = _text(rows) if isinstance(rows, slice) else f" ({len(mark_of):,} rows)"
        return Trace(
            columns, replace(self.header, data=self.header.data + which, data_fingerprint=mark)
        )

    @property
    def topology(self) -> Topology:
        """The nodes, and which follow each other."""
        return self.header.topology

    @property
    def labels(self) -> Array | None:
        """Labels [N] int64, or None."""
        return self.columns.get("label")

    @property
    def scores(self) -> Array:
        """Scores [N, E-1] float32 of a chain, shallow to deep. Raises BadNetwork for a network with
        forks.
        """
        self.topology.require_chain("a table of all scores")
        empty = np.empty((len(self), 0), np.float32)
        if self.topology.gates:
            return np.column_stack([self.columns[f"score/{gate}"] for gate in self.topology.gates])
        return empty

    @property
    def answers(self) -> Array:
        """Answers [N, E] int64, shallow to deep; of an exit to which several paths lead once for
        each.

        Of a trace at settings of one dial [N, S], by setting.
        """
        if self.header.settings:
            count = len(self.header.settings)
            return np.column_stack(
                [self.columns[f"setting/answer#{number}"] for number in range(count)]
            )
        return np.column_stack(
            [self.columns[f"answer/{label}"] for label in self.topology.exit_labels]
        )

    @property
    def outputs(self) -> Array:
        """Logits [N, E, C] float32, as `answers`. Raises BadData when the trace was recorded with
        keep='answers'.
        """
        missing = [
            label for label in self.topology.exit_labels if f"logits/{label}" not in self.columns
        ]
        if missing:
            raise BadData(f"the trace has no logits of {missing}; record with keep='logits'")
        return np.stack(
            [self.columns[f"logits/{label}"] for label in self.topology.exit_labels], axis=1
        )

    @property
    def seen(self) -> SeenRows:
        """Source and digests of the rows, as a plan carries them."""
        header = self.header
        return SeenRows(
            header.data, header.data_fingerprint, self.columns["digest"], header.digest_form
        )

    def check(self, plan: Plan) -> None:
        """Raise Mismatch when the plan belongs to another network, engine or precision, or to other
        code.

        Where rows of this trace are among those that the plan knows by their digests, logits and
        scores are compared.
        """
        require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
        mine = self.header.origin
        its = plan.origin
        if its is not None and its.key != mine.key:
            raise Mismatch(
                f"the plan is for network {its.network} ({its.engine}, {its.precision}), the "
                f"trace of network "
                f"{mine.network} ({mine.engine}, {mine.precision}); record this network, and "
                f"calibrate again"
            )
        if its is None or its == mine:
            return
        its.refuse_other_code(mine.code)
        if its.probe is not None and its.probe.recorded is not None:
            self._compare(its.probe.recorded, its.rounding)

    def _compare(self, known: RecordedRows, band: float) -> None:
        """Raise Mismatch where a row of this trace has other logits or scores than a plan knows of
        it.
        """
        digests = np.array([int(text, 16) for text in known.digests], np.uint64)
        shared, here, there = np.intersect1d(self.columns["digest"], digests, return_indices=True)
        columns: dict[str, Any] = {}
        for label, value in zip(self.topology.exit_labels, known.logits, strict=True):
            columns[f"logits/{label}"] = value
        for label, scores in zip(self.topology.gate_labels, known.scores, strict=True):
            names = self.topology.score_columns(label)
            several = np.asarray(scores, np.float32).reshape(-1, len(names))
            columns |= dict(zip(names, several.T, strict=True))
        flipped = np.zeros(len(shared), bool)
        scale = 10.0  # the largest number so far, logits before scores
        for name, value in columns.items() if len(shared) else ():
            if name not in self.columns:
                continue
            want = np.array(value, np.float32)[there]
            got = self.columns[name][here]
            far = np.abs(got - want)
            if name.startswith("logits/"):
                flipped |= want.argmax(1) != got.argmax(1)
            else:  # a score may differ where an answer did, within the band
                far = far[~flipped]
            scale = max(scale, float(np.abs(want).max()))
            if not np.all(far <= band * scale / 10):
                raise Mismatch(
                    f"{name!r} of rows that the plan was made from is {far.max():.2g} away here "
                    f"(band {band:g}): the "
                    "network computes otherwise than when the plan was made; record and calibrate "
                    "again"
                )

    def replay(self, plan: Plan) -> Replay:
        """What `run` does on these rows under the plan (equal outside the float band)."""
        self.check(plan)
        topology = self.topology
        schedule = plan.schedule(topology)
        if self.header.settings:
            return self._replayed_setting(plan, schedule)
        exits = np.full(len(self), -1, np.int64)
        outputs = np.zeros(len(self), np.int64)
        why = np.zeros(len(self), np.int64)
        ran = np.zeros((len(self), len(schedule)), bool)
        position = {label: number for number, label in enumerate(topology.exit_labels)}
        for visit in self.visits(schedule):
            stage = visit.stage
            ran[visit.rows, visit.number] = True
            for index, edge in enumerate(stage.edges):
                if edge.to == LEAVE:
                    gone = visit.rows[visit.chosen == index]
                    exits[gone] = topology.exit_index(stage.name)
                    outputs[gone] = position[visit.label]
                    why[gone] = WHY.index(stage.why)
        answers = self.answers[np.arange(len(self)), outputs]
        return Replay(exits, answers, why, ran, outputs, schedule)

    def setting_of(self, plan: Plan) -> int:
        """The setting of the dial that a plan is. Raises InvalidArgument for a plan that was not
        recorded.
        """
        values = {
            np.float32(value)
            for gate in self.topology.gates
            for value in plan.thresholds.get(gate, (np.inf,))
        }
        known = [np.float32(value) for value in self.header.settings]
        if len(values) == 1 and plan.max_exit is None:
            (value,) = values
            if value in known:
                return known.index(value)
        raise InvalidArgument(
            f"this trace was recorded at {len(known)} settings of one dial, a threshold that all "
            f"gates share, and the "
            "plan is none of them; calibrate on this trace, or record at this setting"
        )

    def _replayed_setting(self, plan: Plan, schedule: Schedule) -> Replay:
        """`replay` of a trace that was recorded at settings of one dial."""
        number = self.setting_of(plan)
        ran = np.column_stack(
            [self.columns[f"setting/{stage.name}#{number}"] for stage in schedule]
        )
        return Replay(
            exit=self.columns[f"setting/exit#{number}"],
            answer=self.columns[f"setting/answer#{number}"],
            why=self.columns[f"setting/why#{number}"],
            ran=ran,
            output=np.full(len(self), number),
            schedule=schedule,
        )

    def visits(self, schedule: Schedule) -> Iterator[Visit]:
        """The rows of the trace on their way through a schedule: each stage in turn, once for every
        path to it.
        """
        topology = self.topology
        waiting: dict[str, list[tuple[Passed, Array]]] = {stage.name: [] for stage in schedule}
        first = schedule.stages[0].name
        waiting[first].append(((*schedule.skipped, first), np.arange(len(self))))
        for number, stage in enumerate(schedule):
            thresholds = np.asarray(stage.thresholds, np.float32)
            for path, rows in waiting.pop(stage.name):
                label = stage.name if topology.is_chain else topology.label(path)
                scores = self._scores_at(stage, label, rows) if stage.gate else None
                chosen: Array
                if scores is None:
                    chosen = np.zeros(len(rows), np.int64)
                else:
                    chosen = choose(scores, thresholds)
                yield Visit(number, stage, label, rows, scores, chosen)
                for index, edge in enumerate(stage.edges):
                    some = rows[chosen == index] if stage.gate else rows
                    if edge.to != LEAVE and len(some):
                        waiting[edge.to].append(((*path, *edge.via, edge.to), some))

    @property
    def prices(self) -> Prices:
        """What each part costs."""
        parts = {}
        for name, column in self.columns.items():
            if name.startswith("cost/"):
                parts[name.removeprefix("cost/")] = column
        return Prices(self.topology, parts)

    def unit(self, asked: str | None) -> str:
        """The unit in which plans are priced, as `Prices.unit`; warns where its timings were
        noisy.
        """
        unit = self.prices.unit(asked)
        if unit == "ms" and self.header.noise is not None and self.header.noise > LARGE_NOISE:
            warnings.warn(
                f"the milliseconds are noisy: the same call's timings differ by "
                f"{self.header.noise:.0%}, so that the "
                "cheapest plan may be another one; record again where nothing else runs, or price "
                "in MACs",
                NoisyTimings,
                stacklevel=3,
            )
        return unit

    def reference(self, reference: str) -> str:
        """The exit that `reference` names: last, backbone (the plain last model), or an exit.
        Raises UnknownName.
        """
        last = self.topology.exits[-1]
        if reference in ("last", "backbone"):
            if reference == "backbone" and f"answer/{BACKBONE}" in self.columns:
                return BACKBONE
            return last
        return self.topology.exits[self.topology.exit_index(reference)]

    def reference_label(self, reference: str) -> str:
        """Under which name the answers of the reference stand among the columns: of its dearest
        path.
        """
        name = self.reference(reference)
        if name == BACKBONE or self.topology.is_chain:
            return name
        return self.topology.label(self.topology.reference_path(name))

    def answers_at(self, name: str) -> Array:
        """Answers [N] of an exit, or of the plain last model; with several paths to it those of the
        dearest.
        """
        if name == BACKBONE:
            if f"answer/{BACKBONE}" in self.columns:
                return self.columns[f"answer/{BACKBONE}"]
            return self.answers[:, -1]
        return self.columns[f"answer/{self.reference_label(name)}"]

    def losses(self, risk: Risk, reference: str = "last") -> Array:
        """Losses [N, E] of every exit's answers, as in `answers`.

        Raises InvalidArgument when the risk needs labels and there are none.
        """
        if self.header.settings:
            return self._losses_of_settings(risk, reference)
        name = self.reference(reference)
        answers = self.answers
        outputs = self.outputs if risk.reads == "outputs" else None
        if name != BACKBONE:
            index = self.topology.exit_labels.index(self.reference_label(reference))
            return losses_of(risk, answers, self.labels, index, outputs=outputs)
        answers = np.column_stack([answers, self.columns[f"answer/{BACKBONE}"]])
        if outputs is not None:
            outputs = np.concatenate([outputs, self.columns[f"logits/{BACKBONE}"][:, None]], axis=1)
        return losses_of(risk, answers, self.labels, answers.shape[1] - 1, outputs=outputs)[:, :-1]

    def _losses_of_settings(self, risk: Risk, reference: str) -> Array:
        """`losses` [N, S] of every setting of the dial; the reference is the one that closes all
        gates.
        """
        if risk.reads == "outputs" or self.reference(reference) != self.topology.exits[-1]:
            raise InvalidArgument(
                "at settings of one dial only answers are recorded, and the last exit is the "
                "reference; use a risk of "
                "answers against 'last'"
            )
        return losses_of(risk, self.answers, self.labels, 0)

    def evaluate(
        self,
        plan: Plan,
        *,
        risk: str | Risk | None = None,
        reference: str | None = None,
        confidence: float = 0.95,
        batches: Sequence[int] = (1, 64),
        repeats: str | None = None,
    ) -> Evaluation:
        """Accuracy, risk with interval, cost, shares and worst class of a plan on these rows.

        Args:
            plan: of this network, engine and precision.
            risk: a name or a Risk; by default the promise's, then the gap (with labels) or
                disagreement.
            reference: what the risk compares with; by default as in the promise, then "last".
            confidence: of the interval, above 0 and below 1.
            batches: the batch sizes that milliseconds are told for.
            repeats: what rows of equal content are. By default they all count in the figures, and
                one of each in the interval, which rests on independent draws. "independent": each
                was drawn on its own, and the interval counts all. "once": one of each counts, in
                the figures too.

        Raises:
            InvalidArgument: the risk needs labels or logits that are not here, or an argument is
                not what it must be.
            Mismatch: the plan belongs to another network, engine or precision.
        """
        require_repeats(repeats)
        confidence = require_confidence(confidence)
        batches = [require_count("batches", batch) for batch in batches]
        if repeats == "once" and repeated(self.columns):
            return self[one_of_each(self.columns)].evaluate(
                plan, risk=risk, reference=reference, confidence=confidence, batches=batches
            )
        promised = plan.promise
        default = (
            promised.risk
            if promised
            else "accuracy_gap"
            if self.labels is not None
            else "disagreement"
        )
        asked = find_risk(risk if risk is not None else default)
        name = reference or (promised.reference if promised else "last")
        done = self.replay(plan)
        losses = self.losses(asked, name)[np.arange(len(self)), done.output]
        # an order that is nobody's choice, for a bound that depends on one
        counted = canonical(self.columns)
        if repeats == "independent":
            apart = np.arange(len(self))
        else:
            apart = distinct(self.columns)
        again = len(self) - len(apart)
        if again:
            counted = counted[np.isin(counted, apart)]
        low, high = interval(
            losses[counted],
            low=asked.low,
            high=asked.high,
            confidence=confidence,
            binary=asked.binary,
        )
        value = float(losses.mean())
        shares = np.bincount(done.exit, minlength=len(self.topology.exits)) / max(len(self), 1)
        return Evaluation(
            rows=len(self),
            exits=self.topology.exits,
            shares=tuple(map(float, shares)),
            risk=Measured(
                asked.name,
                self.reference(name),
                value,
                min(low, value),
                max(high, value),
                confidence,
            ),
            prices=tuple(
                self.price(plan, unit, batch, name) for unit, batch in self._units(batches)
            ),
            in_band=self._in_band(done),
            repeated=again,
            **self._accuracies(done, name),
        )

    def price(
        self, plan: Plan, unit: str | None = None, batch: int = 64, reference: str = "last"
    ) -> Price:
        """Mean and worst cost per row of a plan, and that of the plain network; rows priced
        together by `batch`.

        unit: "macs", "ms", or None: MACs where they are known, else milliseconds. Raises
        InvalidArgument for a unit in which nothing was recorded.
        """
        prices = self.prices
        unit = prices.unit(unit)
        batch = require_count("batch", batch)
        if self.reference(reference) == BACKBONE:
            plain = self.topology.exits[-1]
        else:
            plain = self.reference(reference)
        done = self.replay(plan)
        return Price(
            unit=unit,
            batch=batch,
            mean=prices.mean(done.schedule, done.ran, unit=unit, batch=batch),
            worst=prices.worst(done.schedule, unit=unit, batch=batch),
            plain=prices.plain(plain, unit=unit, batch=batch),
            note=self._note(prices, unit),
        )

    def _note(self, prices: Prices, unit: str) -> str:
        """What a reader of figures in this unit must know."""
        if unit == "macs":
            return ""
        notes = list[str]()
        if prices.uncounted:
            notes.append(f"the MACs of {', '.join(prices.uncounted)} are not known")
        if not prices.with_runner:
            notes.append("without the runner's own time")
        if self.header.noise is not None and self.header.noise > LARGE_NOISE:
            notes.append(f"noisy: the same call's timings differ by {self.header.noise:.0%}")
        return "; ".join(notes)

    def _units(self, batches: Sequence[int]) -> list[tuple[str, int]]:
        prices = self.prices
        units = list[tuple[str, int]]()
        if not prices.uncounted:
            units.append(("macs", 1))
        if prices.timed:
            units += [("ms", batch) for batch in batches]
        return units

    def _in_band(self, done: Replay) -> float:
        """The share of rows that have a score within the float band of a threshold, at some stage
        on their path.
        """
        schedule = done.schedule
        if self.header.settings:
            number = int(done.output[0]) if len(self) else 0
            if len(self):
                return float(self.columns[f"setting/near#{number}"].mean())
            return 0.0
        near = np.zeros(len(self), bool)
        band = self.header.origin.band
        for visit in self.visits(schedule):
            if visit.scores is not None:
                close = (
                    np.abs(visit.scores.astype(float) - np.array(visit.stage.thresholds)) <= band
                )  # [n, K - 1]
                near[visit.rows] |= close.any(1)
        return float(near.mean()) if len(self) else 0.0

    def _accuracies(self, done: Replay, reference: str) -> dict[str, Any]:
        if self.labels is None:
            return {}
        right = done.answer == self.labels
        plain = self.columns[f"answer/{self.reference_label(reference)}"] == self.labels
        leaving = [right[done.exit == index] for index in range(len(self.topology.exits))]
        return {
            "accuracy": float(right.mean()),
            "plain_accuracy": float(plain.mean()),
            "exit_accuracy": tuple(float(rows.mean()) if rows.size else None for rows in leaving),
            "worst_class": worst_class(right, plain, self.labels, self.header.class_names),
        }

    def _scores_at(self, stage: Stage, label: str, rows: Array) -> Array:
        """Scores [n, routes] of some rows at a stage that decides."""
        names = self.topology.score_columns(label)
        return np.column_stack([self.columns[names[route]][rows] for route in stage.routes])

    @staticmethod
    def from_arrays(
        logits: Mapping[str, Any],
        costs: Mapping[str, float | tuple[float, float]],
        *,
        labels: Any = None,
        probabilities: bool = False,
        unit: str = "ms",
        gate: str = "margin",
        scores: Mapping[str, Any] | None = None,
        inputs: Any = None,
        digests: Any = None,
        rows: Any = None,
        network: str = "",
        shared: bool = False,
        data: str = "arrays",
        class_names: Sequence[str] | None = None,
    ) -> Trace:
        """A trace of models that ran elsewhere, from their recorded logits; calibrate, evaluate and
        report work on it.

        A promise needs rows that can be told apart and known again. Without `inputs` or `digests` a
        row is known by its
        logits: two rows with the same logits in every exit count as the same row, and rows that a
        model was trained on go unnoticed.

        Args:
            logits: each exit's logits [N, C] by its name, in the order in which the exits are
                asked.
            costs: what each exit's model costs a row, in `unit`; a pair is (per call, per row) in
                milliseconds.
            labels: [N] whole numbers from 0 to C-1.
            probabilities: whether `logits` holds probabilities, of which the logarithm is taken (at
                least log 1e-7).
            unit: "ms" or "macs", of the costs.
            gate: a gate of one exit's logits by name, such as margin, max_prob or neg_entropy.
            scores: scores [N] by exit, for all but the last, instead of `gate`; higher leaves
                sooner.
            inputs: what the models read, [N, ...] or arrays by name: rows are known by it, as
                `record` does it. `label` or `labels` among them is taken as `labels`. Give what the
                models read and nothing else: with a row id among the inputs no two rows would be
                the same, and repeated or training rows go unnoticed.
            digests: uint64 [N], where rows are known by something else.
            rows: the rows' numbers in their source [N]; by default 0 to N-1.
            network: name and version of the models: a plan for others is refused.
            shared: whether an exit continues where the one before it ended, as exits of one network
                do, so that `costs` are what each adds; otherwise every exit is a model of its own.
            data: what the rows are called.
            class_names: names of the classes.

        Returns:
            The trace. Its plans are applied by `trace.replay(plan)`, or by comparing scores with
            `plan.thresholds`.

        Raises:
            BadData: arrays of other shapes, or logits of the last exit that are not finite.
            InvalidArgument: a cost is missing or no cost, or the gate needs more than one exit's
                logits.

        Example:
            >>> small = np.float32([[3, 0], [1, 2]])
            >>> logits = {"small": small, "large": np.float32([[5, 0], [4, 0]])}
            >>> trace = Trace.from_arrays(logits, {"small": 0.1, "large": 1.0})
            >>> trace.evaluate(Plan.by_hand({"small": 2.0})).shares
            (0.5, 0.5)
        """
        probabilities = require_flag("probabilities", probabilities)
        shared = require_flag("shared", shared)
        names = tuple(logits)
        values = {name: _float32_of(name, array, probabilities) for name, array in logits.items()}
        count, classes = _one_shape(values)
        if len(names) < 2:
            raise BadData(f"logits must hold at least two exits, got {list(names)}")
        if bad := np.flatnonzero(~np.isfinite(values[names[-1]]).all(1)).size:
            raise BadData(
                f"the logits of the last exit must be finite, got {bad} rows of {names[-1]!r} "
                f"that are not"
            )
        if set(costs) != set(names):
            raise InvalidArgument(
                f"costs must hold one for each of {list(names)}, got {list(costs)}"
            )
        inputs, labels = _apart_from_label(inputs, labels)
        columns: dict[str, Array] = {
            "row": _column("rows", np.arange(count) if rows is None else rows, count, np.int64),
            "digest": _digests(values, inputs, digests, count),
        }
        if labels is not None:
            columns["label"] = _column("labels", labels, count, np.int64)
            low = int(columns["label"].min())
            high = int(columns["label"].max())
            if low < 0 or high >= classes:
                raise BadData(f"labels must be between 0 and {classes - 1}, got {low} to {high}")
        for name in names:
            columns[f"logits/{name}"] = values[name]
            columns[f"answer/{name}"] = values[name].argmax(1)
            columns[f"cost/segment/{name}"] = _cost_of(name, costs[name], unit)
        given = _scored(values, gate) if scores is None else scores
        if set(given) != set(names[:-1]):
            raise InvalidArgument(
                f"scores must hold one for each of {list(names[:-1])}, got {list(given)}"
            )
        for name in names[:-1]:
            score = _column("scores", given[name], count, np.float32)
            columns[f"score/{name}"] = np.where(
                np.isfinite(values[name]).all(1), score, np.float32(np.nan)
            )
        if shared:
            before = {name: (earlier,) for earlier, name in pairwise(names)}
        else:
            before = {}
        topology = Topology.chain([Node(name, after=before.get(name, ())) for name in names])
        told = json.dumps([network, names, shared, gate if scores is None else "scores"])
        header = Header(
            topology=topology,
            reference=names[-1],
            classes=classes,
            data=data,
            data_fingerprint=hashlib.sha256(columns["digest"].astype("<u8").tobytes()).hexdigest()[
                :16
            ],
            origin=Origin(
                hashlib.sha256(told.encode()).hexdigest()[:16],
                "elsewhere",
                "float32",
                largest_logit=max(largest_of(values[name]) for name in names[:-1]),
            ),
            class_names=None if class_names is None else tuple(map(str, class_names)),
        )
        return Trace(columns, header)

    def save(self, path: str | Path) -> None:
        """Write `trace.npz`, atomically, without pickles."""
        body = asdict(self.header)
        del body["topology"]  # fields of the file keep the names that the first edition gave them
        body["chain"] = self.topology.to_json()
        body["taught"] = body.pop("trained")
        body["scores"] = {gate: scores.to_json() for gate, scores in self.header.scores.items()}
        body["settings"] = list(self.header.settings[1:])  # the first is +inf, which JSON has not
        body["columns"] = _digest(self.columns)
        write_arrays(path, to_document("trace", SCHEMA, body), self.columns)

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read a trace. Raises BadFile (damaged, edited, of another kind), NewerSchema."""
        text, columns = read_arrays(path)
        _, body = from_document(text, "trace", SCHEMA, str(path))
        try:
            if body.pop("columns") != _digest(columns):
                raise BadFile(f"{path} was edited or damaged after it was written; record again")
            names = body["class_names"]
            declared = body.get("scores", {})  # absent in traces of the first edition
            topology = Topology.from_json(body.pop("chain"))
            trained = body.pop("taught", True)
            header = {
                **body,
                "topology": topology,
                "trained": trained,
                "origin": Origin.from_json(body["origin"]),
                "class_names": None if names is None else tuple(names),
                "digest_form": form_of(body.get("digest_form", 1), str(path)),
                "settings": _settings_from(body.get("settings", ())),  # absent in older traces
                "scores": {gate: ScoreRange.from_json(scores) for gate, scores in declared.items()},
            }
            found = Trace(columns, Header(**header))
            _require_header(found.header)
            for name, column in columns.items():
                _require_column(name, column, len(found), found.header.classes)
            return found
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            raise BadFile(f"{path} is no complete trace ({problem!r}); record again") from problem


def _settings_from(values: Sequence[float]) -> tuple[float, ...]:
    """The settings of a dial as a file has them: all but the first, which closes every gate."""
    return (np.inf, *map(float, values)) if values else ()


def _require_header(header: Header) -> None:
    """Raise TypeError for a header from a file in which a field is of another type."""
    texts = (header.reference, header.data, header.data_fingerprint, *(header.class_names or ()))
    if not all(isinstance(text, str) for text in texts) or not isinstance(header.trained, bool):
        raise TypeError("a field of the header is of another type")
    if (
        not isinstance(header.classes, int)
        or isinstance(header.classes, bool)
        or header.classes < 1
    ):
        raise TypeError(f"classes is {header.classes!r}")


def _require_column(name: str, column: Array, n: int, classes: int) -> None:
    """Raise ValueError for a column from a file that is not as the beginning of this module tells
    it.

    n: rows; classes: of the network. Columns of names that are not known here are left alone.
    """
    group = name.partition("/")[0]
    if group not in COLUMNS:
        return
    kinds = COLUMNS[group]
    shapes: dict[str, list[tuple[int, ...]]] = {"logits": [(n, classes)], "cost": [(3,), (n, 3)]}
    expected = shapes.get(group, [(n,)])
    if column.dtype.kind not in kinds or column.shape not in expected:
        raise ValueError(
            f"column {name!r} is {column.dtype} {list(column.shape)}, expected {list(expected[-1])}"
        )
    if not column.size:
        return
    if group == "answer" and not 0 <= column.min() <= column.max() < classes:
        raise ValueError(f"column {name!r} has answers outside of 0 to {classes - 1}")
    if group == "label" and column.min() < 0:
        raise ValueError(f"column {name!r} has negative labels")
    if group == "cost" and (np.isinf(column).any() or (column < 0).any()):  # NaN was not measured
        raise ValueError(f"column {name!r} has costs that are negative or infinite")


def _float32_of(name: str, array: Any, probabilities: bool) -> Array:
    """Logits [N, C] float32 of one exit."""
    values = _array(f"the logits of {name!r}", array)
    if values.ndim != 2 or not len(values) or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise BadData(
            f"the logits of {name!r} must be numbers [N, C] of at least one row and two classes, "
            f"got "
            f"{values.dtype.name} {list(values.shape)}"
        )
    values = values.astype(np.float32)
    if not probabilities:
        return values
    wrong = (values < -0.01) | (values > 1.01) | (np.abs(values.sum(1, keepdims=True) - 1) > 0.01)
    if wrong.any():
        row = int(wrong.any(1).argmax())
        raise BadData(
            f"the probabilities of {name!r} must be between 0 and 1 and sum to 1, got "
            f"{values[row]} (row {row})"
        )
    logarithm: Array = np.log(np.clip(values, 1e-7, 1))
    return logarithm


def _one_shape(values: Mapping[str, Array]) -> tuple[int, int]:
    """N and C of all exits' logits."""
    shapes = {name: array.shape for name, array in values.items()}
    if len(set(shapes.values())) != 1:
        raise BadData(f"logits must have one and the same shape [N, C] in every exit, got {shapes}")
    rows, classes = next(iter(shapes.values()))
    return int(rows), int(classes)


def _array(what: str, given: Any) -> Array:
    """Anything that holds numbers as an array; tensors of any device and type, also those that
    require a gradient.
    """
    if callable(getattr(given, "detach", None)):
        given = given.detach().cpu()
        if str(given.dtype) == "torch.bfloat16":  # which NumPy has not
            given = given.float()
    try:
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as problem:
        kind = type(given).__name__
        raise BadData(
            f"{what} must be one array or tensor of numbers, got a {kind} that is none ({problem})"
        ) from None


def _apart_from_label(inputs: Any, labels: Any) -> tuple[Any, Any]:
    """Inputs without the label that is among them, and the label. Raises BadData where there are
    two that differ.
    """
    if not isinstance(inputs, Mapping) or not any(map(is_label, inputs)):
        return inputs, labels
    for name, value in inputs.items():
        if not is_label(name):
            continue
        if labels is not None and not np.array_equal(
            _array("labels", labels), _array(f"inputs[{name!r}]", value)
        ):
            raise BadData(
                f"inputs[{name!r}] is taken as the label of a row, and differs from labels; leave "
                f"one of them out"
            )
        labels = value
    return {name: value for name, value in inputs.items() if not is_label(name)}, labels


def _column(what: str, given: Any, count: int, kind: Any) -> Array:
    """Values [N] of a column. Raises BadData for other shapes, and for fractions where whole
    numbers belong.
    """
    values = _array(what, given)
    whole = np.dtype(kind).kind in "iu"
    if values.shape != (count,) or values.dtype.kind not in ("iu" if whole else "iuf"):
        kinds = "whole numbers" if whole else "numbers"
        raise BadData(
            f"{what} must be {kinds} [{count}], got {values.dtype.name} {list(values.shape)}"
        )
    return values.astype(kind)


def _digests(values: Mapping[str, Array], inputs: Any, digests: Any, count: int) -> Array:
    """What rows are known by, uint64 [N]: what is given, the inputs' content, or all logits of a
    row.
    """
    if digests is not None:
        return _column("digests", digests, count, np.uint64)
    if inputs is None:
        # + 0: -0.0 is 0.0
        return digests_of(np.concatenate(list(values.values()), axis=1) + np.float32(0))
    several = inputs if isinstance(inputs, Mapping) else {"": inputs}
    named = dict[str, Array]()
    for name, value in several.items():
        what = f"inputs[{name!r}]" if isinstance(inputs, Mapping) else "inputs"
        named[str(name)] = _array(what, value)
        if named[str(name)].dtype.kind not in "biufc":
            raise BadData(
                f"{what} must be numbers [N, ...], got {named[str(name)].dtype.name}. Of texts "
                f"give the token ids, or "
                "in digests= a hash of each text as uint64."
            )
    if not named:
        raise BadData("inputs must hold at least one array [N, ...] beside the label, got none")
    lengths = {len(value) if value.ndim else 0 for value in named.values()}
    if lengths != {count}:
        raise BadData(f"inputs must have {count} rows, as the logits, got {sorted(lengths)}")
    return digests_of(named if isinstance(inputs, Mapping) else named[""])


def _cost_of(name: str, cost: float | tuple[float, float], unit: str) -> Array:
    """A price [3] of a part: MACs, milliseconds per call and per row; NaN for what is not known."""
    pair = np.asarray(cost, float).ravel()
    if unit not in ("ms", "macs"):
        raise InvalidArgument(f"unit must be 'ms' or 'macs', got {unit!r}")
    if len(pair) not in (1, 2) or (unit == "macs" and len(pair) == 2):
        raise InvalidArgument(
            f"the cost of {name!r} must be a number, or in milliseconds a pair, got {cost!r}"
        )
    if not (np.isfinite(pair).all() and (pair >= 0).all() and pair.sum() > 0):
        raise InvalidArgument(f"the cost of {name!r} must be above 0 and finite, got {cost!r}")
    if unit == "macs":
        return np.array([pair[0], np.nan, np.nan])
    call = pair[0] if len(pair) == 2 else 0.0
    return np.array([np.nan, call, pair[-1]])


def _scored(values: Mapping[str, Array], gate: str) -> dict[str, Array]:
    """A gate's scores [N] of every exit but the last. Raises InvalidArgument for a gate that looks
    at more than logits.
    """
    import torch

    function = find("gates", gate)
    if not inspect.isfunction(function) or "reads" in inspect.signature(function).parameters:
        raise InvalidArgument(
            f"gate must be a function of one exit's logits, got {gate!r}; give scores= for others"
        )
    return {
        name: function(torch.from_numpy(values[name])).float().numpy() for name in list(values)[:-1]
    }


def _text(rows: slice) -> str:
    edges = [rows.start, rows.stop, *([rows.step] if rows.step is not None else [])]
    return "[" + ":".join("" if edge is None else str(edge) for edge in edges) + "]"


def _digest(columns: Mapping[str, Array]) -> str:
    """SHA-256 over names, types, shapes and bytes of all columns."""
    mark = hashlib.sha256()
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        mark.update(json.dumps([name, column.dtype.str, column.shape]).encode())
        # the bytes themselves: a copy would double a big trace
        mark.update(column.reshape(-1).view(np.uint8).data)
    return mark.hexdigest()
