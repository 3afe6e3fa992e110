"""The cost of a plan: the sum of the parts that it runs, in MACs or in milliseconds at a batch
size.

Shapes: N rows, E exits. A part's price is [3] or [N, 3]: MACs per row, milliseconds per call (a),
milliseconds per row (b).

Besides segments, exits and gates there are three kinds of parts that have milliseconds only:
`runner`, the time of the Runner itself for a batch; `runner/<gate>`, its time at a gate to let rows
leave; and `plain`, the last model as its engine runs it alone. In traces that were recorded without
them, a plan costs its segments, exits and gates only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp._support.arguments import require_count
from offramp.errors import InvalidArgument
from offramp.plans.schedule import Schedule, Stage, compiled
from offramp.plans.topology import LEAVE, Topology

UNITS = ("macs", "ms")
RUNNER = "runner"  # the time of the Runner itself: for a batch, and as runner/<gate> at a gate
PLAIN = "plain"  # the last model as its engine runs it alone

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Prices:
    """The parts of a network with their prices. A part that is not named costs nothing.

    Attributes:
        topology: of the network.
        parts: prices [3] or [N, 3] by the names of parts, such as "segment/small".
    """

    topology: Topology
    parts: Mapping[str, Array]

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The models whose MACs are not known, by their last exit. With them there are no prices in
        MACs.

        These are members that declare so (NaN), and models in which nothing could be counted: a
        model without a single multiply-add computes outside of torch.
        """
        # A model is a line of segments, each continuing from the one before. Sum up MACs along it,
        # and look at the sum where the line ends.
        continued = set[str]()
        for node in self.topology.nodes:
            continued.update(node.after)
        unknown = list[str]()
        totals = dict[str, float]()
        for node in self.topology.nodes:
            segment = self.parts.get(f"segment/{node.name}")
            macs = 0.0
            if segment is not None:
                macs = float(np.mean(segment[..., 0]))  # [] or [N] -> []
            before = [totals[name] for name in node.after]
            totals[node.name] = macs + max(before, default=0.0)
            # a node that only routes is not a model
            is_end = node.name not in continued and node.has_exit
            # an arm may be nothing but an exit
            exit_ = self.parts.get(f"exit/{node.name}")
            exit_macs = 0.0 if exit_ is None else float(np.mean(exit_[..., 0]))
            if is_end and not totals[node.name] + exit_macs > 0:  # NaN too
                unknown.append(node.name)
        return tuple(unknown)

    @property
    def timed(self) -> bool:
        """Whether every part has milliseconds."""
        for price in self.parts.values():
            if np.isnan(price[..., 1:]).any():
                return False
        return bool(self.parts)

    @property
    def with_runner(self) -> bool:
        """Whether the milliseconds of the Runner itself were recorded."""
        return RUNNER in self.parts

    def unit(self, asked: str | None) -> str:
        """The unit to price in: the requested one, or MACs if they are known, or milliseconds.

        Args:
            asked: "macs", "ms", or None.

        Returns:
            "macs" or "ms".

        Raises:
            InvalidArgument: the unit is neither, or nothing was recorded in it.
        """
        if asked is not None:
            check_unit(asked, 1)
        if asked == "ms" or (asked is None and not self.uncounted):
            return asked or "macs"
        if not self.uncounted:
            return "macs"
        who = ", ".join(map(repr, self.uncounted))
        if asked == "macs":
            raise InvalidArgument(
                f"the MACs of {who} are not known, so nothing can be priced in them; use unit='ms'"
            )
        if not self.timed:
            raise InvalidArgument(
                f"the MACs of {who} are not known and milliseconds were not measured, so no plan "
                f"can be priced; record with timed=True"
            )
        return "ms"

    def _rate(self, part: str, unit: str, batch: int) -> Array:
        """Cost per row, [] or [N], when `batch` rows arrive at the part together."""
        price = self.parts.get(part)
        if price is None:
            return np.zeros(())
        if unit == "macs":
            rate: Array = price[..., 0]
        else:
            rate = price[..., 1] / batch + price[..., 2]  # a call on n rows takes a + b n
        if not np.isnan(rate).any():
            return rate
        if unit == "macs":
            raise InvalidArgument(
                f"the MACs of {part!r} were not counted; use unit='ms' on a trace with timings"
            )
        raise InvalidArgument(
            f"the milliseconds of {part!r} were not measured; record with timed=True, or use "
            f"unit='macs'"
        )

    def _stage(self, stage: Stage, unit: str, batch: int) -> Array:
        """Cost per row, [] or [N], when `batch` rows arrive at a stage together."""
        parts = [f"segment/{name}" for name in stage.nodes]
        if stage.exit:
            parts.append(f"exit/{stage.name}")
        if stage.gate:
            parts += [f"gate/{stage.name}", f"{RUNNER}/{stage.name}"]
        rates = [self._rate(part, unit, batch) for part in parts]  # [] or [N] each
        total: Array = sum(rates, start=np.zeros(()))
        return total

    def to_exit(
        self,
        open_gates: Collection[str],
        max_exit: str | None,
        *,
        unit: str = "macs",
        batch: int = 64,
    ) -> Array:
        """Cost of leaving at each exit of a chain. Closed exits have the cost so far.

        Milliseconds share a call's fixed part between `batch` rows, as if all of them arrived.

        Args:
            open_gates: the gates at which rows may leave.
            max_exit: the exit that answers every row that arrives there; None for the last one.
            unit: "macs" or "ms".
            batch: the batch size that milliseconds are for.

        Returns:
            [E'] or [N, E'] for the E' exits up to `max_exit`.

        Raises:
            BadNetwork: the network has forks.
        """
        check_unit(unit, batch)
        self.topology.require_chain("the search for thresholds")
        last = self.topology.exit_index(max_exit or self.topology.exits[-1])
        names = self.topology.exits[: last + 1]
        opened = {gate: (0.0,) for gate in open_gates if gate in self.topology.gates}
        stages = {stage.name: stage for stage in compiled(self.topology, opened, max_exit)}
        costs = []
        for name in names:
            if name in stages:
                costs.append(self._stage(stages[name], unit, batch))
            else:
                costs.append(np.zeros(()))
        costs[0] = costs[0] + self._rate(RUNNER, unit, batch)
        # E' costs [] or [N] -> [E'] or [N, E']
        return np.cumsum(np.stack(np.broadcast_arrays(*costs), axis=-1), axis=-1)

    def mean(self, schedule: Schedule, ran_NS: Array, *, unit: str, batch: int) -> float:
        """Mean cost per row of a plan.

        Milliseconds include a call's fixed part whenever at least one of `batch` rows drawn like
        these arrives.

        Args:
            schedule: the stages that the plan runs.
            ran_NS: bool [N, stages], which stages ran for each row, as in `Replay.ran`.
            unit: "macs" or "ms".
            batch: the batch size that milliseconds are for.

        Returns:
            The mean, in `unit` per row.
        """
        check_unit(unit, batch)
        total = float(self._rate(RUNNER, unit, batch))
        for stage, here_N in zip(schedule.stages, ran_NS.T, strict=True):
            per_call, per_row = self.per_call_and_row(stage, unit)
            calls = called(float(here_N.mean()), batch)
            total += per_call * calls + float((per_row * here_N).mean())
        return total

    def worst(self, schedule: Schedule, *, unit: str, batch: int) -> float:
        """Cost per row if all rows of a batch take the most expensive path through a schedule.

        Args:
            schedule: the stages that the plan runs.
            unit: "macs" or "ms".
            batch: the batch size that milliseconds are for.

        Returns:
            The cost, in `unit` per row.
        """
        check_unit(unit, batch)
        start = float(self._rate(RUNNER, unit, batch))
        # for each stage the cost of the most expensive path to it, the stage itself not included
        so_far = dict.fromkeys(schedule.index, start)
        ends = [start]
        for stage in schedule.stages:
            per_call, per_row = self.per_call_and_row(stage, unit)
            cost = so_far[stage.name] + (per_call * called(1.0, batch) + float(np.mean(per_row)))
            for edge in stage.edges:
                if edge.to == LEAVE:
                    ends.append(cost)
                else:
                    so_far[edge.to] = max(so_far[edge.to], cost)
        return max(ends)

    def per_call_and_row(self, stage: Stage, unit: str) -> tuple[float, Array]:
        """The cost of each call of a stage, and that of each row that arrives.

        Args:
            stage: of a schedule.
            unit: "macs" or "ms".

        Returns:
            A number per call (0 for MACs), and [] or [N] per row.
        """
        if unit == "macs":
            return 0.0, self._stage(stage, unit, 1)
        single = self._stage(stage, unit, 1)  # a + b
        per_row = self._stage(stage, unit, 10**12)  # b, because a is shared by so many rows
        return float(np.mean(single - per_row)), per_row

    def plain(self, reference: str, *, unit: str, batch: int) -> float:
        """Cost per row of the plain network that answers at one exit: its segments and this exit.

        If paths re-join before the exit, the last arm of every fork counts. The milliseconds of the
        last model are those of its engine's call alone, where they were recorded.

        Args:
            reference: the name of the exit.
            unit: "macs" or "ms".
            batch: the batch size that milliseconds are for.

        Returns:
            The cost, in `unit` per row.
        """
        check_unit(unit, batch)
        if unit == "ms" and reference == self.topology.exits[-1] and PLAIN in self.parts:
            return float(self._rate(PLAIN, unit, batch))
        node = self.topology.node(self.topology.exits[self.topology.exit_index(reference)])
        path = [reference]
        while node.after:
            node = self.topology.node(node.after[-1])
            path.append(node.name)
        return self.along(path, unit=unit, batch=batch)

    def along(self, path: Sequence[str], *, unit: str, batch: int) -> float:
        """Cost per row of the segments of some nodes, and of the exit at the last of them.

        Args:
            path: names of nodes, in any order.
            unit: "macs" or "ms".
            batch: the batch size that milliseconds are for.

        Returns:
            The cost, in `unit` per row.
        """
        check_unit(unit, batch)
        deepest = max(path, key=self.topology.names.index)
        total = np.mean(self._rate(f"exit/{deepest}", unit, batch))
        for name in path:
            total += np.mean(self._rate(f"segment/{name}", unit, batch))
        return float(total)


def called(reach: Any, batch: int) -> Any:
    """Calls per row of a stage, if each of `batch` rows arrives there independently.

    Args:
        reach: the probability that a row arrives, of any shape.
        batch: the number of rows.

    Returns:
        The probability that at least one row arrives, divided by `batch`.
    """
    return (1 - (1 - reach) ** batch) / batch


def check_unit(unit: str, batch: int) -> None:
    """Raise InvalidArgument for a unit that is neither macs nor ms, and for an empty batch."""
    require_count("batch", batch)
    if unit not in UNITS:
        raise InvalidArgument(f"unit must be 'macs' or 'ms', got {unit!r}")
