"""What a plan does on rows, in figures that print themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp._support.arguments import percentage
from offramp.plans.plan import Price, compared

if TYPE_CHECKING:
    from offramp.plans.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Measured:
    """A risk measured on rows, with a two-sided interval."""

    risk: str
    reference: str
    value: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        interval = f"{percentage(self.confidence)} interval {self.low:.4f} to {self.high:.4f}"
        return f"{compared(self.risk, self.reference)} {self.value:.4f} ({interval})"


@dataclass(frozen=True)
class ExitAlone:
    """An exit as if it alone were run: its accuracy (None without labels), MACs and milliseconds
    (None if unknown).
    """

    exit: str
    accuracy: float | None
    macs: float | None
    ms_64: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def exits_alone(trace: Trace) -> list[ExitAlone]:
    """Every exit of a trace as if it alone were run, shallow to deep."""
    labels = trace.labels
    prices = trace.prices
    found = list[ExitAlone]()
    for name in trace.topology.exits:
        accuracy = None
        if labels is not None:
            accuracy = float((trace.columns[f"answer/{name}"] == labels).mean())
        macs = None if prices.uncounted else prices.plain(name, unit="macs", batch=1)
        ms_64 = prices.plain(name, unit="ms", batch=64) if prices.timed else None
        found.append(ExitAlone(name, accuracy, macs, ms_64))
    return found


@dataclass(frozen=True)
class WorstClass:
    """The class whose accuracy falls most against the reference."""

    name: str
    accuracy: float
    plain: float


@dataclass(frozen=True)
class Evaluation:
    """A plan on `rows` rows. shares and exit_accuracy are by exit; accuracies are None without
    labels.

    `in_band` is the share of rows whose decision at some gate lies within the float band of its
    threshold. `repeated` rows have the content or the number of another one, and do not count in
    the interval.
    """

    rows: int
    exits: tuple[str, ...]
    shares: tuple[float, ...]
    risk: Measured
    prices: tuple[Price, ...]
    in_band: float
    accuracy: float | None = None
    plain_accuracy: float | None = None
    exit_accuracy: tuple[float | None, ...] = ()
    worst_class: WorstClass | None = None
    repeated: int = 0

    def __repr__(self) -> str:
        """Short: for notebooks and messages."""
        return f"<Evaluation: {self}>"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows"]
        lines += [
            f"  {share:6.1%} leave at {name}"
            for name, share in zip(self.exits, self.shares, strict=True)
        ]
        if self.accuracy is not None and self.plain_accuracy is not None:
            lines.append(f"  accuracy {self.accuracy:.2%}, plain network {self.plain_accuracy:.2%}")
        if self.worst_class is not None:
            worst = self.worst_class
            lines.append(
                f"  class that loses most: {worst.name}, {worst.accuracy:.2%} (plain "
                f"{worst.plain:.2%})"
            )
        lines.append(f"  {self.risk}")
        if self.repeated:
            lines.append(f"  {self.repeated:,} rows repeat others, which the interval counts once")
        lines += [f"  {price}" for price in self.prices]
        lines.append(f"  {self.in_band:.2%} of rows within the float band of a threshold")
        return "\n".join(lines)


def worst_class(
    right: Array, right_plain: Array, labels: Array, names: Sequence[str] | None
) -> WorstClass | None:
    """The class with the largest fall of accuracy from `right_plain` to `right` (both bool [N])."""
    classes = np.unique(labels)
    if not classes.size:
        return None
    falls = [right_plain[labels == c].mean() - right[labels == c].mean() for c in classes]
    worst = int(classes[int(np.argmax(falls))])
    mine = labels == worst
    name = names[worst] if names is not None and worst < len(names) else str(worst)
    return WorstClass(name, float(right[mine].mean()), float(right_plain[mine].mean()))


def better_exit(right: Array, exits: Sequence[str]) -> str | None:
    """A sentence about the exit that is right clearly more often than the last one; None where
    there is none.

    Clearly: on the rows that only one of the two gets right, the exit wins by more than three
    standard deviations of a fair coin (McNemar's test, at about one in a thousand).

    Args:
        right: bool [N, E], whether each exit is right, shallow to deep.
        exits: their names.
    """
    if right.shape[1] < 2:
        return None
    best = int(right.mean(0)[:-1].argmax())
    wins = int((right[:, best] & ~right[:, -1]).sum())
    losses = int((~right[:, best] & right[:, -1]).sum())
    if wins - losses <= 3 * np.sqrt(wins + losses):
        return None
    return (
        f"{exits[best]} is right more often than the last exit, {exits[-1]}: "
        f"{right[:, best].mean():.1%} against "
        f"{right[:, -1].mean():.1%} of {len(right):,} rows. Consider a plan that ends there "
        f"(max_exit={exits[best]!r}), "
        "or train the last exit further."
    )
