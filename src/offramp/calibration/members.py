"""The members of a cascade, and whether the cheapest come first. No torch."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np

from offramp.errors import DearFirst
from offramp.plans.trace import Trace


def warn_of_order(trace: Trace, unit: str = "macs", batch: int = 64) -> None:
    """Warn with DearFirst where a member of a cascade costs more than a later one.

    Args:
        trace: of any network; one that is cut, and not stacked, has one member and no order to
            choose.
        unit: "macs" or "ms", the cost that is looked at.
        batch: the batch size that milliseconds are for.
    """
    costs = _costs(trace, unit, batch)
    if not any(later < earlier for earlier, later in pairwise(costs.values())):
        return
    cheapest_first = sorted(costs, key=lambda name: costs[name])
    told = ", ".join(f"{name} ({costs[name]:.4g})" for name in costs)
    name = "MACs" if unit == "macs" else f"milliseconds at batch {batch}"
    warnings.warn(
        f"a member of this ladder costs more than a later one, in {name} per row: {told}; every "
        f"row pays for the "
        f"earlier ones first, so stack them in the order {', '.join(cheapest_first)}",
        DearFirst,
        stacklevel=3,
    )


def _costs(trace: Trace, unit: str, batch: int) -> dict[str, float]:
    """What each member costs per row when it answers alone, in the order of the cascade, where that
    is known.

    A member begins at a node that reads the raw input, and answers alone at its last node.
    """
    if not trace.topology.is_chain:
        return {}
    nodes = trace.topology.nodes
    starts = [index for index, node in enumerate(nodes) if not node.after]
    last_nodes = [nodes[index - 1].name for index in (*starts[1:], len(nodes))]
    costs = {name: trace.prices.plain(name, unit=unit, batch=batch) for name in last_nodes}
    return {name: cost for name, cost in costs.items() if np.isfinite(cost) and cost > 0}
