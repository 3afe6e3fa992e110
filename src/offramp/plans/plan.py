"""Thresholds, the promise they were chosen under, and what they were measured on. No torch.

`choose` is the only exit rule that runs in this package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from offramp._support.arguments import percentage
from offramp._support.files import checksum, from_document, read_text, to_document, write_json
from offramp._support.find import unknown
from offramp.errors import BadFile, InvalidArgument
from offramp.plans.provenance import BAND as BAND
from offramp.plans.provenance import Origin, SeenRows
from offramp.plans.schedule import Schedule, compiled
from offramp.plans.topology import LEAVE, Topology

SCHEMA = 1
FLOAT32_MAX = float(np.finfo(np.float32).max)

ArrayT = TypeVar("ArrayT")


def choose(scores: ArrayT, thresholds: ArrayT) -> ArrayT:
    """Which successor each sample takes: the first route whose score reaches its threshold, else
    the last, K-1.

    scores [B, K-1] and thresholds [K-1], both float32 and both NumPy or both torch; returns int64
    [B]. A NaN score never leaves, and at a threshold of +inf nothing does, not even a score of
    +inf.

    >>> choose(np.float32([[.9], [.2], [np.nan]]), np.float32([.5]))
    array([0, 1, 1])
    """
    s: Any = scores
    t: Any = thresholds
    refused = ~((s >= t) & (t < math.inf))  # [B, K-1]
    one = refused.shape[-1] == 1  # the usual case, in few operations: batches of one wait for this
    # [B], refusals before the first that took
    successor = refused[:, 0] * 1 if one else refused.cumprod(-1).sum(-1)
    result: ArrayT = successor
    return result


@dataclass(frozen=True)
class Price:
    """Cost per row in one unit (MACs, or milliseconds at a batch size): mean and worst of the plan,
    and plain.

    `note` says what a reader of the figures must know, such as that the timings were noisy.
    """

    unit: str
    batch: int
    mean: float
    worst: float
    plain: float
    note: str = ""

    def __str__(self) -> str:
        size = f" at batch {self.batch}" if self.unit == "ms" else ""
        name = "MACs" if self.unit == "macs" else "milliseconds"
        note = f" ({self.note})" if self.note else ""
        if not self.plain > 0:
            return (
                f"mean cost {self.mean:g} and worst {self.worst:g} {name}{size}, the plain "
                f"network's is 0{note}"
            )
        mean = self.mean / self.plain
        worst = self.worst / self.plain
        return (
            f"mean cost {mean:.3f} and worst {worst:.3f} of the plain network in {name}{size}{note}"
        )


@dataclass(frozen=True)
class Promise:
    """`risk <= at_most` with `confidence`, against the answers of exit `reference`.

    Attributes:
        risk: its name.
        at_most: the level.
        confidence: above 0 and below 1.
        reference: the exit that the risk compares with, or "backbone".
        bound: the bound that tested it.
        testing: "path" or "pareto".
        rows: how many rows tested it.
        searched: how many more chose the candidates.
        covers: a fingerprint of the plan that the promise is about.
        repeats: what the caller said of rows of equal content, "independent" or "once"; empty where
            nothing was said, and nothing repeated.
        repeated: how many rows had the content of another one. Under "once" they do not count among
            `rows`.
        dropped: how many rows were left out because they trained the network.
    """

    risk: str
    at_most: float
    confidence: float
    reference: str
    bound: str
    testing: str
    rows: int
    searched: int
    covers: str
    repeats: str = ""
    repeated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        told = "along a path fixed beforehand"
        if self.searched:
            told = f"on candidates found on {self.searched:,} other rows"
        tested = f"tested on {self.rows:,} rows with the {self.bound} bound {told}"
        parts = [f"{self.risk} <= {self.at_most:.12g}", tested, *self.assumed()]
        return f"{self.claim} ({'; '.join(parts)})"

    @property
    def claim(self) -> str:
        """The promise as a statement that needs no statistics."""
        sure = f"With {percentage(self.confidence)} confidence"
        level = percentage(self.at_most)
        if self.risk == "accuracy_gap":
            points = f"{abs(100 * self.at_most):.12g} percentage points"
            if self.at_most >= 0:
                much = f"at most {points} less"
            else:
                much = f"at least {points} more"
            return f"{sure}, this plan is right {much} often than {alone(self.reference)}"
        if self.risk == "disagreement":
            return (
                f"{sure}, at most {level} of the answers differ from those that "
                f"{alone(self.reference)} would give"
            )
        if self.risk == "error":
            return f"{sure}, at most {level} of the answers are wrong"
        return (
            f"{sure}, the mean of {compared(self.risk, self.reference)} is at most "
            f"{self.at_most:.12g}"
        )

    def assumed(self) -> list[str]:
        """What was decided about rows that repeat or trained the network, a clause each."""
        found = []
        if self.repeats == "independent":
            found.append(
                f"{self.repeated:,} rows repeat the content of others and count as independent "
                f"draws"
            )
        if self.repeats == "once":
            found.append(
                f"copies count once: {self.repeated:,} left out, so it is about distinct rows"
            )
        if self.dropped:
            found.append(f"{self.dropped:,} rows that trained the network left out")
        return found


def alone(exit_name: str) -> str:
    """The reference of a promise in words."""
    return "the plain network" if exit_name == "backbone" else f"{exit_name} alone"


def compared(risk: str, reference: str) -> str:
    """A risk and what it is measured against; an error is one whatever others answer."""
    return risk if risk == "error" else f"{risk} against {reference}"


@dataclass(frozen=True)
class Plan:
    """Under which scores samples leave. Frozen; prints itself as a sentence; a changed plan has no
    promise.

    thresholds: by gate K - 1 of them, for K successors, float32-exact; +inf closes a way.
    `max_exit` answers whatever arrives there.
    """

    thresholds: Mapping[str, tuple[float, ...]]
    max_exit: str | None = None
    topology: Topology | None = None
    promise: Promise | None = None
    origin: Origin | None = None
    price: Price | None = None
    rows: SeenRows | None = None

    def __post_init__(self) -> None:
        clean = {gate: _float32(gate, values) for gate, values in self.thresholds.items()}
        object.__setattr__(self, "thresholds", clean)
        if self.topology is not None:
            for gate in clean:
                if gate not in self.topology.gates:
                    raise unknown(gate, self.topology.gates, "gate of this network")
            if self.max_exit is not None:
                self.topology.exit_index(self.max_exit)
        if self.promise is not None and self.promise.covers != self.covers(
            clean, self.max_exit, self.origin
        ):
            object.__setattr__(self, "promise", None)
            object.__setattr__(self, "price", None)

    @staticmethod
    def covers(
        thresholds: Mapping[str, tuple[float, ...]],
        max_exit: str | None,
        origin: Origin | None = None,
    ) -> str:
        """A fingerprint of what decides, and in which network: a promise is about exactly this."""
        texts = {gate: [_text(t) for t in values] for gate, values in thresholds.items()}
        return checksum([texts, max_exit, origin.key if origin else None])

    @staticmethod
    def by_hand(
        thresholds: Mapping[str, float | tuple[float, ...]], *, max_exit: str | None = None
    ) -> Plan:
        """A plan without a promise. Gates that are not named stay closed (+inf).

        >>> print(Plan.by_hand({"resnet20": 4.0}))
        Leave at resnet20 when its score is at least 4; no promise: set by hand.
        """
        tuples = {gate: t if isinstance(t, tuple) else (t,) for gate, t in thresholds.items()}
        return Plan(thresholds=tuples, max_exit=max_exit)

    @staticmethod
    def never_leave(topology: Topology) -> Plan:
        """The plan in which every sample takes the last successor everywhere, and is answered by
        the last exit.
        """
        closed = {gate: (math.inf,) * topology.routes(gate) for gate in topology.gates}
        return Plan(thresholds=closed, topology=topology)

    def changed(self, **fields: Any) -> Plan:
        """A copy with other thresholds or another `max_exit`, without promise and price."""
        return dataclasses.replace(self, promise=None, price=None, **fields)

    def open_gates(self) -> frozenset[str]:
        """Gates at which a sample can leave."""
        return frozenset(gate for gate, values in self.thresholds.items() if min(values) < math.inf)

    def schedule(self, topology: Topology) -> Schedule:
        """What this plan runs of a topology, frozen; print it to read it.

        Raises:
            UnknownName: the topology does not have a gate or an exit of this plan.
            InvalidArgument: a gate has another number of scores than there are thresholds.
        """
        if self.promise:
            title = f"{self.promise.risk} <= {self.promise.at_most:.12g}"
        else:
            title = ""
        return compiled(topology, self.thresholds, self.max_exit, title)

    def _leaves(self) -> list[str]:
        """A clause for every gate at which rows leave or go on."""
        return [
            f"at {gate} when its score is at least {values[0]:g}"
            for gate, values in self.thresholds.items()
            if min(values) < math.inf and not self._forks(gate)
        ]

    def _forks(self, gate: str) -> bool:
        """Whether a gate chooses among ways, and not only whether rows leave."""
        if len(self.thresholds[gate]) > 1:
            return True
        return self.topology is not None and self.topology.node(gate).successors[0] != LEAVE

    def _ways(self) -> list[str]:
        """A clause for every gate that chooses among ways."""
        clauses = list[str]()
        for gate, values in self.thresholds.items():
            if min(values) == math.inf or not self._forks(gate):
                continue
            names: Sequence[str] = [f"way {number}" for number in range(len(values) + 1)]
            if self.topology is not None:
                names = self.topology.node(gate).successors
            open_ways = [
                f"{name} from {t:g}" for name, t in zip(names, values, strict=False) if t < math.inf
            ]
            clauses.append(f"at {gate} take {', '.join(open_ways)}, else {names[-1]}")
        return clauses

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Plan: {self}>"

    def __str__(self) -> str:
        leave = self._leaves()
        clauses = self._ways()
        if leave or not clauses:
            clauses.insert(0, "leave " + ", ".join(leave) if leave else "nothing leaves early")
        say = "; ".join(clauses)
        say = say[:1].upper() + say[1:]
        if self.max_exit:
            say += f"; whatever arrives at {self.max_exit} is answered there"
        say += f"; {self.price}" if self.price else ""
        if self.promise is None:
            changed = "changed, or moved to another engine, after it was calibrated"
            by = (
                ("best on its rows under a budget" if self.price else changed)
                if self.rows
                else "set by hand"
            )
            return f"{say}; no promise: {by}."
        like = f"those of {self.rows.data}" if self.rows else "the tested ones"
        if self.origin:
            where = f" on {self.origin.engine} in {self.origin.precision}"
        else:
            where = ""
        text = str(self.promise)
        return (
            f"{say}. Promise: {text[0].lower()}{text[1:]}. It holds on average over rows drawn "
            f"like {like}, for this "
            f"network{where}; it says nothing about a single input, nor about other data."
        )

    def to_json(self) -> str:
        """The versioned, checksummed text that `save` writes."""
        return to_document("plan", SCHEMA, self._body())

    def save(self, path: str | Path) -> None:
        """Write `plan.json`, atomically."""
        write_json(path, "plan", SCHEMA, self._body())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan. Raises BadFile (damaged, edited), NewerSchema."""
        return Plan.from_json(read_text(path), where=str(path))

    @staticmethod
    def from_json(text: str, *, where: str = "this text") -> Plan:
        """The plan written by `to_json`."""
        _, body = from_document(text, "plan", SCHEMA, where)
        try:
            return _plan_from(body)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            raise BadFile(
                f"{where} is no complete plan ({problem!r}); make it again with calibrate"
            ) from problem

    def _body(self) -> dict[str, Any]:
        return {
            "sentence": str(self),
            "thresholds": {
                gate: [_text(t) for t in values] for gate, values in self.thresholds.items()
            },
            "deepest": self.max_exit,
            "promise": _promise_body(self.promise),
            "price": asdict(self.price) if self.price else None,
            "origin": asdict(self.origin) if self.origin else None,
            "chain": self.topology.to_json() if self.topology else None,
            "rows": self.rows.to_json() if self.rows else None,
        }


