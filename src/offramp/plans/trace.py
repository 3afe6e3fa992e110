"""The recorded outputs of a network (a *trace*): scores, answers and costs of every sample at every
exit, as named columns. Does not import torch.

A trace holds one NumPy array per column:

    logits/<exit>   [N, C] float32      left out with keep="answers"
    answer/<exit>   [N]    int64        the arg max of the logits; the first one wins a tie
    ..../backbone           logits and answer of the plain last model, where the last exit gives
                            something different (a mean)
    score/<gate>    [N]    float32      with K > 2 successors: score/<gate>@<route>, K-1 columns
    label, row      [N]    int64        label may be missing; row is the number in the data's source
    digest          [N]    uint64       of a row's content, so that overlap is noticed
    learned         [N]    bool         whether `fit` trained the network with this row; absent
                                        where nothing was fitted
    cost/<part>     [3] or [N, 3]       MACs per row, milliseconds per call a, milliseconds per row
                                        b (a call on n rows takes a + b n)

In a network with forks the answer for a row depends on its path, so every path is recorded, up to
sixteen per node. If several paths lead to an exit or a gate, its columns are called <name>#0,
<name>#1, in the order of `Topology.paths`. A network with more paths is recorded at settings of one
dial, a threshold that all gates share. Setting 0 closes every gate:

    setting/exit#<s>, setting/answer#<s>, setting/why#<s>  [N] int64, setting/near#<s> [N] bool,
    setting/<node>#<s> [N] bool (whether the node ran)

A part is segment/<node>, exit/<node> or gate/<node>. Where milliseconds were measured there are
also runner, runner/<gate> and plain (see `pricing`). Milliseconds are NaN where they were not
measured. The MACs of a segment are NaN where they are not known.
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
# If repeated timings of one call differ by more than this share, every use of them warns.
LARGE_NOISE = 0.25
# The kinds of NumPy types that a column may have, by the first word of its name.
COLUMNS = {
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
    """What the columns of a trace are about.

    Attributes:
        topology: the nodes of the network, and which follow each other.
        reference: the exit or model that the network is compared with.
        classes: C, the number of classes.
        data: what the rows are called, such as "digits[800:1500]".
        data_fingerprint: a digest of the rows.
        origin: the network, engine and precision that computed the columns.
        class_names: names of the classes, or None.
        trained: False while an exit was never trained.
        digest_form: how the digests of the rows were computed, see `SeenRows`.
        scores: what each gate declares about its scores; nothing is known of a gate that is absent.
        noise: by how much the milliseconds of one call varied while they were measured (0.1 is 10
            %). None where nothing was measured, and in traces from before this was recorded.
        settings: the thresholds of the dial, the first +inf; empty where every path was recorded.
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
        answer: the predicted class [N].
        why: why the row left there [N], an index into `WHY`.
        ran: bool [N, stages], which stages of the schedule ran for each row.
        output: the recorded answer [N], an index into the topology's `exit_labels`. In a chain it
            is the same as `exit`.
        schedule: the stages that the plan runs.
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
        label: the name of the stage among the columns of this path.
        rows: row numbers [n].
        scores: float32 [n, K - 1] of a stage that decides; None otherwise.
        chosen: the index [n] of the edge that each row takes.
    """

    number: int
    stage: Stage
    label: str
    rows: Array
    scores: Array | None
    chosen: Array


@dataclass(frozen=True)
class Trace:
    """The recorded outputs of a network: named columns and a header. Frozen.

    Rows are selected by a slice, by their positions, or by a boolean mask: `trace[1000:5000]`,
    `trace[[3, 8]]`, `trace[trace.labels == 2]`. A position that is named twice selects the row
    twice, and `calibrate` refuses repeated rows.

    Args:
        columns: arrays by name, as the documentation of this module lists them.
        header: what the columns are about.

    Raises:
        BadData: a column is missing, or its length differs from that of the others.
    """

    columns: Mapping[str, Array]
    header: Header

    def __post_init__(self) -> None:
        needed = ["row", "digest"]
        for label in self.topology.exit_labels:
            needed.append(f"answer/{label}")
        for label in self.topology.gate_labels:
            needed += self.topology.score_columns(label)
        missing = [name for name in needed if name not in self.columns]
        if missing:
            raise BadData(f"the trace has no column {', '.join(missing)}; record again")
        count = len(self.columns["row"])
        for name, column in self.columns.items():
            if not name.startswith("cost/") and len(column) != count:
                raise BadData(
                    f"column {name!r} must have {count} rows, got {len(column)}; record again"
                )

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
        columns = {}
        for name, column in self.columns.items():
            # a cost [3] is the same for all rows; every other column has an entry per row
            is_per_row = not name.startswith("cost/") or column.ndim == 2
            if is_per_row:
                columns[name] = column[rows]
            else:
                columns[name] = column
        digests = columns["digest"]
        if isinstance(rows, slice):
            selection = _text(rows)
        else:
            selection = f" ({len(digests):,} rows)"
        header = replace(
            self.header,
            data=self.header.data + selection,
            data_fingerprint=hashlib.sha256(digests.tobytes()).hexdigest()[:16],
        )
        return Trace(columns, header)

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
        """Scores [N, E-1] float32 of a chain, shallow to deep.

        Raises:
            BadNetwork: the network has forks.
        """
        self.topology.require_chain("a table of all scores")
        if not self.topology.gates:
            return np.empty((len(self), 0), np.float32)
        return self._stacked([f"score/{gate}" for gate in self.topology.gates])

    @property
    def answers(self) -> Array:
        """Answers [N, E] int64, shallow to deep. An exit with several paths has a column for each.

        A trace at settings of one dial has a column for each setting [N, S].
        """
        if self.header.settings:
            count = len(self.header.settings)
            return self._stacked([f"setting/answer#{number}" for number in range(count)])
        return self._stacked([f"answer/{label}" for label in self.topology.exit_labels])

    def _stacked(self, names: Sequence[str]) -> Array:
        """Columns [N] of these names, side by side [N, names]."""
        return np.column_stack([self.columns[name] for name in names])

    @property
    def outputs(self) -> Array:
        """Logits [N, E, C] float32, in the order of `answers`.

        Raises:
            BadData: the trace was recorded with keep="answers".
        """
        missing = []
        logits = []
        for label in self.topology.exit_labels:
            column = self.columns.get(f"logits/{label}")
            if column is None:
                missing.append(label)
            else:
                logits.append(column)
        if missing:
            raise BadData(f"the trace has no logits of {missing}; record with keep='logits'")
        return np.stack(logits, axis=1)  # E columns [N, C] -> [N, E, C]

    @property
    def seen(self) -> SeenRows:
        """Source and digests of the rows, as a plan carries them."""
        header = self.header
        return SeenRows(
            header.data, header.data_fingerprint, self.columns["digest"], header.digest_form
        )

    def check(self, plan: Plan) -> None:
        """Refuse a plan that does not belong to the network that was recorded here.

        If the plan knows some rows of this trace by their digests, the logits and scores of these
        rows are compared too.

        Args:
            plan: of this network, engine and precision.

        Raises:
            Mismatch: the plan belongs to another network, engine or precision, or to other code.
        """
        require_kind("the plan", plan, Plan, "from calibrate, Plan.load or Plan.by_hand")
        recorded = self.header.origin
        planned = plan.origin
        if planned is not None and planned.key != recorded.key:
            raise Mismatch(
                f"the plan is for network {planned.network} ({planned.engine}, "
                f"{planned.precision}), the trace of network {recorded.network} "
                f"({recorded.engine}, {recorded.precision}); record this network, and calibrate "
                "again"
            )
        if planned is None or planned == recorded:
            return
        planned.refuse_other_code(recorded.code)
        if planned.probe is not None and planned.probe.recorded is not None:
            self._compare(planned.probe.recorded, planned.rounding)

    def _compare(self, known: RecordedRows, band: float) -> None:
        """Raise Mismatch where the logits or scores of a row differ from those a plan knows."""
        digests = np.array([int(text, 16) for text in known.digests], np.uint64)
        shared, here, there = np.intersect1d(self.columns["digest"], digests, return_indices=True)
        if not len(shared):
            return
        # All logits come before all scores: a score may differ where the answer already did.
        flipped = np.zeros(len(shared), bool)
        scale = 10.0  # the largest number so far
        for name, value in self._known_columns(known).items():
            if name not in self.columns:
                continue
            want = np.array(value, np.float32)[there]
            got = self.columns[name][here]
            distance = np.abs(got - want)
            if name.startswith("logits/"):
                flipped |= want.argmax(1) != got.argmax(1)
            else:
                distance = distance[~flipped]
            scale = max(scale, float(np.abs(want).max()))
            # the band is meant for numbers of up to 10, and grows with larger ones
            if not np.all(distance <= band * scale / 10):
                raise Mismatch(
                    f"{name!r} differs by {distance.max():.2g} on rows that the plan was made from "
                    f"(band {band:g}). The network computes different numbers than when the plan "
                    f"was made. Record and calibrate again."
                )

    def _known_columns(self, known: RecordedRows) -> dict[str, Any]:
        """The numbers that a plan knows, by the names of the columns here: logits, then scores."""
        columns: dict[str, Any] = {}
        for label, logits in zip(self.topology.exit_labels, known.logits, strict=True):
            columns[f"logits/{label}"] = logits
        for label, scores in zip(self.topology.gate_labels, known.scores, strict=True):
            names = self.topology.score_columns(label)
            table = np.asarray(scores, np.float32).reshape(-1, len(names))  # [n, K - 1]
            columns |= dict(zip(names, table.T, strict=True))
        return columns

    def replay(self, plan: Plan) -> Replay:
        """What `run` does on these rows under a plan, without running the network.

        The result is the same as that of `run`, except for rows whose scores are within the float
        band of a threshold.

        Args:
            plan: of this network, engine and precision.

        Returns:
            The exit, the answer and the stages that ran, for each row.

        Raises:
            Mismatch: the plan belongs to another network, engine or precision.
            InvalidArgument: the trace was recorded at settings of one dial, and the plan is not one
                of them.
        """
        self.check(plan)
        topology = self.topology
        schedule = plan.schedule(topology)
        if self.header.settings:
            return self._replayed_setting(plan, schedule)
        exits = np.full(len(self), -1, np.int64)
        outputs = np.zeros(len(self), np.int64)
        why = np.zeros(len(self), np.int64)
        ran = np.zeros((len(self), len(schedule)), bool)
        index_of = {label: index for index, label in enumerate(topology.exit_labels)}
        for visit in self.visits(schedule):
            stage = visit.stage
            ran[visit.rows, visit.number] = True
            for index, edge in enumerate(stage.edges):
                if edge.to != LEAVE:
                    continue
                leaving = visit.rows[visit.chosen == index]
                exits[leaving] = topology.exit_index(stage.name)
                outputs[leaving] = index_of[visit.label]
                why[leaving] = WHY.index(stage.why)
        # every row has left at some exit: pick its answer there
        answers = self.answers[np.arange(len(self)), outputs]  # [N, E] -> [N]
        return Replay(exits, answers, why, ran, outputs, schedule)

    def setting_of(self, plan: Plan) -> int:
        """The number of the dial's setting that a plan stands for.

        Args:
            plan: with one threshold for all gates.

        Returns:
            An index into `header.settings`.

        Raises:
            InvalidArgument: the trace was not recorded at this setting.
        """
        thresholds = set()
        for gate in self.topology.gates:
            for value in plan.thresholds.get(gate, (np.inf,)):
                thresholds.add(np.float32(value))
        settings = [np.float32(value) for value in self.header.settings]
        if len(thresholds) == 1 and plan.max_exit is None:
            (threshold,) = thresholds
            if threshold in settings:
                return settings.index(threshold)
        raise InvalidArgument(
            f"this trace was recorded at {len(settings)} settings of one dial, a threshold that "
            f"all gates share, and the plan is none of them; calibrate on this trace, or record at "
            f"this setting"
        )

    def _replayed_setting(self, plan: Plan, schedule: Schedule) -> Replay:
        """`replay` of a trace that was recorded at settings of one dial."""
        number = self.setting_of(plan)
        return Replay(
            exit=self.columns[f"setting/exit#{number}"],
            answer=self.columns[f"setting/answer#{number}"],
            why=self.columns[f"setting/why#{number}"],
            ran=self._stacked([f"setting/{stage.name}#{number}" for stage in schedule]),
            output=np.full(len(self), number),
            schedule=schedule,
        )

    def visits(self, schedule: Schedule) -> Iterator[Visit]:
        """Follow the rows of the trace through a schedule.

        Args:
            schedule: the stages of a plan for this network.

        Yields:
            The rows that arrive at a stage, each stage in turn, once for every path to it.
        """
        topology = self.topology
        # For each stage that has not run yet: the rows that wait for it, with the path they came
        # on.
        waiting: dict[str, list[tuple[Passed, Array]]] = {stage.name: [] for stage in schedule}
        first = schedule.stages[0].name
        waiting[first].append(((*schedule.skipped, first), np.arange(len(self))))
        for number, stage in enumerate(schedule):
            thresholds = np.asarray(stage.thresholds, np.float32)
            for path, rows in waiting.pop(stage.name):
                if topology.is_chain:
                    label = stage.name
                else:
                    label = topology.label(path)
                scores: Array | None = None
                chosen: Array = np.zeros(len(rows), np.int64)
                if stage.gate:
                    scores = self._scores_at(stage, label, rows)
                    chosen = choose(scores, thresholds)
                yield Visit(number, stage, label, rows, scores, chosen)
                # Hand the rows on to the stages that their edges lead to.
                for index, edge in enumerate(stage.edges):
                    if edge.to == LEAVE:
                        continue
                    followers = rows
                    if stage.gate:
                        followers = rows[chosen == index]
                    if len(followers):
                        waiting[edge.to].append(((*path, *edge.via, edge.to), followers))

    @property
    def prices(self) -> Prices:
        """The prices of the parts."""
        # "cost/segment/small" is the price of the part "segment/small"
        parts = {}
        for name, column in self.columns.items():
            if name.startswith("cost/"):
                parts[name.removeprefix("cost/")] = column
        return Prices(self.topology, parts)

    def unit(self, asked: str | None) -> str:
        """The unit in which plans are priced. Warns if its timings are noisy.

        Args:
            asked: "macs", "ms", or None for the default of `Prices.unit`.

        Returns:
            "macs" or "ms".
        """
        unit = self.prices.unit(asked)
        if unit == "ms" and self.header.noise is not None and self.header.noise > LARGE_NOISE:
            warnings.warn(
                f"the milliseconds are noisy: timings of the same call differ by "
                f"{self.header.noise:.0%}, so another plan may be the cheapest. Record again on an "
                f"idle machine, or price in MACs.",
                NoisyTimings,
                stacklevel=3,
            )
        return unit

    def reference(self, reference: str) -> str:
        """The exit that `reference` names.

        Args:
            reference: "last", "backbone" (the plain last model), or the name of an exit.

        Returns:
            The name of an exit, or "backbone" where the plain last model has columns of its own.

        Raises:
            UnknownName: there is no exit of this name.
        """
        last = self.topology.exits[-1]
        if reference in ("last", "backbone"):
            if reference == "backbone" and f"answer/{BACKBONE}" in self.columns:
                return BACKBONE
            return last
        return self.topology.exits[self.topology.exit_index(reference)]

    def reference_label(self, reference: str) -> str:
        """The name of the reference among the columns. If several paths lead to it, the one of its
        most expensive path.
        """
        name = self.reference(reference)
        if name == BACKBONE or self.topology.is_chain:
            return name
        return self.topology.label(self.topology.reference_path(name))

    def answers_at(self, name: str) -> Array:
        """Answers [N] of an exit or of the plain last model. If several paths lead to the exit,
        those of the most expensive one.
        """
        if name == BACKBONE:
            if f"answer/{BACKBONE}" in self.columns:
                return self.columns[f"answer/{BACKBONE}"]
            return self.answers[:, -1]
        return self.columns[f"answer/{self.reference_label(name)}"]

    def losses(self, risk: Risk, reference: str = "last") -> Array:
        """Losses of the answers of every exit.

        Args:
            risk: how an answer is judged.
            reference: what the answers are compared with: "last", "backbone" or an exit.

        Returns:
            Losses [N, E], in the order of `answers`.

        Raises:
            InvalidArgument: the risk needs labels and there are none.
        """
        if self.header.settings:
            return self._losses_of_settings(risk, reference)
        name = self.reference(reference)
        answers = self.answers
        outputs = None
        if risk.reads == "outputs":
            outputs = self.outputs
        if name != BACKBONE:
            index = self.topology.exit_labels.index(self.reference_label(reference))
            return losses_of(risk, answers, self.labels, index, outputs=outputs)
        # The plain last model is not an exit: add it as a last column, and drop its losses again.
        answers = np.column_stack([answers, self.columns[f"answer/{BACKBONE}"]])  # [N, E + 1]
        if outputs is not None:
            backbone = self.columns[f"logits/{BACKBONE}"][:, None]  # [N, C] -> [N, 1, C]
            outputs = np.concatenate([outputs, backbone], axis=1)  # [N, E + 1, C]
        return losses_of(risk, answers, self.labels, answers.shape[1] - 1, outputs=outputs)[:, :-1]

    def _losses_of_settings(self, risk: Risk, reference: str) -> Array:
        """`losses` [N, S] of every setting; the reference is setting 0, which closes all gates."""
        if risk.reads == "outputs" or self.reference(reference) != self.topology.exits[-1]:
            raise InvalidArgument(
                "a trace at settings of one dial holds answers only, and its reference is the last "
                "exit; use a risk of answers against 'last'"
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
            risk: a name or a Risk. By default the risk of the plan's promise; without a promise the
                accuracy gap (with labels) or disagreement.
            reference: what the risk compares with. By default that of the promise, then "last".
            confidence: of the interval, above 0 and below 1.
            batches: the batch sizes for which milliseconds are reported.
            repeats: how to count rows of equal content. By default the figures count them all, and
                the interval, which assumes independent draws, counts one of each. "independent":
                each row was drawn on its own, and the interval counts all. "once": the figures
                count one of each too.

        Returns:
            The figures.

        Raises:
            InvalidArgument: the risk needs labels or logits that are not here, or an argument is
                not allowed.
            Mismatch: the plan belongs to another network, engine or precision.
        """
        require_repeats(repeats)
        confidence = require_confidence(confidence)
        batches = [require_count("batches", batch) for batch in batches]
        if repeats == "once" and repeated(self.columns):
            return self[one_of_each(self.columns)].evaluate(
                plan, risk=risk, reference=reference, confidence=confidence, batches=batches
            )
        promise = plan.promise
        if risk is None:
            risk = promise.risk if promise else self._default_risk()
        if not reference:
            reference = promise.reference if promise else "last"
        judged = find_risk(risk)
        replayed = self.replay(plan)
        # [N, E] -> [N]: the loss of the answer that the plan gives
        losses = self.losses(judged, reference)[np.arange(len(self)), replayed.output]

        # The bound may depend on the order of the rows, so nobody may choose it.
        order = canonical(self.columns)
        repeated_rows = 0
        if repeats != "independent":
            distinct_rows = distinct(self.columns)
            repeated_rows = len(self) - len(distinct_rows)
            if repeated_rows:
                order = order[np.isin(order, distinct_rows)]
        low, high = interval(
            losses[order],
            low=judged.low,
            high=judged.high,
            confidence=confidence,
            binary=judged.binary,
        )
        # The mean counts every row, and the interval perhaps fewer: it must include the mean.
        value = float(losses.mean())
        measured = Measured(
            judged.name,
            self.reference(reference),
            value,
            min(low, value),
            max(high, value),
            confidence,
        )
        shares = np.bincount(replayed.exit, minlength=len(self.topology.exits)) / max(len(self), 1)
        prices = []
        for unit, batch in self._units(batches):
            prices.append(self.price(plan, unit, batch, reference))
        return Evaluation(
            rows=len(self),
            exits=self.topology.exits,
            shares=tuple(map(float, shares)),
            risk=measured,
            prices=tuple(prices),
            in_band=self._in_band(replayed),
            repeated=repeated_rows,
            **self._accuracies(replayed, reference),
        )

    def _default_risk(self) -> str:
        """The risk of a plan without a promise."""
        if self.labels is not None:
            return "accuracy_gap"
        return "disagreement"

    def price(
        self, plan: Plan, unit: str | None = None, batch: int = 64, reference: str = "last"
    ) -> Price:
        """Mean and worst cost per row of a plan, and that of the plain network.

        Args:
            plan: of this network, engine and precision.
            unit: "macs", "ms", or None: MACs where they are known, milliseconds otherwise.
            batch: how many rows are computed together.
            reference: the plain network: "last", "backbone" or an exit.

        Returns:
            The costs, in `unit` per row.

        Raises:
            InvalidArgument: nothing was recorded in this unit.
        """
        prices = self.prices
        unit = prices.unit(unit)
        batch = require_count("batch", batch)
        plain = self.reference(reference)
        if plain == BACKBONE:  # it costs what the last exit costs
            plain = self.topology.exits[-1]
        replayed = self.replay(plan)
        return Price(
            unit=unit,
            batch=batch,
            mean=prices.mean(replayed.schedule, replayed.ran, unit=unit, batch=batch),
            worst=prices.worst(replayed.schedule, unit=unit, batch=batch),
            plain=prices.plain(plain, unit=unit, batch=batch),
            note=self._note(prices, unit),
        )

    def _note(self, prices: Prices, unit: str) -> str:
        """A remark for readers of figures in this unit."""
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
        """The units and batch sizes in which something was recorded."""
        prices = self.prices
        # MACs per row are the same at every batch size
        units = list[tuple[str, int]]()
        if not prices.uncounted:
            units.append(("macs", 1))
        if prices.timed:
            units += [("ms", batch) for batch in batches]
        return units

    def _in_band(self, replayed: Replay) -> float:
        """The share of rows with a score within the float band of a threshold on their path."""
        if not len(self):
            return 0.0
        if self.header.settings:
            number = int(replayed.output[0])
            return float(self.columns[f"setting/near#{number}"].mean())
        is_near = np.zeros(len(self), bool)
        band = self.header.origin.band
        for visit in self.visits(replayed.schedule):
            if visit.scores is None:
                continue
            distances = np.abs(visit.scores.astype(float) - np.array(visit.stage.thresholds))
            is_near[visit.rows] |= (distances <= band).any(1)  # [n, K - 1] -> [n]
        return float(is_near.mean())

    def _accuracies(self, replayed: Replay, reference: str) -> dict[str, Any]:
        """The fields of an Evaluation that need labels; empty without them."""
        if self.labels is None:
            return {}
        is_right = replayed.answer == self.labels
        is_plain_right = self.columns[f"answer/{self.reference_label(reference)}"] == self.labels
        exit_accuracy: list[float | None] = []
        for index in range(len(self.topology.exits)):
            leaving = is_right[replayed.exit == index]
            # no row leaves at some exits
            exit_accuracy.append(float(leaving.mean()) if leaving.size else None)
        return {
            "accuracy": float(is_right.mean()),
            "plain_accuracy": float(is_plain_right.mean()),
            "exit_accuracy": tuple(exit_accuracy),
            "worst_class": worst_class(
                is_right, is_plain_right, self.labels, self.header.class_names
            ),
        }

    def _scores_at(self, stage: Stage, label: str, rows: Array) -> Array:
        """Scores [n, routes] of some rows at a stage that decides."""
        names = self.topology.score_columns(label)
        scores = [self.columns[names[route]][rows] for route in stage.routes]
        return np.column_stack(scores)

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
        """Make a trace from recorded logits of models that ran elsewhere.

        Calibration, evaluation and reports work on it as on a trace from `record`.

        A promise needs rows that can be told apart and recognized. Without `inputs` or `digests` a
        row is recognized by its logits: two rows with the same logits in every exit count as the
        same row, and rows that a model was trained on are not noticed.

        Args:
            logits: logits [N, C] by the name of the exit, in the order in which the exits run.
            costs: the cost of a row in each exit's model, in `unit`. A pair is (per call, per row),
                in milliseconds.
            labels: [N] whole numbers from 0 to C-1.
            probabilities: whether `logits` holds probabilities. Their logarithm is taken (at least
                log 1e-7).
            unit: of the costs, "ms" or "macs".
            gate: the name of a gate that reads one exit's logits, such as margin, max_prob or
                neg_entropy.
            scores: scores [N] by exit, for all exits but the last, instead of `gate`. Rows with a
                higher score leave sooner.
            inputs: the inputs of the models, [N, ...] or arrays by name. Rows are recognized by
                them, as in `record`. A `label` or `labels` among them is taken as `labels`. Give
                only what the models read: with a row id among the inputs no two rows are the same,
                and repeated or training rows are not noticed.
            digests: uint64 [N], to recognize rows by something different.
            rows: the rows' numbers in their source [N]; by default 0 to N-1.
            network: name and version of the models. A plan for other models is refused.
            shared: whether an exit continues where the one before it ended, as the exits of one
                network do. Then each of `costs` is what this exit adds. Otherwise every exit is a
                model of its own.
            data: a name for the rows.
            class_names: names of the classes.

        Returns:
            The trace. Apply its plans with `trace.replay(plan)`, or compare scores with
            `plan.thresholds`.

        Raises:
            BadData: the arrays have different shapes, or logits of the last exit are not finite.
            InvalidArgument: a cost is missing or not valid, or the gate needs more than one exit's
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
        values = {}
        for name, array in logits.items():
            values[name] = _float32_of(name, array, probabilities)
        count, classes = _one_shape(values)
        if len(names) < 2:
            raise BadData(f"logits must hold at least two exits, got {list(names)}")
        not_finite = np.flatnonzero(~np.isfinite(values[names[-1]]).all(1)).size
        if not_finite:
            raise BadData(
                f"the logits of the last exit must be finite, got {not_finite} rows of "
                f"{names[-1]!r} that are not"
            )
        if set(costs) != set(names):
            raise InvalidArgument(
                f"costs must hold one for each of {list(names)}, got {list(costs)}"
            )
        inputs, labels = _apart_from_label(inputs, labels)
        if rows is None:
            rows = np.arange(count)
        columns: dict[str, Array] = {
            "row": _column("rows", rows, count, np.int64),
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
        score_source = "scores"
        if scores is None:
            score_source = gate
            scores = _scored(values, gate)
        if set(scores) != set(names[:-1]):
            raise InvalidArgument(
                f"scores must hold one for each of {list(names[:-1])}, got {list(scores)}"
            )
        for name in names[:-1]:
            score = _column("scores", scores[name], count, np.float32)
            # a row with logits that are not finite never leaves: NaN is not above any threshold
            is_finite = np.isfinite(values[name]).all(1)
            columns[f"score/{name}"] = np.where(is_finite, score, np.float32(np.nan))

        # Models of their own start from the input; exits of one network continue the one before.
        earlier: dict[str, tuple[str, ...]] = {}
        if shared:
            earlier = {name: (before,) for before, name in pairwise(names)}
        topology = Topology.chain([Node(name, after=earlier.get(name, ())) for name in names])
        identity = json.dumps([network, names, shared, score_source])
        origin = Origin(
            hashlib.sha256(identity.encode()).hexdigest()[:16],
            "elsewhere",
            "float32",
            largest_logit=max(largest_of(values[name]) for name in names[:-1]),
        )
        digest_bytes = columns["digest"].astype("<u8").tobytes()
        header = Header(
            topology=topology,
            reference=names[-1],
            classes=classes,
            data=data,
            data_fingerprint=hashlib.sha256(digest_bytes).hexdigest()[:16],
            origin=origin,
            class_names=None if class_names is None else tuple(map(str, class_names)),
        )
        return Trace(columns, header)

    def save(self, path: str | Path) -> None:
        """Write `trace.npz`, atomically, without pickles.

        Args:
            path: of the file.
        """
        # The fields of the file keep the names that the first edition gave them.
        body = asdict(self.header)
        del body["topology"]
        body["chain"] = self.topology.to_json()
        body["taught"] = body.pop("trained")
        body["scores"] = {gate: scores.to_json() for gate, scores in self.header.scores.items()}
        body["settings"] = list(
            self.header.settings[1:]
        )  # the first is +inf, which JSON cannot hold
        body["columns"] = _digest(self.columns)
        write_arrays(path, to_document("trace", SCHEMA, body), self.columns)

    @staticmethod
    def load(path: str | Path) -> Trace:
        """Read a trace that `save` wrote.

        Args:
            path: of the file.

        Returns:
            The trace.

        Raises:
            BadFile: the file is damaged, was edited, or holds something different.
            NewerSchema: a later version of offramp wrote it.
        """
        text, columns = read_arrays(path)
        _, body = from_document(text, "trace", SCHEMA, str(path))
        try:
            if body.pop("columns") != _digest(columns):
                raise BadFile(f"{path} was edited or damaged after it was written; record again")
            trace = Trace(columns, _header_from(body, str(path)))
            _require_header(trace.header)
            for name, column in columns.items():
                _require_column(name, column, len(trace), trace.header.classes)
            return trace
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            raise BadFile(f"{path} is no complete trace ({problem!r}); record again") from problem


def _header_from(body: dict[str, Any], path: str) -> Header:
    """The header of a trace, from the fields of its file."""
    names = body["class_names"]
    scores = {}
    for gate, declared in body.get("scores", {}).items():  # absent in traces of the first edition
        scores[gate] = ScoreRange.from_json(declared)
    topology = Topology.from_json(body.pop("chain"))
    trained = body.pop("taught", True)
    fields = {
        **body,
        "topology": topology,
        "trained": trained,
        "origin": Origin.from_json(body["origin"]),
        "class_names": None if names is None else tuple(names),
        "digest_form": form_of(body.get("digest_form", 1), path),
        "settings": _settings_from(body.get("settings", ())),  # absent in older traces
        "scores": scores,
    }
    return Header(**fields)


def _settings_from(values: Sequence[float]) -> tuple[float, ...]:
    """The settings of a dial from a file, which leaves out the first: it closes every gate."""
    if not values:
        return ()
    return (np.inf, *map(float, values))


def _require_header(header: Header) -> None:
    """Raise TypeError for a header from a file in which a field has another type."""
    for text in (header.reference, header.data, header.data_fingerprint):
        if not isinstance(text, str):
            raise TypeError("a field of the header is of another type")
    for name in header.class_names or ():
        if not isinstance(name, str):
            raise TypeError("a field of the header is of another type")
    if not isinstance(header.trained, bool):
        raise TypeError("a field of the header is of another type")
    classes = header.classes
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise TypeError(f"classes is {classes!r}")


def _require_column(name: str, column: Array, n: int, classes: int) -> None:
    """Raise ValueError for a column from a file that differs from the list at the top of this
    module.

    Columns with names that are not in the list may have any form.

    Args:
        name: of the column.
        column: the array.
        n: the number of rows.
        classes: C, of the network.
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
    # a cost may be NaN: it was not measured
    if group == "cost" and (np.isinf(column).any() or (column < 0).any()):
        raise ValueError(f"column {name!r} has costs that are negative or infinite")


