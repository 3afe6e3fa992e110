"""Scores, answers and costs of every sample at every exit, as named columns. No torch.

    logits/<exit>   [N, C] float32      kept unless keep="answers"
    answer/<exit>   [N]    int64        the arg max of the logits, first of equals
    ..../backbone           logits and answer of the plain last model, where its exit answers otherwise (a mean)
    score/<gate>    [N]    float32      with K successors: score/<gate>@<route>, K-1 columns
    label, row      [N]    int64        label may be missing; row is the number in the data's source
    digest          [N]    uint64       of a row's content, so that overlap is noticed
    learned         [N]    bool         whether `fit` taught the network with this row; absent where nothing was fitted
    cost/<part>     [3] or [N, 3]       MACs per row, milliseconds per call a, milliseconds per row b (a + b n)

A part is segment/<node>, exit/<node> or gate/<node>. Milliseconds are NaN when they were not measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.chain import Chain
from offramp.errors import BadData, BadFile, BadInput, Mismatch
from offramp.evaluation import Evaluation, Measured, worst_class
from offramp.files import from_document, read_arrays, to_document, write_arrays
from offramp.guarantees.bounds import interval
from offramp.guarantees.risks import Risk, find_risk, losses_of
from offramp.plan import Plan, Price, choose
from offramp.pricing import Prices
from offramp.provenance import Origin, SeenRows
from offramp.scores import ScoreRange

SCHEMA = 1
BACKBONE = "backbone"
WHY = ("gate", "end", "deepest", "deadline")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Header:
    """What the columns are about. `taught` is False while an exit was never taught.

    scores: what each gate declares of its scores; of a gate that is not named nothing is known.
    """

    chain: Chain
    reference: str
    classes: int
    data: str
    data_fingerprint: str
    origin: Origin
    class_names: tuple[str, ...] | None = None
    taught: bool = True
    scores: Mapping[str, ScoreRange] = field(default_factory=dict)


@dataclass(frozen=True)
class Replay:
    """What a plan does to the rows of a trace: exit [N], answer [N], why [N] (an index into WHY)."""

    exit: Array
    answer: Array
    why: Array


@dataclass(frozen=True)
class Trace:
    """Named columns and a header; frozen. `trace[a:b]` and `trace[rows]` select rows."""

    columns: Mapping[str, Array]
    header: Header

    def __post_init__(self) -> None:
        needed = ["row", "digest", *(f"answer/{name}" for name in self.chain.exits)]
        missing = [name for name in needed if name not in self.columns]
        missing += [f"score/{name}" for name in self.chain.gates if not self._routes(name)]
        if missing:
            raise BadData(f"the trace has no column {', '.join(missing)}; record again")
        n = len(self.columns["row"])
        for name, column in self.columns.items():
            if not name.startswith("cost/") and len(column) != n:
                raise BadData(f"column {name!r} has {len(column)} rows, expected {n}; record again")

    def __len__(self) -> int:
        return len(self.columns["row"])

    def __str__(self) -> str:
        kind = "labelled" if self.labels is not None else "unlabelled"
        return f"Trace of {len(self):,} {kind} rows of {self.header.data}, exits {', '.join(self.chain.exits)}"

    def __getitem__(self, rows: slice | Array) -> Trace:
        def of(name: str, column: Array) -> Array:
            per_row = not name.startswith("cost/") or column.ndim == 2
            return column[rows] if per_row else column

        columns = {name: of(name, column) for name, column in self.columns.items()}
        mark_of = columns["digest"]
        mark = hashlib.sha256(mark_of.tobytes()).hexdigest()[:16]
        which = _text(rows) if isinstance(rows, slice) else f" ({len(mark_of):,} rows)"
        return Trace(columns, replace(self.header, data=self.header.data + which, data_fingerprint=mark))

    @property
    def chain(self) -> Chain:
        """The nodes, in order."""
        return self.header.chain

    @property
    def labels(self) -> Array | None:
        """Labels [N] int64, or None."""
        return self.columns.get("label")

    @property
    def scores(self) -> Array:
        """Scores [N, E-1] float32, shallow to deep."""
        empty = np.empty((len(self), 0), np.float32)
        return (
            np.column_stack([self.columns[f"score/{gate}"] for gate in self.chain.gates]) if self.chain.gates else empty
        )

    @property
    def answers(self) -> Array:
        """Answers [N, E] int64, shallow to deep."""
        return np.column_stack([self.columns[f"answer/{name}"] for name in self.chain.exits])

    @property
    def outputs(self) -> Array:
        """Logits [N, E, C] float32. Raises BadData when the trace was recorded with keep='answers'."""
        missing = [name for name in self.chain.exits if f"logits/{name}" not in self.columns]
        if missing:
            raise BadData(f"the trace has no logits of {missing}; record with keep='logits'")
        return np.stack([self.columns[f"logits/{name}"] for name in self.chain.exits], axis=1)

    @property
    def seen(self) -> SeenRows:
        """Source and digests of the rows, as a plan carries them."""
        return SeenRows(self.header.data, self.header.data_fingerprint, self.columns["digest"])

    def check(self, plan: Plan) -> None:
        """Raise Mismatch when the plan belongs to another network, engine or precision."""
        mine, its = self.header.origin, plan.origin
        if its is not None and its.key != mine.key:
            raise Mismatch(
                f"the plan is for network {its.network} ({its.engine}, {its.precision}), the trace of network "
                f"{mine.network} ({mine.engine}, {mine.precision}); record this network, and calibrate again"
            )

    def replay(self, plan: Plan) -> Replay:
        """What `run` does on these rows under the plan (equal outside the float band)."""
        self.check(plan)
        steps = plan.steps(self.chain)
        last = self.chain.place(steps[-1].name)
        exits = np.full(len(self), last, np.int64)
        going = np.ones(len(self), bool)
        for step in steps:
            if step.gate:
                thresholds = np.asarray(plan.thresholds[step.name], np.float32)
                left = going & (choose(self._scores_at(step.name, len(thresholds)), thresholds) == 0)
                exits[left] = self.chain.place(step.name)
                going &= ~left
        why = np.where(going, WHY.index("end" if last == len(self.chain.exits) - 1 else "deepest"), WHY.index("gate"))
        return Replay(exits, self.answers[np.arange(len(self)), exits], why)

    @property
    def prices(self) -> Prices:
        """What each part costs."""
        parts = {
            name.removeprefix("cost/"): column for name, column in self.columns.items() if name.startswith("cost/")
        }
        return Prices(self.chain, parts)

    def reference(self, against: str) -> str:
        """The exit that `against` names: last, backbone (the plain last model), or an exit. Raises UnknownName."""
        last = self.chain.exits[-1]
        if against in ("last", "backbone"):
            return BACKBONE if against == "backbone" and f"answer/{BACKBONE}" in self.columns else last
        return self.chain.exits[self.chain.place(against)]

    def losses(self, risk: Risk, against: str = "last") -> Array:
        """Losses [N, E] of every exit's answers. Raises BadInput when the risk needs labels and there are none."""
        name, answers = self.reference(against), self.answers
        outputs = self.outputs if risk.reads == "outputs" else None
        if name != BACKBONE:
            return losses_of(risk, answers, self.labels, self.chain.place(name), outputs=outputs)
        answers = np.column_stack([answers, self.columns[f"answer/{BACKBONE}"]])
        if outputs is not None:
            outputs = np.concatenate([outputs, self.columns[f"logits/{BACKBONE}"][:, None]], axis=1)
        return losses_of(risk, answers, self.labels, answers.shape[1] - 1, outputs=outputs)[:, :-1]

    def evaluate(
        self,
        plan: Plan,
        *,
        risk: str | Risk | None = None,
        against: str | None = None,
        confidence: float = 0.95,
        batches: Sequence[int] = (1, 64),
    ) -> Evaluation:
        """Accuracy, risk with interval, cost, shares and worst class of a plan on these rows.

        risk and against default to those of the plan's promise, then to the gap (with labels) or disagreement.
        """
        promised = plan.promise
        default = promised.risk if promised else "accuracy_gap" if self.labels is not None else "disagreement"
        asked = find_risk(risk if risk is not None else default)
        name = against or (promised.against if promised else "last")
        done = self.replay(plan)
        losses = self.losses(asked, name)[np.arange(len(self)), done.exit]
        low, high = interval(losses, low=asked.low, high=asked.high, confidence=confidence, binary=asked.binary)
        shares = np.bincount(done.exit, minlength=len(self.chain.exits)) / max(len(self), 1)
        return Evaluation(
            rows=len(self),
            exits=self.chain.exits,
            shares=tuple(map(float, shares)),
            risk=Measured(asked.name, self.reference(name), float(losses.mean()), low, high, confidence),
            prices=tuple(self.price(plan, unit, batch, name) for unit, batch in self._units(batches)),
            in_band=self._in_band(plan, done.exit),
            **self._accuracies(done, name),
        )

    def price(self, plan: Plan, unit: str = "macs", batch: int = 64, against: str = "last") -> Price:
        """Mean and worst cost per row of a plan, and that of the plain network; rows priced together by `batch`."""
        steps, prices = plan.steps(self.chain), self.prices
        plain = self.chain.exits[-1] if self.reference(against) == BACKBONE else self.reference(against)
        deepest = np.full(len(self), len(self.chain.exits) - 1)
        return Price(
            unit=unit,
            batch=batch,
            mean=prices.mean(steps, self.replay(plan).exit, unit=unit, batch=batch),
            worst=prices.mean(steps, deepest, unit=unit, batch=batch),
            plain=prices.plain(plain, unit=unit, batch=batch),
        )

    def _units(self, batches: Sequence[int]) -> list[tuple[str, int]]:
        parts = self.prices.parts.values()
        units: list[tuple[str, int]] = []
        if not any(np.isnan(price[..., 0]).any() for price in parts):
            units.append(("macs", 1))
        if not any(np.isnan(price[..., 1:]).any() for price in parts):
            units += [("ms", batch) for batch in batches]
        return units

    def _in_band(self, plan: Plan, exits: Array) -> float:
        near, band = np.zeros(len(self), bool), self.header.origin.band
        for step in plan.steps(self.chain):
            if step.gate:
                thresholds = np.array(plan.thresholds[step.name])
                close = np.abs(self._scores_at(step.name, len(thresholds)).astype(float) - thresholds) <= band
                near |= close.any(1) & (exits >= self.chain.place(step.name))
        return float(near.mean()) if len(self) else 0.0

    def _accuracies(self, done: Replay, against: str) -> dict[str, Any]:
        if self.labels is None:
            return {}
        right = done.answer == self.labels
        plain = self.columns[f"answer/{self.reference(against)}"] == self.labels
        leaving = [right[done.exit == place] for place in range(len(self.chain.exits))]
        return {
            "accuracy": float(right.mean()),
            "plain_accuracy": float(plain.mean()),
            "exit_accuracy": tuple(float(rows.mean()) if rows.size else None for rows in leaving),
            "worst_class": worst_class(right, plain, self.labels, self.header.class_names),
        }

    def _scores_at(self, gate: str, routes: int) -> Array:
        """Scores [N, K-1] of a gate."""
        names = self._routes(gate)
        if len(names) != routes:
            raise BadInput(f"gate {gate!r} has {routes} thresholds, expected {len(names)}, one per score")
        return np.column_stack([self.columns[name] for name in names])

    def _routes(self, gate: str) -> list[str]:
        """Names of the score columns of a gate: one, or one per route."""
        if f"score/{gate}" in self.columns:
            return [f"score/{gate}"]
        names = [name for name in self.columns if name.startswith(f"score/{gate}@")]
        return sorted(names, key=lambda name: int(name.rpartition("@")[2]))

    def save(self, path: str | Path) -> None:
        """Write `trace.npz`, atomically, without pickles."""
        body = asdict(self.header)
        body["chain"] = self.chain.to_json()
        body["scores"] = {gate: scores.to_json() for gate, scores in self.header.scores.items()}
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
            header = {
                **body,
                "chain": Chain.from_json(body["chain"]),
                "origin": Origin.from_json(body["origin"]),
                "class_names": None if names is None else tuple(names),
                "scores": {gate: ScoreRange.from_json(scores) for gate, scores in declared.items()},
            }
            return Trace(columns, Header(**header))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            raise BadFile(f"{path} is no complete trace ({problem!r}); record again") from problem


def _text(rows: slice) -> str:
    edges = [rows.start, rows.stop, *([rows.step] if rows.step is not None else [])]
    return "[" + ":".join("" if edge is None else str(edge) for edge in edges) + "]"


def _digest(columns: Mapping[str, Array]) -> str:
    """SHA-256 over names, types, shapes and bytes of all columns."""
    mark = hashlib.sha256()
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        mark.update(json.dumps([name, column.dtype.str, column.shape]).encode())
        mark.update(column.tobytes())
    return mark.hexdigest()
