"""offramp makes trained networks spend less on easy inputs, under a certified promise.

    net   = off.ladder({"small": (small, preprocess), "large": (large, preprocess)}).eval()
    trace = off.record(net, held_out)
    plan  = off.calibrate(trace, risk="accuracy_gap", at_most=0.005)
    y     = off.run(net, plan, x)                  # y.logits, y.exit, y.why, in the order of x

Errors live in `offramp.errors`. Importing this imports no torch: each name is loaded when it is
first used.
"""

from __future__ import annotations

import importlib

# that of typing, which takes a moment to import, and Ctrl-C in it would end in a traceback
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from offramp.building.adopting import adopt as adopt
    from offramp.building.converting import convert as convert
    from offramp.building.cutting import cut as cut
    from offramp.building.cutting import ladder as ladder
    from offramp.building.factories import make_model as make_model
    from offramp.building.factories import make_preprocess as make_preprocess
    from offramp.building.halting import halting as halting
    from offramp.building.inspecting import inspect as inspect
    from offramp.building.reading import along_time as along_time
    from offramp.building.resolving import resolutions as resolutions
    from offramp.building.routing import Fork as Fork
    from offramp.building.routing import Leave as Leave
    from offramp.building.routing import route as route
    from offramp.building.saving import load as load
    from offramp.building.saving import save as save
    from offramp.building.unrolling import unrolled as unrolled
    from offramp.calibration.calibrating import calibrate as calibrate
    from offramp.calibration.checking import check as check
    from offramp.comparing.writing import compare as compare
    from offramp.data.rows import rows as rows
    from offramp.deploy.exporting import export as export
    from offramp.designing.searching import search as search
    from offramp.fitting.training import fit as fit
    from offramp.guarantees.bounds import rows_needed as rows_needed
    from offramp.guarantees.risks import Risk as Risk
    from offramp.models.wae import wae as wae
    from offramp.networks.layer import Layer as Layer
    from offramp.networks.network import Network as Network
    from offramp.networks.nodes import Exit as Exit
    from offramp.networks.nodes import Gate as Gate
    from offramp.networks.recipe import Phase as Phase
    from offramp.networks.recipe import Recipe as Recipe
    from offramp.plans.plan import Plan as Plan
    from offramp.plans.trace import Trace as Trace
    from offramp.reporting.page import report as report
    from offramp.runtime.benching import bench as bench
    from offramp.runtime.engine import Engine as Engine
    from offramp.runtime.recording import record as record
    from offramp.runtime.running import Runner as Runner
    from offramp.runtime.session import open as open
    from offramp.runtime.session import run as run

__version__ = "0.2.0"

_HOMES = {
    "Engine": "runtime.engine",
    "Exit": "networks.nodes",
    "Fork": "building.routing",
    "Gate": "networks.nodes",
    "Layer": "networks.layer",
    "Leave": "building.routing",
    "Network": "networks.network",
    "Phase": "networks.recipe",
    "Plan": "plans.plan",
    "Recipe": "networks.recipe",
    "Risk": "guarantees.risks",
    "Runner": "runtime.running",
    "Trace": "plans.trace",
    "adopt": "building.adopting",
    "along_time": "building.reading",
    "bench": "runtime.benching",
    "calibrate": "calibration.calibrating",
    "check": "calibration.checking",
    "compare": "comparing.writing",
    "convert": "building.converting",
    "cut": "building.cutting",
    "export": "deploy.exporting",
    "fit": "fitting.training",
    "inspect": "building.inspecting",
    "halting": "building.halting",
    "ladder": "building.cutting",
    "load": "building.saving",
    "make_preprocess": "building.factories",
    "make_model": "building.factories",
    "open": "runtime.session",
    "record": "runtime.recording",
    "report": "reporting.page",
    "resolutions": "building.resolving",
    "route": "building.routing",
    "rows": "data.rows",
    "rows_needed": "guarantees.bounds",
    "run": "runtime.session",
    "save": "building.saving",
    "search": "designing.searching",
    "unrolled": "building.unrolling",
    "wae": "models.wae",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'offramp' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    found = getattr(importlib.import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
