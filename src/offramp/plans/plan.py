"""Plans: the thresholds at which samples leave, the promise they were chosen under, and the rows
they were measured on. Does not import torch.

`choose` is the only exit rule that runs in this package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
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
    """Which successor each sample takes.

    A sample takes the first route whose score reaches its threshold. If none does, it takes the
    last successor, K-1. A NaN score never leaves, and nothing leaves at a threshold of +inf, not
    even a score of +inf.

    Args:
        scores: [B, K-1] float32, of NumPy or torch.
        thresholds: [K-1] float32, of the same library.

    Returns:
        The numbers of the successors, [B] int64.

    Example:
        >>> choose(np.float32([[.9], [.2], [np.nan]]), np.float32([.5]))
        array([0, 1, 1])
    """
    s: Any = scores
    t: Any = thresholds
    refused = ~((s >= t) & (t < math.inf))  # [B, K-1]
    # The number of refusals before the first route that takes the sample is the number of the
    # successor. With one route, the usual case, that is the refusal itself, in fewer operations:
    # a batch of one waits for each of them.
    has_one_route = refused.shape[-1] == 1
    successor = refused[:, 0] * 1 if has_one_route else refused.cumprod(-1).sum(-1)  # -> [B]
    result: ArrayT = successor
    return result


@dataclass(frozen=True)
class Price:
    """The cost per row of a plan and of the plain network.

    Attributes:
        unit: "macs" or "ms".
        batch: the batch size that milliseconds are for.
        mean: the mean cost of the plan.
        worst: the cost of a row that takes the most expensive path to the end.
        plain: the cost of the plain network.
        note: a remark for readers of the figures, such as that the timings were noisy.
    """

    unit: str
    batch: int
    mean: float
    worst: float
    plain: float
    note: str = ""

    def __str__(self) -> str:
        if self.unit == "ms":
            unit = f"milliseconds at batch {self.batch}"
        else:
            unit = "MACs"
        note = f" ({self.note})" if self.note else ""
        # a share of a cost of 0 does not exist
        if not self.plain > 0:
            return (
                f"mean cost {self.mean:g} and worst {self.worst:g} {unit}, the plain network's is 0"
                f"{note}"
            )
        mean = self.mean / self.plain
        worst = self.worst / self.plain
        return f"mean cost {mean:.3f} and worst {worst:.3f} of the plain network in {unit}{note}"


@dataclass(frozen=True)
class Promise:
    """`risk <= at_most` with `confidence`, against the answers of exit `reference`.

    Attributes:
        risk: the name of the risk.
        at_most: the level.
        confidence: above 0 and below 1.
        reference: the exit that the risk compares with, or "backbone".
        bound: the bound that tested it.
        testing: "path" or "pareto".
        rows: how many rows tested it.
        searched: how many other rows chose the candidates.
        covers: a fingerprint of the plan that the promise is about.
        repeats: how the caller counts rows of equal content, "independent" or "once". Empty where
            the caller did not choose, and nothing repeated.
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
        candidates = "along a path fixed beforehand"
        if self.searched:
            candidates = f"on candidates found on {self.searched:,} other rows"
        tested = f"tested on {self.rows:,} rows with the {self.bound} bound {candidates}"
        parts = [f"{self.risk} <= {self.at_most:.12g}", tested, *self.assumed()]
        return f"{self.claim} ({'; '.join(parts)})"

    @property
    def claim(self) -> str:
        """The promise as a statement that needs no statistics."""
        confidence = f"With {percentage(self.confidence)} confidence"
        level = percentage(self.at_most)
        if self.risk == "accuracy_gap":
            # a negative level promises that the plan is right more often
            points = f"{abs(100 * self.at_most):.12g} percentage points"
            if self.at_most >= 0:
                change = f"at most {points} less"
            else:
                change = f"at least {points} more"
            return f"{confidence}, this plan is right {change} often than {alone(self.reference)}"
        if self.risk == "disagreement":
            return (
                f"{confidence}, at most {level} of the answers differ from those that "
                f"{alone(self.reference)} would give"
            )
        if self.risk == "error":
            return f"{confidence}, at most {level} of the answers are wrong"
        return (
            f"{confidence}, the mean of {compared(self.risk, self.reference)} is at most "
            f"{self.at_most:.12g}"
        )

    def assumed(self) -> list[str]:
        """How rows that repeat or trained the network were counted, a clause each."""
        clauses = []
        if self.repeats == "independent":
            clauses.append(
                f"{self.repeated:,} rows repeat the content of others and count as independent "
                "draws"
            )
        if self.repeats == "once":
            clauses.append(
                f"copies count once: {self.repeated:,} left out, so it is about distinct rows"
            )
        if self.dropped:
            clauses.append(f"{self.dropped:,} rows that trained the network left out")
        return clauses


