"""Where a trace and its plans come from: the network, engine and precision, a probe of them, and
the rows. No torch.
"""

from __future__ import annotations

import base64
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from offramp.errors import Mismatch, NewerSchema, Notice, OverlappingRows
from offramp.plans.signature import INPUT, Input, example

Digests = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
# of row digests (data/_digests.py); files that name none hold form 1, of the first edition
FORM = 2
# compaction moves logit-scale scores by about 1e-5; within this band a decision may differ
BAND = 1e-4
LISTED = 10  # rows named in a sentence
MADE_WITH = "made with"  # the key of what marks of code can be compared under
# the kind of marks of code: those of files that name none cover less of the user's code
MARKS = ", marks 2"
# how the keys of marks begin that are about numbers and texts of layers
SETTINGS = "the settings of "
OLDER_MARKS = (
    "the marks of code in this plan are of an older kind, which covers less, and were not "
    "compared. "
    "Record and calibrate again to have your code compared."
)
ORDINARY = 30.0  # the largest logit of ordinary networks, for which the band is meant
# where numbers are rounded to eight bits: one step of bfloat16 for logits from 16 to 32
ROUNDED = 0.125


Logits = tuple[tuple[tuple[float, ...], ...], ...]  # [exits][rows][classes]
Scores = tuple[tuple[float, ...], ...]  # [gates][rows]


@dataclass(frozen=True)
class RecordedRows:
    """Some of the recorded rows, and what the network gave for them.

    digests: of their content, in hexadecimal. values: the rows themselves, as (name, dtype, shape
    of all of them, bytes in base64) of each input; None unless whoever recorded asked for it.
    """

    digests: tuple[str, ...]
    logits: Logits
    scores: Scores
    values: tuple[tuple[str, str, tuple[int, ...], str], ...] | None = None

    def arrays(self) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """The rows by the names of inputs; empty where they were not kept."""
        arrays = {}
        for name, kind, shape, text in self.values or ():
            raw = base64.b64decode(text, validate=True)
            arrays[name] = (
                np.frombuffer(raw, np.dtype(kind).newbyteorder("<")).reshape(shape).astype(kind)
            )
        return arrays

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> RecordedRows:
        """The rows written by `dataclasses.asdict`."""
        values = body["values"]
        if values is not None:
            values = tuple(
                (str(name), str(kind), tuple(map(int, shape)), text)
                for name, kind, shape, text in values
            )
        digests = tuple(f"{int(text, 16):016x}" for text in body["digests"])
        rows = RecordedRows(digests, _logits(body["logits"]), _scores(body["scores"]), values)
        rows.arrays()
        return rows


@dataclass(frozen=True)
class Probe:
    """Rows on which `open` compares a network with the one that was recorded, within the float
    band.

    Seeded rows, drawn within the range of what was recorded, can be made again anywhere: their
    logits, and the scores of the gates. Of `recorded` rows a plan has digests, logits and scores;
    they are compared where somebody has them.
    rows: which of the drawn ones count (those for which all outputs are finite); None, as in files
    of the first version, means all. scores: None in files of the first version.
    """

    inputs: tuple[Input, ...]
    seed: int
    logits: Logits
    scores: Scores | None = None
    rows: tuple[int, ...] | None = None
    recorded: RecordedRows | None = None

    def batch(self) -> Any:
        """The seeded rows as a network takes them: an array, or a mapping of arrays."""
        if self.rows is None:
            return example(self.inputs, len(self.logits[0]), self.seed)
        drawn = example(self.inputs, max(self.rows, default=0) + 1, self.seed)
        picks = np.array(self.rows, np.int64)
        if isinstance(drawn, dict):
            return {name: value[picks] for name, value in drawn.items()}
        return drawn[picks]

    def some(self, count: int) -> Any:
        """Rows of the recorded kind, for what must be compiled or tried: recorded ones where they
        were kept.
        """
        kept = self.recorded.arrays() if self.recorded is not None else {}
        if INPUT in kept:
            return kept[INPUT][:count]
        if kept:
            return {name.removeprefix(INPUT + "/"): value[:count] for name, value in kept.items()}
        seeded = self.batch()
        if isinstance(seeded, dict):
            many = len(next(iter(seeded.values())))
        else:
            many = len(seeded)
        if not many:
            return example(self.inputs, count, self.seed)
        picks = np.arange(count) % many
        if isinstance(seeded, dict):
            return {name: value[picks] for name, value in seeded.items()}
        return seeded[picks]

    @property
    def known(self) -> bool:
        """Whether there are rows that the network takes: drawn ones, or recorded ones that were
        kept.
        """
        return self.rows is None or bool(self.rows) or bool(self.recorded and self.recorded.values)

    @property
    def classes(self) -> int:
        """The number of classes; 0 where no row could be probed."""
        rows = [*self.logits[0], *(self.recorded.logits[0] if self.recorded else ())]
        return len(rows[0]) if rows else 0

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Probe:
        """The probe written by `dataclasses.asdict`."""
        rows = body.get("rows")
        recorded = body.get("recorded")
        scores = body.get("scores")
        logits = _logits(body["logits"])
        if not logits or (
            rows is not None and (min(rows, default=0) < 0 or len(rows) != len(logits[0]))
        ):
            raise ValueError(f"{len(logits)} exits and rows {rows} are no probe")
        return Probe(
            inputs=tuple(map(Input.from_json, body["inputs"])),
            seed=int(body["seed"]),
            logits=logits,
            scores=None if scores is None else _scores(scores),
            rows=None if rows is None else tuple(map(int, rows)),
            recorded=None if recorded is None else RecordedRows.from_json(recorded),
        )