def _plan_from(body: Mapping[str, Any]) -> Plan:
    return Plan(
        thresholds={
            gate: tuple(float(t) for t in values) for gate, values in body["thresholds"].items()
        },
        max_exit=body["deepest"],
        promise=_promise_from(body["promise"]),
        price=_typed(Price(**body["price"])) if body["price"] is not None else None,
        origin=Origin.from_json(body["origin"]) if body["origin"] is not None else None,
        topology=Topology.from_json(body["chain"]) if body["chain"] is not None else None,
        rows=SeenRows.from_json(body["rows"]) if body["rows"] is not None else None,
    )


def _promise_body(promise: Promise | None) -> dict[str, Any] | None:
    """A promise as files have it: in the first version its reference was called against."""
    if promise is None:
        return None
    return {
        "against" if name == "reference" else name: value for name, value in asdict(promise).items()
    }


def _promise_from(body: Mapping[str, Any] | None) -> Promise | None:
    """The promise of a file."""
    if body is None:
        return None
    return _typed(
        Promise(
            **{"reference" if name == "against" else name: value for name, value in body.items()}
        )
    )


def _typed(made: ArrayT) -> ArrayT:
    """A dataclass of plain fields read from a file, each of its type; else TypeError."""
    kinds: dict[Any, Any] = {"str": str, "int": int, "float": Real}
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        value = getattr(made, field.name)
        if not isinstance(value, kinds[field.type]):
            raise TypeError(f"{field.name} is {value!r}")
    return made


def _float32(gate: str, values: tuple[float, ...]) -> tuple[float, ...]:
    if not values or any(
        not isinstance(t, Real) or FLOAT32_MAX < abs(t) < math.inf or t != t for t in values
    ):
        raise InvalidArgument(
            f"threshold of {gate!r} is {values!r}; expected a float32 number (inf closes the exit)"
        )
    return tuple(float(np.float32(t)) for t in values)


def _text(threshold: float) -> float | str:
    """JSON has no infinities."""
    return threshold if math.isfinite(threshold) else str(threshold)