def alone(exit_name: str) -> str:
    """The reference of a promise in words."""
    if exit_name == "backbone":
        return "the plain network"
    return f"{exit_name} alone"


def compared(risk: str, reference: str) -> str:
    """A risk with its reference in words. An error has none: it compares with the labels."""
    if risk == "error":
        return risk
    return f"{risk} against {reference}"


@dataclass(frozen=True)
class Plan:
    """At which scores samples leave. Frozen; prints itself as a sentence.

    A plan with other thresholds or another network is another plan: it loses the promise.

    Attributes:
        thresholds: by gate, K - 1 of them for K successors, exact in float32; +inf closes a way.
        max_exit: the exit that answers every sample that arrives there, or None.
        topology: of the network, or None in a plan made by hand.
        promise: the promise under which the thresholds were chosen.
        origin: the network, engine and precision that the plan was made on.
        price: the cost that was measured with the promise.
        rows: the rows that the plan was made from.

    Raises:
        InvalidArgument: a threshold is not a float32 number.
        UnknownName: the topology does not have a gate or an exit of the plan.
    """

    thresholds: Mapping[str, tuple[float, ...]]
    max_exit: str | None = None
    topology: Topology | None = None
    promise: Promise | None = None
    origin: Origin | None = None
    price: Price | None = None
    rows: SeenRows | None = None

    def __post_init__(self) -> None:
        thresholds = {gate: _float32(gate, values) for gate, values in self.thresholds.items()}
        object.__setattr__(self, "thresholds", thresholds)
        if self.topology is not None:
            for gate in thresholds:
                if gate not in self.topology.gates:
                    raise unknown(gate, self.topology.gates, "gate of this network")
            if self.max_exit is not None:
                self.topology.exit_index(self.max_exit)
        if self.promise is None:
            return
        # the promise is about one plan: with other thresholds or another network it does not hold
        if self.promise.covers != self.covers(thresholds, self.max_exit, self.origin):
            object.__setattr__(self, "promise", None)
            object.__setattr__(self, "price", None)

    @staticmethod
    def covers(
        thresholds: Mapping[str, tuple[float, ...]],
        max_exit: str | None,
        origin: Origin | None = None,
    ) -> str:
        """A fingerprint of a plan's decisions and its network. A promise is about exactly this.

        Args:
            thresholds: of the plan, by gate.
            max_exit: of the plan.
            origin: of the plan; only its network, engine and precision count.

        Returns:
            A checksum.
        """
        key = origin.key if origin else None
        return checksum([_threshold_texts(thresholds), max_exit, key])

    @staticmethod
    def by_hand(
        thresholds: Mapping[str, float | tuple[float, ...]], *, max_exit: str | None = None
    ) -> Plan:
        """Make a plan without a promise. Gates that are not named stay closed (+inf).

        Args:
            thresholds: by gate, a number or a tuple of K - 1 numbers for K successors.
            max_exit: the exit that answers every sample that arrives there.

        Returns:
            The plan.

        Raises:
            InvalidArgument: a threshold is not a float32 number.

        Example:
            >>> print(Plan.by_hand({"resnet20": 4.0}))
            Leave at resnet20 when its score is at least 4; no promise: set by hand.
        """
        tuples = {}
        for gate, values in thresholds.items():
            tuples[gate] = values if isinstance(values, tuple) else (values,)
        return Plan(thresholds=tuples, max_exit=max_exit)

    @staticmethod
    def never_leave(topology: Topology) -> Plan:
        """The plan in which every sample takes the last successor everywhere, to the last exit."""
        closed = {gate: (math.inf,) * topology.routes(gate) for gate in topology.gates}
        return Plan(thresholds=closed, topology=topology)

    def changed(self, **fields: Any) -> Plan:
        """A copy with other thresholds or another `max_exit`, without promise and price.

        Args:
            **fields: new values of attributes, such as `max_exit="small"`.
        """
        return dataclasses.replace(self, promise=None, price=None, **fields)

    def open_gates(self) -> frozenset[str]:
        """Gates at which a sample can leave."""
        return frozenset(gate for gate, values in self.thresholds.items() if min(values) < math.inf)

    def schedule(self, topology: Topology) -> Schedule:
        """The stages that this plan runs. Frozen; `print` shows them as a table.

        Args:
            topology: of the network.

        Returns:
            The schedule.

        Raises:
            UnknownName: the topology does not have a gate or an exit of this plan.
            InvalidArgument: a gate must have another number of thresholds.
        """
        title = ""
        if self.promise:
            title = f"{self.promise.risk} <= {self.promise.at_most:.12g}"
        return compiled(topology, self.thresholds, self.max_exit, title)

    def _leaves(self) -> list[str]:
        """A clause for every gate at which rows leave or go on."""
        clauses = []
        for gate, values in self.thresholds.items():
            if min(values) < math.inf and not self._forks(gate):
                clauses.append(f"at {gate} when its score is at least {values[0]:g}")
        return clauses

    def _forks(self, gate: str) -> bool:
        """Whether a gate chooses between ways, and not only whether rows leave."""
        if len(self.thresholds[gate]) > 1:
            return True
        return self.topology is not None and self.topology.node(gate).successors[0] != LEAVE

    def _ways(self) -> list[str]:
        """A clause for every gate that chooses between ways."""
        clauses = list[str]()
        for gate, values in self.thresholds.items():
            if min(values) == math.inf or not self._forks(gate):
                continue
            if self.topology is not None:
                names: Sequence[str] = self.topology.node(gate).successors
            else:
                names = [f"way {number}" for number in range(len(values) + 1)]
            # K names and K - 1 thresholds: the last way takes the rest
            choices = []
            for name, threshold in zip(names, values, strict=False):
                if threshold < math.inf:
                    choices.append(f"{name} from {threshold:g}")
            clauses.append(f"at {gate} take {', '.join(choices)}, else {names[-1]}")
        return clauses

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Plan: {self}>"

    def __str__(self) -> str:
        decisions = self._decisions()
        if self.promise is None:
            return f"{decisions}; no promise: {self._without_promise()}."
        promise = str(self.promise)
        rows = "the tested ones"
        if self.rows:
            rows = f"those of {self.rows.data}"
        where = ""
        if self.origin:
            where = f" on {self.origin.engine} in {self.origin.precision}"
        return (
            f"{decisions}. Promise: {promise[0].lower()}{promise[1:]}. It holds on average over "
            f"rows drawn like {rows}, for this network{where}; it says nothing about a single "
            f"input, nor about other data."
        )

    def _decisions(self) -> str:
        """Where rows leave, the ways that they take, and the price."""
        clauses = self._ways()
        # where rows leave comes first, then which ways they take
        leaves = self._leaves()
        if leaves:
            clauses.insert(0, "leave " + ", ".join(leaves))
        elif not clauses:
            clauses.append("nothing leaves early")
        if self.max_exit:
            clauses.append(f"whatever arrives at {self.max_exit} is answered there")
        if self.price:
            clauses.append(str(self.price))
        sentence = "; ".join(clauses)
        return sentence[:1].upper() + sentence[1:]

    def _without_promise(self) -> str:
        """Why the plan has no promise."""
        if not self.rows:
            return "set by hand"
        # a plan by budget has rows and a price; a calibrated plan that was changed lost its price
        if self.price:
            return "best on its rows under a budget"
        return "changed, or moved to another engine, after it was calibrated"

    def to_json(self) -> str:
        """The text that `save` writes, with a version and a checksum."""
        return to_document("plan", SCHEMA, self._body())

    def save(self, path: str | Path) -> None:
        """Write `plan.json`, atomically."""
        write_json(path, "plan", SCHEMA, self._body())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Args:
            path: of the file.

        Returns:
            The plan.

        Raises:
            BadFile: the file is damaged, was edited, or holds something different.
            NewerSchema: a later version of offramp wrote it.
        """
        return Plan.from_json(read_text(path), where=str(path))

    @staticmethod
    def from_json(text: str, *, where: str = "this text") -> Plan:
        """Read a plan from the text that `to_json` gave.

        Args:
            text: the text.
            where: a name for the text, in messages.

        Returns:
            The plan.

        Raises:
            BadFile: the text is damaged, was edited, or holds something different.
            NewerSchema: a later version of offramp wrote it.
        """
        _, body = from_document(text, "plan", SCHEMA, where)
        try:
            return _plan_from(body)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
            raise BadFile(
                f"{where} is no complete plan ({problem!r}); make it again with calibrate"
            ) from problem

    def _body(self) -> dict[str, Any]:
        """The fields of a file, by the names that the first version gave them."""
        return {
            "sentence": str(self),
            "thresholds": _threshold_texts(self.thresholds),
            "deepest": self.max_exit,
            "promise": _promise_body(self.promise),
            "price": asdict(self.price) if self.price else None,
            "origin": asdict(self.origin) if self.origin else None,
            "chain": self.topology.to_json() if self.topology else None,
            "rows": self.rows.to_json() if self.rows else None,
        }


def _plan_from(body: Mapping[str, Any]) -> Plan:
    """The plan of a file's fields."""
    thresholds = {}
    for gate, values in body["thresholds"].items():
        thresholds[gate] = tuple(map(float, values))
    return Plan(
        thresholds=thresholds,
        max_exit=body["deepest"],
        promise=_read(_promise_from, body["promise"]),
        price=_read(_price_from, body["price"]),
        origin=_read(Origin.from_json, body["origin"]),
        topology=_read(Topology.from_json, body["chain"]),
        rows=_read(SeenRows.from_json, body["rows"]),
    )


