"""What a plan costs: the sum of the parts that it runs, in MACs or in milliseconds at a batch size.

Shapes: N rows, E exits. A part's price is [3] or [N, 3]: MACs per row, milliseconds per call (a),
per row (b).

Beside segments, exits and gates there are three kinds of parts that only milliseconds know:
`runner`, what a Runner itself takes for a batch; `runner/<gate>`, what it takes there to let rows
leave; and `plain`, the last model as its engine runs it bare. In traces that were recorded without
them a plan costs its segments, exits and gates alone.
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
RUNNER = "runner"  # what the Runner itself takes: for a batch, and as runner/<gate> at a gate
PLAIN = "plain"  # the last model as its engine runs it bare

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Prices:
    """The parts of a network with their prices; the parts that are not named cost nothing."""

    topology: Topology
    parts: Mapping[str, Array]

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The models whose MACs nobody knows, by their last exit: with them there are no prices in
        MACs.

        Those are members that say so (NaN), and whole models in which nothing could be counted: a
        model that costs no multiply-add at all is one that computes outside of torch.
        """
        unknown = list[str]()
        totals = dict[str, float]()
        continued = {name for node in self.topology.nodes for name in node.after}
        for node in self.topology.nodes:
            segment = self.parts.get(f"segment/{node.name}")
            macs = 0.0 if segment is None else float(np.mean(segment[..., 0]))
            totals[node.name] = macs + max((totals[name] for name in node.after), default=0.0)
            # a node that only routes is no model
            ends = node.name not in continued and node.has_exit
            if ends and not totals[node.name] > 0:
                unknown.append(node.name)
        return tuple(unknown)

    @property
    def timed(self) -> bool:
        """Whether every part has milliseconds."""
        timings = [price[..., 1:] for price in self.parts.values()]
        return bool(timings) and not any(np.isnan(each).any() for each in timings)

    @property
    def with_runner(self) -> bool:
        """Whether the milliseconds of the Runner itself were recorded."""
        return RUNNER in self.parts

    def unit(self, asked: str | None) -> str:
        """The unit to price in: what was asked for, else MACs where they are known, else
        milliseconds.

        Args:
            asked: "macs", "ms", or None.

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
                f"can be priced; "
                "record with timed=True"
            )
        return "ms"

    def _rate(self, part: str, unit: str, batch: int) -> Array:
        """Cost per row, [] or [N], when `batch` rows arrive at the part together."""
        price = self.parts.get(part)
        if price is None:
            return np.zeros(())
        rate: Array = price[..., 0] if unit == "macs" else price[..., 1] / batch + price[..., 2]
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
        """Cost of leaving at each exit, [E'] or [N, E'], E' exits up to `max_exit`; of what is
        closed, the cost so far.

        Milliseconds share a call's fixed part among `batch` rows, as if all of them arrived. Of
        chains alone.
        """
        check_unit(unit, batch)
        self.topology.require_chain("the search for thresholds")
        last = self.topology.exit_index(max_exit or self.topology.exits[-1])
        names = self.topology.exits[: last + 1]
        opened = {gate: (0.0,) for gate in open_gates if gate in self.topology.gates}
        stages = {stage.name: stage for stage in compiled(self.topology, opened, max_exit)}
        each = [
            self._stage(stages[name], unit, batch) if name in stages else np.zeros(())
            for name in names
        ]
        each[0] = each[0] + self._rate(RUNNER, unit, batch)
        return np.cumsum(np.stack(np.broadcast_arrays(*each), axis=-1), axis=-1)

    def mean(self, schedule: Schedule, ran_NS: Array, *, unit: str, batch: int) -> float:
        """Mean cost per row of a plan.

        Milliseconds charge a call's fixed part whenever at least one of `batch` rows drawn like
        these arrives.

        Args:
            schedule: what the plan runs.
            ran_NS: bool [N, stages], which stages ran for each row, as `replay` tells.
            unit: "macs" or "ms".
            batch: the batch size that milliseconds are for.
        """
        check_unit(unit, batch)
        total = float(self._rate(RUNNER, unit, batch))
        for stage, here_N in zip(schedule.stages, ran_NS.T, strict=True):
            per_call, per_row = self.per_call_and_row(stage, unit)
            total += per_call * called(float(here_N.mean()), batch) + float(
                (per_row * here_N).mean()
            )
        return total

    def worst(self, schedule: Schedule, *, unit: str, batch: int) -> float:
        """Cost per row of a batch whose rows all take the dearest path through a schedule, to its
        end.
        """
        check_unit(unit, batch)
        start = float(self._rate(RUNNER, unit, batch))
        # by stage what the dearest path to it has cost
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
        """What a stage costs each time that it is called, and for each row that arrives, [] or [N].

        MACs have no part by the call.
        """
        if unit == "macs":
            return 0.0, self._stage(stage, unit, 1)
        one = self._stage(stage, unit, 1)  # a + b
        row = self._stage(stage, unit, 10**12)  # b
        return float(np.mean(one - row)), row

    def plain(self, reference: str, *, unit: str, batch: int) -> float:
        """Cost per row of the network that answers at `reference` alone: its segments and its exit,
        no gate.

        Where paths re-join before it, that is the last arm of every fork.
        In milliseconds the last model costs what its engine's bare call took, where that was
        recorded.
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
        """Cost per row of the segments of some nodes, and of the exit at the last of them; no
        gate.
        """
        check_unit(unit, batch)
        answers = max(path, key=self.topology.names.index)
        parts = [f"exit/{answers}", *(f"segment/{name}" for name in path)]
        return float(sum(np.mean(self._rate(part, unit, batch)) for part in parts))


def called(reach: Any, batch: int) -> Any:
    """Calls per row when each of `batch` rows drawn together arrives with the probability `reach`
    (any shape).
    """
    return (1 - (1 - reach) ** batch) / batch


def check_unit(unit: str, batch: int) -> None:
    """Raise InvalidArgument for a unit that is neither macs nor ms, and for a batch of no rows."""
    require_count("batch", batch)
    if unit not in UNITS:
        raise InvalidArgument(f"the unit is {unit!r}, expected 'macs' or 'ms'")