def _logits(body: Any) -> Logits:
    return tuple(tuple(tuple(map(float, row)) for row in rows) for rows in body)


def _scores(body: Any) -> Scores:
    return tuple(tuple(map(_score, rows)) for rows in body)


def _score(value: Any) -> Any:
    """A row's score, or its scores where a gate gives several."""
    if isinstance(value, (list, tuple)):
        return tuple(map(float, value))
    return float(value)


@dataclass(frozen=True)
class Origin:
    """What a trace, and every plan made from it, was measured on; another one voids a promise.

    code: marks of the code of gates, exits and models by what they are of ("gate small"), of the
    settings of their layers, and under "made with" what they can be compared under; see
    `code_marks`. Empty in files of the first version.
    """

    network: str
    engine: str
    precision: str
    probe: Probe | None = None
    code: tuple[tuple[str, str], ...] = ()
    largest_logit: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """What must be equal for a promise to hold."""
        return self.network, self.engine, self.precision

    @property
    def band(self) -> float:
        """How far from a threshold a score may lie on its other side in a batch of another size.

        It is meant for logits up to 30, and grows with them beyond: rounding is relative.
        """
        return self.rounding * max(1.0, self.largest_logit / ORDINARY)

    @property
    def rounding(self) -> float:
        """The band of ordinary logits, on this engine and in this precision."""
        options = self.engine.partition(":")[2].split(",")
        rounded = any(option.startswith(("bf16", "int8")) for option in options)
        narrow = "float16" in self.precision or "matmul" in self.precision  # bfloat16 among them
        return ROUNDED if rounded or narrow else BAND

    def refuse_other_code(self, code: tuple[tuple[str, str], ...]) -> None:
        """Raise Mismatch when code of the same name computes otherwise now than when this was
        recorded.
        """
        before = dict(self.code)
        now = dict(code)
        made_with = before.get(MADE_WITH)
        here = now.get(MADE_WITH)
        if made_with != here:  # another Python or torch: marks differ for nothing
            if made_with is not None and len(before) > 1 and f"{made_with}{MARKS}" == here:
                warnings.warn(OLDER_MARKS, Notice, stacklevel=3)
            return
        for what, mark in before.items():
            if now.get(what) == mark:
                continue
            if what.startswith(SETTINGS):
                told = f"{what} are not those that the plan was made with"
            else:
                told = f"the code of {what} is not the code that the plan was made with"
            raise Mismatch(
                f"{told}; record and calibrate this one, or drop the promise: "
                f"Plan.by_hand(plan.thresholds)"
            )

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Origin:
        """The origin written by `dataclasses.asdict`."""
        probe = None if body["probe"] is None else Probe.from_json(body["probe"])
        code = tuple((str(what), str(mark)) for what, mark in body.get("code", ()))
        largest = float(body.get("largest_logit", 0.0))
        if not 0 <= largest < math.inf:
            raise ValueError(f"the largest logit is {largest}")
        return Origin(
            str(body["network"]), str(body["engine"]), str(body["precision"]), probe, code, largest
        )