def _float32_of(name: str, array: Any, probabilities: bool) -> Array:
    """Logits [N, C] float32 of one exit."""
    values = _array(f"the logits of {name!r}", array)
    if values.ndim != 2 or not len(values) or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        raise BadData(
            f"the logits of {name!r} must be numbers [N, C] of at least one row and two classes, "
            f"got {values.dtype.name} {list(values.shape)}"
        )
    values = values.astype(np.float32)
    if not probabilities:
        return values
    # softmax in half precision is exact to about 0.01
    sums = values.sum(1, keepdims=True)  # [N, C] -> [N, 1]
    is_wrong = (values < -0.01) | (values > 1.01) | (np.abs(sums - 1) > 0.01)  # [N, C]
    if is_wrong.any():
        row = int(is_wrong.any(1).argmax())
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


def _array(what: str, value: Any) -> Array:
    """Numbers as an array. Takes tensors of any device and type, also with a gradient."""
    if callable(getattr(value, "detach", None)):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy does not have this type
            value = value.float()
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as problem:
        kind = type(value).__name__
        raise BadData(
            f"{what} must be one array or tensor of numbers, got a {kind} that is not ({problem})"
        ) from None


def _apart_from_label(inputs: Any, labels: Any) -> tuple[Any, Any]:
    """Separate the label from the inputs. Raises BadData where two labels differ."""
    if not isinstance(inputs, Mapping) or not any(map(is_label, inputs)):
        return inputs, labels
    others = {}
    for name, value in inputs.items():
        if not is_label(name):
            others[name] = value
            continue
        if labels is not None and not np.array_equal(
            _array("labels", labels), _array(f"inputs[{name!r}]", value)
        ):
            raise BadData(
                f"inputs[{name!r}] is taken as the label of a row, and differs from labels; leave "
                f"one of them out"
            )
        labels = value
    return others, labels


