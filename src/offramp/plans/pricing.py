"""What a plan costs: the sum of the parts that it runs, in MACs or in milliseconds at a batch size.

Shapes: N rows, E exits. A part's price is [3] or [N, 3]: MACs per row, milliseconds per call (a), per row (b).

Beside segments, exits and gates there are three kinds of parts that only milliseconds know: `runner`, what a Runner
itself takes for a batch; `runner/<gate>`, what it takes there to let rows leave; and `plain`, the last model as its
engine runs it bare. In traces that were recorded without them a plan costs its segments, exits and gates alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.errors import BadInput
from offramp.plans.chain import Chain, Step

UNITS = ("macs", "ms")
RUNNER = "runner"  # what the Runner itself takes: for a batch, and as runner/<gate> at a gate
PLAIN = "plain"  # the last model as its engine runs it bare

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Prices:
    """The parts of a chain with their prices; the parts that are not named cost nothing."""

    chain: Chain
    parts: Mapping[str, Array]

    @property
    def uncounted(self) -> tuple[str, ...]:
        """The models whose MACs nobody knows, by their last exit: with them there are no prices in MACs.

        Those are members that say so (NaN), and whole models in which nothing could be counted: a model that costs
        no multiply-add at all is one that computes outside of torch.
        """
        unknown = list[str]()
        total = 0.0
        for node, following in zip(self.chain.nodes, (*self.chain.nodes[1:], None), strict=True):
            segment = self.parts.get(f"segment/{node.name}")
            macs = 0.0 if segment is None else float(np.mean(segment[..., 0]))
            total = macs if node.after is None else total + macs
            if (following is None or following.after is None) and not total > 0:  # the model ends here
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
        """The unit to price in: what was asked for, else MACs where they are known, else milliseconds.

        Args:
            asked: "macs", "ms", or None.

        Raises:
            BadInput: the unit is neither, or nothing was recorded in it.
        """
        if asked is not None:
            check_unit(asked, 1)
        if asked == "ms" or (asked is None and not self.uncounted):
            return asked or "macs"
        if not self.uncounted:
            return "macs"
        who = ", ".join(map(repr, self.uncounted))
        if asked == "macs":
            raise BadInput(f"the MACs of {who} are not known, so nothing can be priced in them; use unit='ms'")
        if not self.timed:
            raise BadInput(
                f"the MACs of {who} are not known and milliseconds were not measured, so no plan can be priced; "
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
            raise BadInput(f"the MACs of {part!r} were not counted; use unit='ms' on a trace with timings")
        raise BadInput(f"the milliseconds of {part!r} were not measured; record with timed=True, or use unit='macs'")

    def _node(self, step: Step, unit: str, batch: int) -> Array:
        kinds = ["segment"]
        if step.exit:
            kinds.append("exit")
        if step.gate:
            kinds += ["gate", RUNNER]
        rates = [self._rate(f"{kind}/{step.name}", unit, batch) for kind in kinds]  # [] or [N] each
        total: Array = sum(rates, start=np.zeros(()))
        return total

    def to_exit(
        self, open_gates: Collection[str], deepest: str | None, *, unit: str = "macs", batch: int = 64
    ) -> Array:
        """Cost of leaving at each exit, [E'] or [N, E'], E' exits up to `deepest`; of what is closed, the cost so far.

        Milliseconds share a call's fixed part among `batch` rows, as if all of them arrived.
        """
        check_unit(unit, batch)
        steps = {step.name: step for step in self.chain.walk(open_gates, deepest)}
        last = self.chain.place(deepest or self.chain.exits[-1])
        each = [
            self._node(steps[name], unit, batch) if name in steps else np.zeros(())
            for name in self.chain.exits[: last + 1]
        ]
        each[0] = each[0] + self._rate(RUNNER, unit, batch)
        return np.cumsum(np.stack(np.broadcast_arrays(*each), axis=-1), axis=-1)

    def mean(self, steps: Sequence[Step], exits_N: Array, *, unit: str, batch: int) -> float:
        """Mean cost per row of a plan whose rows leave at `exits_N`.

        Milliseconds charge a call's fixed part whenever at least one of `batch` rows drawn like these arrives.
        """
        check_unit(unit, batch)
        total = float(self._rate(RUNNER, unit, batch))
        for step in steps:
            here = exits_N >= self.chain.place(step.name)  # [N]
            per_call, per_row = self.per_call_and_row(step, unit)
            total += per_call * called(float(here.mean()), batch) + float((per_row * here).mean())
        return total

    def per_call_and_row(self, step: Step, unit: str) -> tuple[float, Array]:
        """What a step costs each time that it is called, and for each row that arrives, [] or [N].

        MACs have no part by the call.
        """
        if unit == "macs":
            return 0.0, self._node(step, unit, 1)
        one = self._node(step, unit, 1)  # a + b
        row = self._node(step, unit, 10**12)  # b
        return float(np.mean(one - row)), row

    def plain(self, reference: str, *, unit: str, batch: int) -> float:
        """Cost per row of the network that answers at `reference` alone: its segments and its exit, no gate.

        In milliseconds the last model costs what its engine's bare call took, where that was recorded.
        """
        check_unit(unit, batch)
        if unit == "ms" and reference == self.chain.exits[-1] and PLAIN in self.parts:
            return float(self._rate(PLAIN, unit, batch))
        node = self.chain.nodes[self.chain.place(reference)]
        parts = [f"exit/{reference}", f"segment/{reference}"]
        while node.after is not None:
            node = self.chain.nodes[self.chain.place(node.after)]
            parts.append(f"segment/{node.name}")
        return float(sum(np.mean(self._rate(part, unit, batch)) for part in parts))


def called(reach: Any, batch: int) -> Any:
    """Calls per row when each of `batch` rows drawn together arrives with the probability `reach` (any shape)."""
    return (1 - (1 - reach) ** batch) / batch


def check_unit(unit: str, batch: int) -> None:
    """Raise BadInput for a unit that is neither macs nor ms, and for a batch of no rows."""
    if batch < 1:
        raise BadInput(f"the batch is {batch} rows, expected at least 1")
    if unit not in UNITS:
        raise BadInput(f"the unit is {unit!r}, expected 'macs' or 'ms'")
