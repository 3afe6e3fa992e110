"""The recorded outputs of a network (a *trace*): scores, answers and costs of every sample at every
exit, as named columns. Does not import torch.

`columns` lists the columns, `header` says what they are about, and `replay` follows rows through a
plan.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp._support.arguments import require_confidence, require_count, require_kind
from offramp._support.files import from_document, read_arrays, to_document, write_arrays
from offramp.errors import BadData, BadFile, InvalidArgument, Mismatch, NoisyTimings
from offramp.guarantees.bounds import interval
from offramp.guarantees.risks import Risk, find_risk, losses_of
from offramp.plans.columns import BACKBONE, Array, digest_of_columns, require_column
from offramp.plans.draws import canonical, distinct, one_of_each, repeated, require_repeats
from offramp.plans.evaluation import Evaluation, Measured, worst_class
from offramp.plans.from_arrays import columns_of_arrays
from offramp.plans.header import Header, header_from, require_header
from offramp.plans.plan import Plan, Price
from offramp.plans.pricing import Prices
from offramp.plans.provenance import RecordedRows, SeenRows
from offramp.plans.replay import WHY, Replay, Visit, visits_of
from offramp.plans.schedule import Schedule
from offramp.plans.topology import LEAVE, Topology

SCHEMA = 1
# If repeated timings of one call differ by more than this share, every use of them warns.
LARGE_NOISE = 0.25


@dataclass(frozen=True)
class Trace:
    """The recorded outputs of a network: named columns and a header. Frozen.

    Rows are selected by a slice, by their positions, or by a boolean mask: `trace[1000:5000]`,
    `trace[[3, 8]]`, `trace[trace.labels == 2]`. A position that is named twice selects the row
    twice, and `calibrate` refuses repeated rows.

    Args:
        columns: arrays by name, as `offramp.plans.columns` lists them.
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
        """Follow the rows of the trace through a schedule, see `visits_of`."""
        return visits_of(self.topology, self.columns, len(self), schedule)

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
        columns, header = columns_of_arrays(
            logits,
            costs,
            labels=labels,
            probabilities=probabilities,
            unit=unit,
            gate=gate,
            scores=scores,
            inputs=inputs,
            digests=digests,
            rows=rows,
            network=network,
            shared=shared,
            data=data,
            class_names=class_names,
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
        body["columns"] = digest_of_columns(self.columns)
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
            if body.pop("columns") != digest_of_columns(columns):
                raise BadFile(f"{path} was edited or damaged after it was written; record again")
            trace = Trace(columns, header_from(body, str(path)))
            require_header(trace.header)
            for name, column in columns.items():
                require_column(name, column, len(trace), trace.header.classes)
            return trace
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            raise BadFile(f"{path} is no complete trace ({problem!r}); record again") from problem


def _text(rows: slice) -> str:
    """A slice as it is written: `[1000:5000]`."""
    edges = [rows.start, rows.stop]
    if rows.step is not None:
        edges.append(rows.step)
    texts = ["" if edge is None else str(edge) for edge in edges]
    return f"[{':'.join(texts)}]"