def _column(what: str, value: Any, count: int, kind: Any) -> Array:
    """Values [N] of a column. Raises BadData for other shapes and types."""
    values = _array(what, value)
    if np.dtype(kind).kind in "iu":  # fractions are refused, not rounded
        kinds = "whole numbers"
        allowed = "iu"
    else:
        kinds = "numbers"
        allowed = "iuf"
    if values.shape != (count,) or values.dtype.kind not in allowed:
        raise BadData(
            f"{what} must be {kinds} [{count}], got {values.dtype.name} {list(values.shape)}"
        )
    return values.astype(kind)


def _digests(values: Mapping[str, Array], inputs: Any, digests: Any, count: int) -> Array:
    """The digests of the rows, uint64 [N]: as given, of the inputs, or of all logits of a row."""
    if digests is not None:
        return _column("digests", digests, count, np.uint64)
    if inputs is None:
        logits = np.concatenate(list(values.values()), axis=1)  # E arrays [N, C] -> [N, E C]
        return digests_of(logits + np.float32(0))  # + 0 makes 0.0 of -0.0
    is_named = isinstance(inputs, Mapping)
    arrays = dict[str, Array]()
    for name, value in (inputs if is_named else {"": inputs}).items():
        what = f"inputs[{name!r}]" if is_named else "inputs"
        array = _array(what, value)
        if array.dtype.kind not in "biufc":
            raise BadData(
                f"{what} must be numbers [N, ...], got {array.dtype.name}. For texts give the "
                f"token ids, or pass a hash of each text as uint64 in digests=."
            )
        arrays[str(name)] = array
    if not arrays:
        raise BadData("inputs must hold at least one array [N, ...] besides the label, got none")
    lengths = {len(array) if array.ndim else 0 for array in arrays.values()}
    if lengths != {count}:
        raise BadData(f"inputs must have {count} rows, as the logits, got {sorted(lengths)}")
    return digests_of(arrays if is_named else arrays[""])


