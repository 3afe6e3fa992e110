"""Where a trace and its plans come from: the network, engine and precision, a probe of them, and
the rows. Does not import torch.
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
# The form of row digests (see digests.py). Files without this field hold form 1, of the first
# edition.
FORM = 2
# Compaction moves logit-scale scores by about 1e-5; within this band a decision may differ.
BAND = 1e-4
LISTED = 10  # rows named in a sentence
# The key of the versions that marks of code depend on: only equal versions can be compared.
MADE_WITH = "made with"
# The kind of marks of code. Older files do not name it, and their marks cover less code.
MARKS = ", marks 2"
# Keys of marks that begin so are about numbers and texts of layers.
SETTINGS = "the settings of "
# The mark of code that changed while it was recorded. It is not compared.
CHANGING = "changing"
OLDER_MARKS = (
    "the marks of code in this plan are of an older kind, which covers less, and were not "
    "compared. "
    "Record and calibrate again to have your code compared."
)
ORDINARY = 30.0  # the largest logit of ordinary networks, for which the band is meant
# The band where numbers have eight bits: one step of bfloat16 for logits from 16 to 32.
ROUNDED = 0.125


Logits = tuple[tuple[tuple[float, ...], ...], ...]  # [exits][rows][classes]
Scores = tuple[tuple[float, ...], ...]  # [gates][rows]


@dataclass(frozen=True)
class RecordedRows:
    """Some of the recorded rows, with their logits and scores.

    Attributes:
        digests: of their content, in hexadecimal.
        logits: by exit, row and class.
        scores: by gate and row.
        values: the rows themselves, as (name, dtype, shape of all of them, bytes in base64) of each
            input. None unless the caller of `record` asked for them.
    """

    digests: tuple[str, ...]
    logits: Logits
    scores: Scores
    values: tuple[tuple[str, str, tuple[int, ...], str], ...] | None = None

    def arrays(self) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """The rows by the names of inputs; empty where they were not stored."""
        arrays = {}
        for name, kind, shape, text in self.values or ():
            raw = base64.b64decode(text, validate=True)
            little_endian = np.dtype(kind).newbyteorder("<")
            arrays[name] = np.frombuffer(raw, little_endian).reshape(shape).astype(kind)
        return arrays

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> RecordedRows:
        """The rows written by `dataclasses.asdict`."""
        values = None
        if body["values"] is not None:
            inputs = []
            for name, kind, shape, text in body["values"]:
                inputs.append((str(name), str(kind), tuple(map(int, shape)), text))
            values = tuple(inputs)
        # read and written again: a text that is not a digest is refused
        digests = tuple(f"{int(text, 16):016x}" for text in body["digests"])
        rows = RecordedRows(digests, _logits(body["logits"]), _scores(body["scores"]), values)
        rows.arrays()  # raises ValueError where the values cannot be read
        return rows


@dataclass(frozen=True)
class Probe:
    """Rows on which `open` compares a network with the recorded one, within the float band.

    Seeded rows are drawn within the range of the recorded ones, so they can be drawn again
    anywhere. Recorded rows are compared where a caller has them.

    Attributes:
        inputs: the names, shapes and ranges of the inputs.
        seed: of the seeded rows.
        logits: of the seeded rows, by exit, row and class.
        scores: of the seeded rows, by gate and row. None in files of the first version.
        rows: the seeded rows that count: those with finite outputs. None, as in files of the first
            version, means all.
        recorded: digests, logits and scores of some recorded rows.
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
        return _picked(drawn, np.array(self.rows, np.int64))

    def some(self, count: int) -> Any:
        """Rows of the recorded kind, for compiling or a trial run.

        Args:
            count: how many rows.

        Returns:
            Recorded rows where they were stored (at most `count`), otherwise `count` seeded rows.
            An array, or a mapping of arrays.
        """
        stored = {}
        if self.recorded is not None:
            stored = self.recorded.arrays()
        if INPUT in stored:
            return stored[INPUT][:count]
        if stored:
            return {name.removeprefix(INPUT + "/"): value[:count] for name, value in stored.items()}
        seeded = self.batch()
        if isinstance(seeded, dict):
            available = len(next(iter(seeded.values())))
        else:
            available = len(seeded)
        if not available:
            return example(self.inputs, count, self.seed)
        return _picked(seeded, np.arange(count) % available)

    @property
    def known(self) -> bool:
        """Whether there are rows that the network accepts: seeded ones, or stored ones."""
        return self.rows is None or bool(self.rows) or bool(self.recorded and self.recorded.values)

    @property
    def classes(self) -> int:
        """The number of classes; 0 where no row could be probed."""
        rows = list(self.logits[0])
        if self.recorded:
            rows += self.recorded.logits[0]
        if not rows:
            return 0
        return len(rows[0])

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Probe:
        """The probe written by `dataclasses.asdict`. Raises ValueError where it is not complete."""
        rows = body.get("rows")
        recorded = body.get("recorded")
        scores = body.get("scores")
        logits = _logits(body["logits"])
        is_complete = bool(logits)
        if logits and rows is not None:
            is_complete = min(rows, default=0) >= 0 and len(rows) == len(logits[0])
        if not is_complete:
            raise ValueError(f"{len(logits)} exits and rows {rows} do not make a probe")
        return Probe(
            inputs=tuple(map(Input.from_json, body["inputs"])),
            seed=int(body["seed"]),
            logits=logits,
            scores=None if scores is None else _scores(scores),
            rows=None if rows is None else tuple(map(int, rows)),
            recorded=None if recorded is None else RecordedRows.from_json(recorded),
        )


