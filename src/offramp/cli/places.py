"""`offramp cut --at auto`: trying places, and what was found there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offramp.cli.printing import table

if TYPE_CHECKING:
    from torch import nn

    from offramp.building.placement.trying import Placing


def placed_for(
    probe: str | None,
    module: nn.Module,
    front: nn.Module | None,
    batch: Any,
    exits: Any,
    free: Sequence[str],
    parts: int | None,
) -> Placing | None:
    """Where exits pay on the probe rows; None where there are none, and the places are asked for otherwise."""
    if probe is None:
        return None
    from offramp.building.placement.trying import placed
    from offramp.networks.inputs import as_inputs, texts_of

    tried = as_inputs(batch)
    most = None if parts is None else parts - 1
    return placed(module, front, tried, probe, exits=exits, length=texts_of(tried, free), most=most)


def figures(found: Placing | None) -> tuple[dict[str, Any], list[Any]]:
    """What was found at the places that were tried, for machines and as a table with a sentence."""
    if found is None:
        return {}, []
    each: list[dict[str, Any]] = [
        {
            "name": place.name,
            "ms": place.reach,
            "exit_ms": place.head,
            "could_leave": place.share,
            "pays_from": place.break_even(found.full) if place.break_even(found.full) <= 1 else None,
            "chosen": place.name in found.names,
        }
        for place in found.places
    ]
    heads = ("exit after", "ms\nso far", "ms of\nthe exit", "could\nleave", "pays\nfrom", "")
    rows = [
        (
            str(one["name"]),
            *(f"{one[key]:.3g}" for key in ("ms", "exit_ms")),
            f"{one['could_leave']:.1%}",
            "never" if one["pays_from"] is None else f"{one['pays_from']:.1%}",
            "chosen" if one["chosen"] else "",
        )
        for one in each
    ]
    saved = f"estimated ms per row {found.mean:.3g}, without exits {found.full:.3g}; measured once on this machine"
    body = {"places": each, "estimated_ms": found.mean, "plain_ms": found.full}
    return body, [table(*heads, rows=rows), saved]
