"""`offramp cut --at auto`: what was found at the places that were tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offramp.cli.printing import table

if TYPE_CHECKING:
    from offramp.building.placement.measure import Placement


def figures(found: Placement | None) -> tuple[dict[str, Any], list[Any]]:
    """What was found, for machines and as a table with a sentence; nothing where the places were
    named.
    """
    if found is None:
        return {}, []
    heads = ("exit after", "ms\nso far", "ms of\nthe exit", "could\nleave", "pays\nfrom", "")
    return found.to_json(), [table(*heads, rows=found.rows()), str(found)]
