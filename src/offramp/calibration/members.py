"""The members of a cascade, and whether the cheapest come first. Does not import torch."""

from __future__ import annotations

import warnings

import numpy as np

from offramp.errors import DearFirst
from offramp.plans.trace import Trace


def warn_of_order(trace: Trace, unit: str = "macs", batch: int = 64) -> None:
    """Warn with DearFirst where a member of a cascade costs more than a later one.

    Args:
        trace: of any network. A network from `cut` has one member, and so no order to choose.
        unit: "macs" or "ms", the unit of the costs.
        batch: the batch size that milliseconds are for.
    """
    costs = _costs(trace, unit, batch)
    names = list(costs)
    # sorting is stable: members of equal cost stay in their order
    cheapest_first = sorted(names, key=lambda name: costs[name])
    if cheapest_first == names:
        return
    figures = ", ".join(f"{name} ({costs[name]:.4g})" for name in names)
    per_row = "MACs" if unit == "macs" else f"milliseconds at batch {batch}"
    warnings.warn(
        f"a member of this ladder costs more than a later one, in {per_row} per row: {figures}; "
        f"every row pays for the earlier ones first, so stack them in the order "
        f"{', '.join(cheapest_first)}",
        DearFirst,
        stacklevel=3,
    )


def _costs(trace: Trace, unit: str, batch: int) -> dict[str, float]:
    """The cost per row of each member alone, in the order of the cascade, where it is known."""
    if not trace.topology.is_chain:
        return {}
    # A member begins at a node that reads the raw input. It ends, and answers alone, at the node
    # before the next member begins.
    nodes = trace.topology.nodes
    costs = {}
    for index, node in enumerate(nodes):
        is_end = index + 1 == len(nodes) or not nodes[index + 1].after
        if not is_end:
            continue
        cost = trace.prices.plain(node.name, unit=unit, batch=batch)
        if np.isfinite(cost) and cost > 0:
            costs[node.name] = cost
    return costs