def _cost_of(name: str, cost: float | tuple[float, float], unit: str) -> Array:
    """A price [3] of a part: MACs, milliseconds per call and per row; NaN where it is not known."""
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
    # one number is per row, and the call itself is free
    call = pair[0] if len(pair) == 2 else 0.0
    return np.array([np.nan, call, pair[-1]])


def _scored(values: Mapping[str, Array], gate: str) -> dict[str, Array]:
    """A gate's scores [N] of every exit but the last. Raises InvalidArgument for a gate that reads
    more than logits.
    """
    import torch

    function = find("gates", gate)
    if not inspect.isfunction(function) or "reads" in inspect.signature(function).parameters:
        raise InvalidArgument(
            f"gate must be a function of one exit's logits, got {gate!r}; give scores= for others"
        )
    scores = {}
    for name in list(values)[:-1]:
        logits = torch.from_numpy(values[name])
        scores[name] = function(logits).float().numpy()  # [N, C] -> [N]
    return scores


def _text(rows: slice) -> str:
    """A slice as it is written: `[1000:5000]`."""
    edges = [rows.start, rows.stop]
    if rows.step is not None:
        edges.append(rows.step)
    texts = ["" if edge is None else str(edge) for edge in edges]
    return f"[{':'.join(texts)}]"


def _digest(columns: Mapping[str, Array]) -> str:
    """SHA-256 over names, types, shapes and bytes of all columns."""
    mark = hashlib.sha256()
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        mark.update(json.dumps([name, column.dtype.str, column.shape]).encode())
        # the bytes themselves: a copy would double a big trace
        mark.update(column.reshape(-1).view(np.uint8).data)
    return mark.hexdigest()
