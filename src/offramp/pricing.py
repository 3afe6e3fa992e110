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
        if not np.isnan(rate).any():
            return rate
        if unit == "macs":
            raise BadInput(f"the MACs of {part!r} were not counted; use unit='ms' on a trace with timings")
        raise BadInput(f"the milliseconds of {part!r} were not measured; record with timed=True, or use unit='macs'")

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

    def unit_with_prices(self, unit: str, reference: str) -> str:
        """The unit asked for, or "ms" where MACs tell no price and milliseconds do.

        MACs tell no price if those of a part were not counted, if the network that answers at `reference` has
        none, or if a whole model of a ladder has none: a model that torch cannot look into is not free.

        Raises:
            BadInput: there is no price in MACs and none in milliseconds.
        """
        if unit != "macs" or (missing := self._without_macs(reference)) is None:
            return unit
        timed = not any(np.isnan(price[..., 1:]).any() for price in self.parts.values())
        if timed and self.plain(reference, unit="ms", batch=1) > 0:
            return "ms"
        raise BadInput(
            f"the plan has no price: no MACs were counted in {missing!r}, and milliseconds were not measured; "
            "record with timed=True"
        )

    def _without_macs(self, reference: str) -> str | None:
        """The first part because of which MACs tell no price; None where they do."""
        for part, price in self.parts.items():
            if np.isnan(price[..., 0]).any():
                return part
        models = [node for node in self.chain.nodes if node.after is None]
        continued = {node.after for node in self.chain.nodes}
        for node in models if len(models) > 1 else ():
            if node.name not in continued and not np.any(self._rate(f"segment/{node.name}", "macs", 1)):
                return f"segment/{node.name}"
        if not self.plain(reference, unit="macs", batch=1) > 0:
            return f"segment/{reference}"
        return None

    def plain(self, reference: str, *, unit: str, batch: int) -> float:
        """Cost per row of the network that answers at `reference` alone: its segments and its exit, no gate."""
        check_unit(unit, batch)
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
