"""What you subclass, in one place; the kit in `offramp.testing` checks each of them.

    Exit             a classifier after a segment         off.cut(model, exits={...})
                     (`Pools`: it pools first; `Hands`: it hands on more than its logits)
    Gate             a score per row, to leave or go on   off.cut(model, gate=...)
    Seen             what an exit or a gate reads         the argument of both
    Recipe           a way to train                       off.fit(net, data, recipe=...)
    Phase            a stretch of training                returned by a recipe's `phases`
    TrainingOutputs  what a recipe's loss reads           the first argument of `loss`
    TrainingBatch    the labels of a batch                the second argument of `loss`
    Layer            a cheaper substitute for a layer     off.convert(model, {pattern: layer})
    LayerCost        what a layer costs                   returned by a layer's `cost`
    Engine           what runs segments                   off.open(net, plan, engine=...)
    Risk             a loss per row that is kept small    off.calibrate(trace, risk=...)

Importing this imports no torch: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # that of typing takes a moment to import
if TYPE_CHECKING:
    from typing import Any

    from offramp.guarantees.risks import Risk as Risk
    from offramp.networks.layer import Layer as Layer
    from offramp.networks.layer import LayerCost as LayerCost
    from offramp.networks.nodes import Exit as Exit
    from offramp.networks.nodes import Gate as Gate
    from offramp.networks.nodes import Hands as Hands
    from offramp.networks.nodes import Seen as Seen
    from offramp.networks.recipe import Phase as Phase
    from offramp.networks.recipe import Pools as Pools
    from offramp.networks.recipe import Recipe as Recipe
    from offramp.networks.recipe import TrainingBatch as TrainingBatch
    from offramp.networks.recipe import TrainingOutputs as TrainingOutputs
    from offramp.runtime.engine import Engine as Engine

_HOMES = {
    "Engine": "runtime.engine",
    "Exit": "networks.nodes",
    "Gate": "networks.nodes",
    "Hands": "networks.nodes",
    "Layer": "networks.layer",
    "LayerCost": "networks.layer",
    "TrainingBatch": "networks.recipe",
    "Phase": "networks.recipe",
    "Pools": "networks.recipe",
    "Recipe": "networks.recipe",
    "Risk": "guarantees.risks",
    "Seen": "networks.nodes",
    "TrainingOutputs": "networks.recipe",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'offramp.contracts' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    found = getattr(importlib.import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