def _picked(batch: Any, rows: Numbers) -> Any:
    """Some rows of a batch, which is an array or a mapping of arrays."""
    if isinstance(batch, dict):
        return {name: value[rows] for name, value in batch.items()}
    return batch[rows]


def _logits(body: Any) -> Logits:
    """Lists of lists of lists as tuples: exits, rows, classes."""
    exits = []
    for rows in body:
        exits.append(tuple(_floats(row) for row in rows))
    return tuple(exits)


def _scores(body: Any) -> Scores:
    """Lists of lists as tuples: gates, rows."""
    gates = []
    for rows in body:
        gates.append(tuple(_score(score) for score in rows))
    return tuple(gates)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))


def _score(value: Any) -> Any:
    """A row's score, or its scores where a gate gives several."""
    if isinstance(value, (list, tuple)):
        return _floats(value)
    return float(value)


@dataclass(frozen=True)
class Origin:
    """What a trace, and every plan made from it, was measured on. A promise holds on nothing else.

    Attributes:
        network: a fingerprint of the network.
        engine: the engine that computed it.
        precision: of its numbers.
        probe: rows by which the network can be compared with another one.
        code: marks of code by subject. Subjects are gates, exits and models ("gate small"), and
            settings of layers. The mark under "made with" names the versions that the others depend
            on, see `code_marks`. Empty in files of the first version.
        largest_logit: the largest magnitude of a recorded logit.
    """

    network: str
    engine: str
    precision: str
    probe: Probe | None = None
    code: tuple[tuple[str, str], ...] = ()
    largest_logit: float = 0.0

    @property
    def key(self) -> tuple[str, str, str]:
        """The fields that must be equal for a promise to hold."""
        return self.network, self.engine, self.precision

    @property
    def band(self) -> float:
        """How much a score may differ in a batch of another size. Within this distance of a
        threshold the decision may differ too.

        It is meant for logits up to 30, and grows with larger ones, because rounding is relative.
        """
        return self.rounding * max(1.0, self.largest_logit / ORDINARY)

    @property
    def rounding(self) -> float:
        """The band of ordinary logits, on this engine and in this precision."""
        options = self.engine.partition(":")[2].split(",")
        for option in options:
            if option.startswith(("bf16", "int8")):
                return ROUNDED
        if "float16" in self.precision or "matmul" in self.precision:  # "bfloat16" among them
            return ROUNDED
        return BAND

    def refuse_other_code(self, code: tuple[tuple[str, str], ...]) -> None:
        """Refuse code that differs from the code at recording.

        Args:
            code: marks of the present code, as in the attribute `code`.

        Raises:
            Mismatch: code of the same name computes something different now.
        """
        before = dict(self.code)
        now = dict(code)
        made_with = before.get(MADE_WITH)
        here = now.get(MADE_WITH)
        if made_with != here:
            # with another Python or torch, or an older kind of marks, all marks may differ
            if made_with is not None and len(before) > 1 and f"{made_with}{MARKS}" == here:
                warnings.warn(OLDER_MARKS, Notice, stacklevel=3)
            return
        # also code where there was none: a hook, or a forward that is set on a torch layer
        for what in before | now:
            marks = (before.get(what), now.get(what))
            if marks[0] == marks[1] or CHANGING in marks:
                continue
            if what.startswith(SETTINGS):
                difference = f"{what} are not those that the plan was made with"
            else:
                difference = f"the code of {what} is not the code that the plan was made with"
            raise Mismatch(
                f"{difference}; record and calibrate this one, or drop the promise: "
                f"Plan.by_hand(plan.thresholds)"
            )

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Origin:
        """The origin written by `dataclasses.asdict`."""
        probe = None
        if body["probe"] is not None:
            probe = Probe.from_json(body["probe"])
        code = tuple((str(what), str(mark)) for what, mark in body.get("code", ()))
        largest = float(body.get("largest_logit", 0.0))
        if not 0 <= largest < math.inf:
            raise ValueError(f"the largest logit is {largest}")
        return Origin(
            str(body["network"]), str(body["engine"]), str(body["precision"]), probe, code, largest
        )


