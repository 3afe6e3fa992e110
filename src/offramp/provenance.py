"""Where a trace and its plans come from: the network, engine and precision, a probe of them, and the rows. No torch."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np

from offramp.errors import Mismatch, NewerSchema, OverlappingRows
from offramp.signature import Input, example

Digests = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
FORM = 2  # of row digests (data/_digests.py); files that name none hold form 1, of the first edition
BAND = 1e-4  # compaction moves logit-scale scores by about 1e-5; within this band a decision may differ
ROUNDED = 0.125  # where numbers are rounded to eight bits: one step of bfloat16 for logits from 16 to 32


@dataclass(frozen=True)
class Probe:
    """A seeded batch and the logits [E][rows][C] that the network gave for it: `open` runs it again within the band."""

    inputs: tuple[Input, ...]
    seed: int
    logits: tuple[tuple[tuple[float, ...], ...], ...]

    def batch(self) -> Any:
        """The probe's rows as a network takes them: an array, or a mapping of arrays."""
        return example(self.inputs, len(self.logits[0]), self.seed)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Probe:
        """The probe written by `dataclasses.asdict`."""
        logits = tuple(tuple(tuple(map(float, row)) for row in rows) for rows in body["logits"])
        return Probe(tuple(map(Input.from_json, body["inputs"])), int(body["seed"]), logits)


@dataclass(frozen=True)
class Origin:
    """What a trace, and every plan made from it, was measured on; another one voids a promise."""

    network: str
    engine: str
    precision: str
    probe: Probe | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What must be equal for a promise to hold."""
        return self.network, self.engine, self.precision

    @property
    def band(self) -> float:
        """How far from a threshold a score may lie on its other side in a batch of another size."""
        options = self.engine.partition(":")[2].split(",")
        rounded = any(option.startswith(("bf16", "int8")) for option in options)
        return ROUNDED if rounded or "float16" in self.precision else BAND  # bfloat16 among them

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Origin:
        """The origin written by `dataclasses.asdict`."""
        probe = None if body["probe"] is None else Probe.from_json(body["probe"])
        return Origin(str(body["network"]), str(body["engine"]), str(body["precision"]), probe)


@dataclass(frozen=True)
class SeenRows:
    """The rows that a plan was made from, or that trained a network: their source, and a digest of each.

    form: that of the digests. older: digests of form 1 of further rows, where a file of the first edition brought them.
    rounded: of rows that trained a network, also the digests of what float16 and bfloat16 make of them.
    """

    data: str
    fingerprint: str
    digests: np.ndarray[Any, np.dtype[np.uint64]]
    form: int = FORM
    older: np.ndarray[Any, np.dtype[np.uint64]] = field(default_factory=lambda: np.zeros(0, np.uint64))
    rounded: np.ndarray[Any, np.dtype[np.uint64]] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def refuse_overlap(self, digests: Digests, what: str, rows: Numbers | None = None, form: int = FORM) -> None:
        """Raise OverlappingRows when rows of these contents were already used for this plan or trace.

        rows: their numbers in their data [N], for the sentence; without them it counts from 0. form: of `digests`.
        Raises Mismatch where digests of another form cannot tell.
        """
        shared = np.flatnonzero(self.shared(digests, what, form))
        if shared.size:
            raise OverlappingRows(
                f"{shared.size:,} of the {digests.size:,} {what} rows (the first: {_told(shared[0], rows)}) also stand "
                f"among the {self.digests.size:,} rows of {self.data}; give rows that were used for nothing before"
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
                f"the {what} rows and the rows of {self.data} were recorded by different editions of offramp, whose "
                "row digests cannot be compared, so it cannot be told whether they overlap. Record both again."
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
        return replace(self, digests=digests, older=np.unique(self.older), rounded=np.unique(self.rounded))

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
        """The rows written by `to_json`, also by the first edition. Raises NewerSchema, ValueError."""
        form = form_of(body.get("form", 1), body["data"])
        more = [_digests(body.get(name, "")) for name in ("older", "rounded")]
        return SeenRows(body["data"], body["fingerprint"], _digests(body["digests"]), form, *more)


def form_of(value: object, where: str) -> int:
    """The form of digests that a file states. Raises NewerSchema for a later one, ValueError for none."""
    if type(value) is not int or value < 1:
        raise ValueError(f"the digests have the form {value!r}")
    if value > FORM:
        raise NewerSchema(
            f"the row digests of {where} have form {value}, this offramp reads up to {FORM}; upgrade offramp"
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


def refuse_learned(columns: Mapping[str, np.ndarray[Any, np.dtype[Any]]], what: str) -> None:
    """Raise OverlappingRows where rows of a trace (its columns) also taught the network."""
    learned = columns.get("learned")
    if learned is not None and learned.any():
        first = _told(learned.argmax(), columns["row"])
        raise OverlappingRows(
            f"{int(learned.sum()):,} of the {learned.size:,} {what} rows (the first: {first}) also taught an exit of "
            "this network; give rows that it has never seen"
        )


def _told(place: np.intp, rows: Numbers | None) -> str:
    return f"number {place:,} of them" if rows is None else f"row {rows[place]:,}"
