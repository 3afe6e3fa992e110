"""The figures of a plan on rows: accuracy, risk, cost and shares. They print themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp._support.arguments import percentage
from offramp.plans.plan import Plan, Price, compared

if TYPE_CHECKING:
    from offramp.plans.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Measured:
    """A risk measured on rows, with a two-sided interval.

    Attributes:
        risk: the name of the risk.
        reference: the exit that it compares with.
        value: the mean loss.
        low: the lower end of the interval.
        high: the upper end of the interval.
        confidence: of the interval.
    """

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
    """The figures of one exit, if it answered every row.

    Attributes:
        exit: its name.
        accuracy: None without labels.
        macs: per row, None where they are not known.
        ms_64: milliseconds per row at batch 64, None where they were not measured.
    """

    exit: str
    accuracy: float | None
    macs: float | None
    ms_64: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def exits_alone(trace: Trace) -> list[ExitAlone]:
    """The figures of every exit of a trace, if it answered every row.

    Args:
        trace: recorded outputs.

    Returns:
        A list from shallow to deep. With forks it has an entry for each path to an exit, such as
        "head via small"; of a trace at settings of one dial, an entry for each setting.
    """
    if trace.header.settings:
        return _settings_alone(trace)
    if not trace.topology.is_chain:
        return _paths_alone(trace)
    labels = trace.labels
    prices = trace.prices
    figures = list[ExitAlone]()
    for name in trace.topology.exits:
        accuracy = None
        macs = None
        ms_64 = None
        if labels is not None:
            accuracy = float((trace.columns[f"answer/{name}"] == labels).mean())
        if not prices.uncounted:
            macs = prices.plain(name, unit="macs", batch=1)
        if prices.timed:
            ms_64 = prices.plain(name, unit="ms", batch=64)
        figures.append(ExitAlone(name, accuracy, macs, ms_64))
    return figures


def _paths_alone(trace: Trace) -> list[ExitAlone]:
    """The figures of every path to an exit, in the order of the topology's `exit_labels`."""
    topology = trace.topology
    prices = trace.prices
    figures = list[ExitAlone]()
    for name in topology.exits:
        for path in topology.paths[name]:
            accuracy = None
            if trace.labels is not None:
                answers = trace.columns[f"answer/{topology.label(path)}"]
                accuracy = float((answers == trace.labels).mean())
            macs = None if prices.uncounted else prices.along(path, unit="macs", batch=1)
            ms_64 = prices.along(path, unit="ms", batch=64) if prices.timed else None
            figures.append(ExitAlone(_path_name(trace, path), accuracy, macs, ms_64))
    return figures


def _path_name(trace: Trace, path: tuple[str, ...]) -> str:
    """The exit of a path, and the nodes that tell it from other paths there."""
    topology = trace.topology
    name = path[-1]
    if len(topology.paths[name]) == 1:
        return name
    always = topology._always_before[name]
    chosen = [node for node in path[:-1] if node not in always]
    return f"{name} via {' '.join(chosen)}" if chosen else f"{name} directly"


def _settings_alone(trace: Trace) -> list[ExitAlone]:
    """The figures of every setting of a dial."""
    figures = list[ExitAlone]()
    gates = trace.topology.gates
    for number, value in enumerate(trace.header.settings):
        thresholds = {gate: (value,) * trace.topology.routes(gate) for gate in gates}
        plan = Plan(thresholds=thresholds)
        accuracy = None
        if trace.labels is not None:
            accuracy = float((trace.answers[:, number] == trace.labels).mean())
        macs = None if trace.prices.uncounted else trace.price(plan, "macs", 1).mean
        ms_64 = trace.price(plan, "ms", 64).mean if trace.prices.timed else None
        name = "all gates closed" if value == np.inf else f"setting {value:g}"
        figures.append(ExitAlone(name, accuracy, macs, ms_64))
    return figures


@dataclass(frozen=True)
class WorstClass:
    """The class whose accuracy falls most against the reference.

    Attributes:
        name: of the class.
        accuracy: under the plan.
        plain: of the plain network.
    """

    name: str
    accuracy: float
    plain: float


@dataclass(frozen=True)
class Evaluation:
    """The figures of a plan on some rows. `print` shows them as lines.

    Attributes:
        rows: how many rows.
        exits: the names of the exits, shallow to deep.
        shares: the share of rows that leave at each exit.
        risk: the risk with its interval.
        prices: the cost in each unit and batch size.
        in_band: the share of rows with a score within the float band of a threshold.
        accuracy: of the plan, None without labels.
        plain_accuracy: of the plain network, None without labels.
        exit_accuracy: of the rows that leave at each exit, None where none leave; empty without
            labels.
        worst_class: the class that loses most, None without labels.
        repeated: how many rows have the content or the number of another one. The interval does not
            count them.
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
        for name, share in zip(self.exits, self.shares, strict=True):
            lines.append(f"  {share:6.1%} leave at {name}")
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
        for price in self.prices:
            lines.append(f"  {price}")
        # within the band a batch of another size may decide differently
        lines.append(f"  {self.in_band:.2%} of rows within the float band of a threshold")
        return "\n".join(lines)


def worst_class(
    right: Array, right_plain: Array, labels: Array, names: Sequence[str] | None
) -> WorstClass | None:
    """The class whose accuracy falls most.

    Args:
        right: bool [N], whether the plan is right.
        right_plain: bool [N], whether the plain network is right.
        labels: [N].
        names: names of the classes, or None.

    Returns:
        The class with its accuracies; None without rows.
    """
    classes = np.unique(labels)
    if not classes.size:
        return None
    falls = []
    for label in classes:
        rows = labels == label
        falls.append(right_plain[rows].mean() - right[rows].mean())
    worst = int(classes[int(np.argmax(falls))])
    rows = labels == worst
    # there may be fewer names than classes
    if names is not None and worst < len(names):
        name = names[worst]
    else:
        name = str(worst)
    return WorstClass(name, float(right[rows].mean()), float(right_plain[rows].mean()))


def better_exit(right: Array, exits: Sequence[str]) -> str | None:
    """A sentence about an exit that is right clearly more often than the last one.

    Clearly means: on the rows that only one of the two gets right, the exit wins by more than three
    standard deviations of a fair coin (McNemar's test, at about one in a thousand).

    Args:
        right: bool [N, E], whether each exit is right, shallow to deep.
        exits: their names.

    Returns:
        The sentence, or None where there is no such exit.
    """
    if right.shape[1] < 2:
        return None
    best = int(right.mean(0)[:-1].argmax())  # [N, E] -> [E - 1] without the last exit
    # Rows that both get right, or both wrong, tell nothing about which is better. If the exits are
    # equally good, each of the others is a toss of a fair coin: the difference of n tosses has the
    # standard deviation sqrt(n).
    wins = int((right[:, best] & ~right[:, -1]).sum())
    losses = int((~right[:, best] & right[:, -1]).sum())
    if wins - losses <= 3 * np.sqrt(wins + losses):
        return None
    return (
        f"{exits[best]} is right more often than the last exit, {exits[-1]}: "
        f"{right[:, best].mean():.1%} against {right[:, -1].mean():.1%} of {len(right):,} rows. "
        f"Consider a plan that ends there (max_exit={exits[best]!r}), or train the last exit "
        f"further."
    )