@dataclass(frozen=True)
class SeenRows:
    """The rows that a plan was made from, or that trained a network.

    Attributes:
        data: what the rows are called.
        fingerprint: the identity of their data set.
        digests: of each row.
        form: of the digests.
        older: digests of form 1 of further rows, from files of the first edition.
        rounded: of rows that trained a network, also the digests after rounding to float16 and
            bfloat16.
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
        """Refuse rows whose content was already used for this plan or trace.

        Args:
            digests: uint64 [N], of the rows.
            what: the use of the rows, for the sentence ("test").
            rows: the numbers of the rows in their data [N], for the sentence. By default the
                sentence counts from 0.
            form: of `digests`.

        Raises:
            OverlappingRows: a row was already used.
            Mismatch: digests of different forms cannot be compared.
        """
        shared = np.flatnonzero(self.shared(digests, what, form))
        if not shared.size:
            return
        if rows is None:
            overlap = shared
            names = f"{named(shared)}, counted from 0"
        else:
            overlap = rows[shared]
            names = named(overlap)
        raise OverlappingRows(
            f"{shared.size:,} of the {digests.size:,} {what} rows ({names}) are also among the "
            f"{self.digests.size:,} rows of {self.data}. Use rows that were not used before.",
            rows=overlap,
        )

    def shared(self, digests: Digests, what: str, form: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of some rows are among these.

        Args:
            digests: uint64 [N], of the rows.
            what: the use of the rows, for the sentence.
            form: the form of their digests, such as `trace.header.digest_form`.

        Returns:
            bool [N].

        Raises:
            Mismatch: digests of this form cannot be compared with all of these rows.
        """
        if not self.comparable(form):
            raise Mismatch(
                f"the {what} rows and the rows of {self.data} were recorded by different editions "
                f"of offramp, whose row digests cannot be compared, so an overlap would not be "
                f"noticed. Record both again."
            )
        return np.isin(digests, self.digests)

    def comparable(self, form: int) -> bool:
        """Whether digests of this form can be compared with all of these rows."""
        return form == self.form and not self.older.size

    def in_form(self, form: int) -> Digests:
        """The digests that are held in a form."""
        digests = np.zeros(0, np.uint64)
        if self.form == form:
            digests = self.digests
        if form == 1:
            return np.concatenate([digests, self.older])
        return digests

    def and_also(self, others: SeenRows) -> SeenRows:
        """These rows and others together, under the name of these."""
        rounded = np.concatenate([self.rounded, others.rounded])
        if self.form == others.form:
            older = np.concatenate([self.older, others.older])
            digests = np.concatenate([self.digests, others.digests])
            return replace(self, digests=digests, older=older, rounded=rounded)
        # digests of form 1 cannot be turned into form 2: they go into `older`
        digests = np.concatenate([self.in_form(FORM), others.in_form(FORM)])
        older = np.concatenate([self.in_form(1), others.in_form(1)])
        return replace(self, digests=digests, form=FORM, older=older, rounded=rounded)

    def once(self) -> SeenRows:
        """The same rows, with each digest once."""
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
        if self.older.size:
            body["older"] = _text(self.older)
        if self.rounded.size:
            body["rounded"] = _text(self.rounded)
        return body

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> SeenRows:
        """The rows written by `to_json` of any edition. Raises NewerSchema, ValueError."""
        return SeenRows(
            body["data"],
            body["fingerprint"],
            _digests(body["digests"]),
            form_of(body.get("form", 1), body["data"]),
            older=_digests(body.get("older", "")),
            rounded=_digests(body.get("rounded", "")),
        )