@dataclass(frozen=True)
class SeenRows:
    """The rows that a plan was made from, or that trained a network: their source, and a digest of
    each.

    form: that of the digests. older: digests of form 1 of further rows, where a file of the first
    edition brought them.
    rounded: of rows that trained a network, also the digests of what float16 and bfloat16 make of
    them.
    """

    data: str
    fingerprint: str
    digests: np.ndarray[Any, np.dtype[np.uint64]]
    form: int = FORM
    older: np.ndarray[Any, np.dtype[np.uint64]] = field(
        default_factory=lambda: np.zeros(0, np.uint64)
    )
    rounded: np.ndarray[Any, np.dtype[np.uint64]] = field(
        default_factory=lambda: np.zeros(0, np.uint64)
    )

    def refuse_overlap(
        self, digests: Digests, what: str, rows: Numbers | None = None, form: int = FORM
    ) -> None:
        """Raise OverlappingRows when rows of these contents were already used for this plan or
        trace.

        rows: their numbers in their data [N], for the sentence; without them it counts from 0.
        form: of `digests`. Raises Mismatch where digests of another form cannot tell.
        """
        shared = np.flatnonzero(self.shared(digests, what, form))
        if shared.size:
            raise OverlappingRows(
                f"{shared.size:,} of the {digests.size:,} {what} rows ({_told(shared, rows)}) "
                f"also stand among the "
                f"{self.digests.size:,} rows of {self.data}; give rows that were used for nothing "
                f"before",
                rows=shared if rows is None else rows[shared],
            )

    def shared(self, digests: Digests, what: str, form: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of some rows are among these, bool [N].

        Args:
            digests: their digests, uint64 [N].
            what: what they are, for the sentence.
            form: the form of their digests, such as `trace.header.digest_form`.

        Raises:
            Mismatch: digests of this form cannot be compared with all of these rows.
        """
        if not self.comparable(form):
            raise Mismatch(
                f"the {what} rows and the rows of {self.data} were recorded by different editions "
                f"of offramp, whose "
                "row digests cannot be compared, so it cannot be told whether they overlap. "
                "Record both again."
            )
        return np.isin(digests, self.digests)

    def comparable(self, form: int) -> bool:
        """Whether digests of this form can tell all of these rows."""
        return form == self.form and not self.older.size

    def in_form(self, form: int) -> Digests:
        """The digests that are held in a form."""
        own = self.digests if self.form == form else np.zeros(0, np.uint64)
        return np.concatenate([own, self.older]) if form == 1 else own

    def and_also(self, others: SeenRows) -> SeenRows:
        """These rows, and the digests of others that had a part in the plan as well."""
        rounded = np.concatenate([self.rounded, others.rounded])
        if self.form == others.form:
            older = np.concatenate([self.older, others.older])
            digests = np.concatenate([self.digests, others.digests])
            return replace(self, digests=digests, older=older, rounded=rounded)
        digests = np.concatenate([self.in_form(FORM), others.in_form(FORM)])
        older = np.concatenate([self.in_form(1), others.in_form(1)])
        return replace(self, digests=digests, form=FORM, older=older, rounded=rounded)

    def once(self) -> SeenRows:
        """Each digest once."""
        digests = np.unique(self.digests)
        return replace(
            self, digests=digests, older=np.unique(self.older), rounded=np.unique(self.rounded)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeenRows) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.data, self.fingerprint, self.digests.size))

    def to_json(self) -> dict[str, Any]:
        """Plain data; the digests as one base64 text of sorted little-endian uint64."""
        body: dict[str, Any] = {"data": self.data, "fingerprint": self.fingerprint}
        body |= {"digests": _text(self.digests), "form": self.form}
        for name, more in (("older", self.older), ("rounded", self.rounded)):
            if more.size:
                body[name] = _text(more)
        return body

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> SeenRows:
        """The rows written by `to_json`, also by the first edition. Raises NewerSchema,
        ValueError.
        """
        form = form_of(body.get("form", 1), body["data"])
        more = [_digests(body.get(name, "")) for name in ("older", "rounded")]
        return SeenRows(body["data"], body["fingerprint"], _digests(body["digests"]), form, *more)


def largest_of(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    """The largest finite magnitude among values; 0.0 where there is none."""
    if not values.size:
        return 0.0
    low = float(values.min())
    high = float(values.max())
    if math.isfinite(low) and math.isfinite(high):  # without a copy of a big trace
        return max(-low, high)
    finite = values[np.isfinite(values)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def form_of(value: object, where: str) -> int:
    """The form of digests that a file states. Raises NewerSchema for a later one, ValueError for
    none.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"the digests have the form {value!r}")
    if value > FORM:
        raise NewerSchema(
            f"the row digests of {where} have form {value}, this offramp reads up to {FORM}; "
            f"upgrade offramp"
        )
    return value


def _text(digests: Digests) -> str:
    return base64.b64encode(np.sort(digests).astype("<u8").tobytes()).decode()


def _digests(text: str) -> Digests:
    raw = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8")
    return raw.astype(np.uint64)


def all_of(some: Iterable[SeenRows | None]) -> SeenRows | None:
    """All these rows together, told by the first of them; None where there are none."""
    known = [seen for seen in some if seen is not None]
    return reduce(SeenRows.and_also, known) if known else None


def union(some: Iterable[SeenRows | None]) -> SeenRows | None:
    """All these rows, each digest once, told by the first of them; None where there are none."""
    known = all_of(some)
    return None if known is None else known.once()


def refuse_training_rows(columns: Mapping[str, np.ndarray[Any, np.dtype[Any]]], what: str) -> None:
    """Raise OverlappingRows where rows of a trace (its columns) also trained the network."""
    training_rows = columns.get("learned")
    if training_rows is not None and training_rows.any():
        raise OverlappingRows(
            f"{int(training_rows.sum()):,} of the {training_rows.size:,} {what} rows "
            f"({named(columns['row'][training_rows])}) also "
            "trained an exit of this network; give rows that it has never seen, or leave these "
            "out with drop_seen=True",
            rows=columns["row"][training_rows],
        )


def named(rows: Numbers) -> str:
    """`row 3`, `rows 3, 5 and 8`, or `rows 3, 5, 8, ... and 490 more`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown = ", ".join(str(row) for row in rows[:LISTED])
    if len(rows) > LISTED:
        return f"rows {shown} and {len(rows) - LISTED:,} more"
    head, _, last = shown.rpartition(", ")
    return f"rows {head} and {last}"


def _told(places: np.ndarray[Any, np.dtype[np.intp]], rows: Numbers | None) -> str:
    return f"{named(places)}, counted from 0" if rows is None else named(rows[places])