def _read(reader: Callable[[Any], ArrayT], body: Any) -> ArrayT | None:
    """An optional field of a file: None where the plan does not have it."""
    if body is None:
        return None
    return reader(body)


def _promise_body(promise: Promise | None) -> dict[str, Any] | None:
    """A promise as files hold it: its reference has the first version's name, against."""
    if promise is None:
        return None
    return _renamed(asdict(promise), "reference", "against")


def _promise_from(body: Mapping[str, Any]) -> Promise:
    """The promise of a file."""
    return _typed(Promise(**_renamed(body, "against", "reference")))


def _price_from(body: Mapping[str, Any]) -> Price:
    """The price of a file."""
    return _typed(Price(**body))


def _renamed(body: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same fields in the same order, one of them under a new name."""
    renamed = {}
    for name, value in body.items():
        renamed[new if name == old else name] = value
    return renamed


def _typed(fields: ArrayT) -> ArrayT:
    """A dataclass of plain fields from a file. Raises TypeError for a field of another type."""
    # annotations are texts here, because of `from __future__ import annotations`
    kinds: dict[Any, Any] = {"str": str, "int": int, "float": Real}
    for field in dataclasses.fields(fields):  # type: ignore[arg-type]
        value = getattr(fields, field.name)
        if not isinstance(value, kinds[field.type]):
            raise TypeError(f"{field.name} is {value!r}")
    return fields


def _float32(gate: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """The thresholds of a gate, rounded to float32. Raises InvalidArgument."""
    if not values or not all(map(_is_threshold, values)):
        raise InvalidArgument(
            f"threshold of {gate!r} must be a float32 number (inf closes the exit), got {values!r}"
        )
    return tuple(map(float, np.array(values, np.float32)))


def _is_threshold(value: object) -> bool:
    """Whether float32 holds the number; NaN is not a threshold."""
    if not isinstance(value, Real):
        return False
    number: Any = abs(value)
    return bool(number <= FLOAT32_MAX or number == math.inf)


def _threshold_texts(
    thresholds: Mapping[str, tuple[float, ...]],
) -> dict[str, list[float | str]]:
    """Thresholds as JSON can hold them."""
    texts = {}
    for gate, values in thresholds.items():
        texts[gate] = [_text(value) for value in values]
    return texts


def _text(threshold: float) -> float | str:
    """An infinity as text, because JSON does not have it."""
    return threshold if math.isfinite(threshold) else str(threshold)