def largest_of(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    """The largest finite magnitude of some values; 0.0 where there is none."""
    if not values.size:
        return 0.0
    low = float(values.min())
    high = float(values.max())
    if math.isfinite(low) and math.isfinite(high):  # the usual case, without a copy of big traces
        return max(-low, high)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0
    return float(np.abs(finite).max())


def form_of(value: object, where: str) -> int:
    """Check the form of digests that a file states.

    Args:
        value: the field of the file.
        where: a name for the file, for the sentence.

    Returns:
        The form.

    Raises:
        NewerSchema: it is a form of a later version.
        ValueError: it is not a form.
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
    """Digests as base64 of their sorted bytes."""
    return base64.b64encode(np.sort(digests).astype("<u8").tobytes()).decode()


def _digests(text: str) -> Digests:
    """The digests that `_text` wrote."""
    raw = np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8")
    return raw.astype(np.uint64)


def all_of(some: Iterable[SeenRows | None]) -> SeenRows | None:
    """All these rows together, under the name of the first; None where there are none."""
    known = [seen for seen in some if seen is not None]
    if not known:
        return None
    return reduce(SeenRows.and_also, known)


def union(some: Iterable[SeenRows | None]) -> SeenRows | None:
    """All these rows with each digest once, in the name of the first; None if there are none."""
    known = all_of(some)
    if known is None:
        return None
    return known.once()


def refuse_training_rows(columns: Mapping[str, np.ndarray[Any, np.dtype[Any]]], what: str) -> None:
    """Refuse rows that trained the network.

    Args:
        columns: those of a trace.
        what: the use of the rows, for the sentence ("calibration").

    Raises:
        OverlappingRows: a row also trained the network.
    """
    training_rows = columns.get("learned")
    if training_rows is None or not training_rows.any():
        return
    rows = columns["row"][training_rows]
    raise OverlappingRows(
        f"{rows.size:,} of the {training_rows.size:,} {what} rows ({named(rows)}) also trained an "
        f"exit of this network. Use rows that it has not seen, or leave these out with "
        f"drop_seen=True.",
        rows=rows,
    )


def named(rows: Numbers) -> str:
    """`row 3`, `rows 3, 5 and 8`, or `rows 3, 5, 8, ... and 490 more`."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown = ", ".join(str(row) for row in rows[:LISTED])
    if len(rows) > LISTED:
        return f"rows {shown} and {len(rows) - LISTED:,} more"
    # "3, 5, 8" -> "3, 5 and 8"
    head, _, last = shown.rpartition(", ")
    return f"rows {head} and {last}"
