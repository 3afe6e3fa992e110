"""What you subclass, in one place; the kit in `offramp.testing` checks each of them.

    Exit      a classifier after a segment         off.cut(model, exits={...}), net.with_exit(node, exit)
              (`Pools` and `Hands` are what an exit may do besides: pool first, hand on more than
              its answer)
    Gate      a score per row, to leave or go on   off.cut(model, gate=...), net.with_gates({node: gate})
    Seen      what an exit or a gate looks at      the argument of both
    Recipe    a way to train                       off.fit(net, data, recipe=...)
    Phase     a stretch of training                what a recipe's `phases` gives
    TrainingOutputs   what a recipe looks at       an argument of a recipe's `loss`
    TrainingBatch     the labels that come with it an argument of a recipe's `loss`
    Layer     a cheaper substitute for a layer     within your model; files on the shelf `layers`
    LayerCost what a layer costs                   what a layer's `cost` gives
    Engine    what runs segments                   a file on the shelf `engines`
    Risk      a loss per row that is kept small    off.calibrate(trace, risk=...), an instance of it

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
