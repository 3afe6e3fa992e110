"""The cuts of a method's networks: the example, inputs of any length, and the modules where exits
pay.

<folder>/places/<checksum>.json    names and labelled rows of at = "auto", one for all methods with
                                   the same flags

These modules depend on times of this machine, which differ from run to run. They are measured only
once, so that all seeds have the same exits, methods that differ in their recipe differ in nothing
else, and a run that was stopped can go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from offramp._support.arguments import words
from offramp._support.files import checksum, read_json, write_json
from offramp.building.placement.measure import placed
from offramp.comparing.settings import Method, Settings
from offramp.data.rows import rows
from offramp.networks.inputs import as_inputs, texts_of
from offramp.plans.provenance import SeenRows

KIND = "places"
SCHEMA = 1
EXAMPLE = 8  # rows
# The flags that the places depend on.
ASKED = (
    "model",
    "weights",
    "start",
    "layer",
    "data",
    "preprocess",
    "example",
    "parts",
    "labelled",
    "exit",
    "length",
)


def example_of(method: Method, settings: Settings) -> Any:
    """A few rows to cut on: those of the method, or else calibration rows."""
    source = rows(method.example or settings.calibration)
    return source.take_x(np.arange(min(EXAMPLE, len(source))))


def free_of(method: Method, settings: Settings) -> tuple[str, ...]:
    """The inputs whose length of text is free. Raises InvalidArgument for an unknown name."""
    if method.length is None or method.static or method.members:
        return ()
    return texts_of(as_inputs(example_of(method, settings)), words(method.length) or ())


def places_of(
    method: Method,
    settings: Settings,
    folder: Path,
    model: Callable[[], nn.Module],
    preprocess: nn.Module | None,
    begun: object = None,
) -> tuple[tuple[str, ...] | None, SeenRows | None]:
    """The modules to cut after, and the rows that helped to choose them.

    Args:
        method: whose networks are cut.
        settings: of the comparison.
        folder: of the files of places.
        model: makes the model of the first seed, on which places are measured.
        preprocess: of the model.
        begun: the flags of the method that this one starts from, as plain data.

    Returns:
        The names of the modules, or None for cuts into even parts; and the labelled rows, or None
        if there were none.

    Raises:
        OfframpError: as `cut` does.
    """
    if not method.auto:
        return method.cuts or None, None
    flags = method.flags(method.seeds[0])
    asked = {key: flags[key] for key in (*ASKED, "seed")}
    if begun is not None:
        asked["of"] = begun
    if not method.layer:  # files of methods that convert nothing keep their names
        del asked["layer"], asked["data"]
    file = folder / f"{checksum(asked)}.json"
    if not file.exists():
        example = as_inputs(example_of(method, settings))
        free = free_of(method, settings)
        most = None
        if method.parts is not None:
            most = method.parts - 1  # cuts
        places = placed(
            model(), preprocess, example, method.labelled, exits=method.exit, length=free, most=most
        )
        record = {"asked": asked, "names": list(places.names), "seen": places.seen.to_json()}
        write_json(file, KIND, SCHEMA, record)
    body = read_json(file, KIND, SCHEMA)[1]
    return tuple(body["names"]), SeenRows.from_json(body["seen"])
