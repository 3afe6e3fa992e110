"""What a plan costs: the sum of the parts that it runs, in MACs or in milliseconds at a batch size.

Shapes: N rows, E exits. A part's price is [3] or [N, 3]: MACs per row, milliseconds per call (a), per row (b).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.chain import Chain, Step
from offramp.errors import BadInput

UNITS = ("macs", "ms")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Prices:
    """The parts of a chain with their prices; the parts that are not named cost nothing."""

    chain: Chain
    parts: Mapping[str, Array]

    def _rate(self, part: str, unit: str, batch: int) -> Array:
        """Cost per row, [] or [N], when `batch` rows arrive at the part together."""
        price = self.parts.get(part)
        if price is None:
            return np.zeros(())
        rate: Array = price[..., 0] if unit == "macs" else price[..., 1] / batch + price[..., 2]
        if np.isnan(rate).any():
            raise BadInput(
                f"the milliseconds of {part!r} were not measured; record with timed=True, or use unit='macs'"
            )
        return rate

    def _node(self, step: Step, unit: str, batch: int) -> Array:
        kinds = ("segment", *(["exit"] if step.exit else []), *(["gate"] if step.gate else []))
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
        return np.cumsum(np.stack(np.broadcast_arrays(*each), axis=-1), axis=-1)

    def mean(self, steps: Sequence[Step], exits_N: Array, *, unit: str, batch: int) -> float:
        """Mean cost per row of a plan whose rows leave at `exits_N`.

        Milliseconds charge a call's fixed part whenever at least one of `batch` rows drawn like these arrives.
        """
        check_unit(unit, batch)
        total = 0.0
        for step in steps:
            here = exits_N >= self.chain.place(step.name)  # [N]
            reach = float(here.mean())
            if unit == "macs":
                total += float((self._node(step, unit, batch) * here).mean())
                continue
            alone, many = self._node(step, unit, 1), self._node(step, unit, 10**12)  # a + b, and b
            called = (1 - (1 - reach) ** batch) / batch
            total += float(np.mean(alone - many)) * called + float((many * here).mean())
        return total

    def plain(self, reference: str, *, unit: str, batch: int) -> float:
        """Cost per row of the network that answers at `reference` alone: its segments and its exit, no gate."""
        check_unit(unit, batch)
        node = self.chain.nodes[self.chain.place(reference)]
        parts = [f"exit/{reference}", f"segment/{reference}"]
        while node.after is not None:
            node = self.chain.nodes[self.chain.place(node.after)]
            parts.append(f"segment/{node.name}")
        return float(sum(np.mean(self._rate(part, unit, batch)) for part in parts))


def check_unit(unit: str, batch: int) -> None:
    """Raise BadInput for a unit that is neither macs nor ms, and for a batch of no rows."""
    if batch < 1:
        raise BadInput(f"the batch is {batch} rows, expected at least 1")
    if unit not in UNITS:
        raise BadInput(f"the unit is {unit!r}, expected 'macs' or 'ms'")
