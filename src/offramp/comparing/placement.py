"""What a method's networks are cut on: the example, inputs of any length, and the places where
exits pay.

<folder>/places/<checksum>.json    names and labelled rows of at = "auto", one for all that ask the
                                   same

Such places rest on times of this machine, which differ from run to run. They are tried once, so
that all seeds have the same exits, methods that differ in their recipe differ in nothing else, and
a run that was stopped can go on.
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
)  # what places depend on


def example_of(method: Method, settings: Settings) -> Any:
    """A few rows to cut on: those of the method, else of the calibration rows."""
    source = rows(method.example or settings.calibration)
    return source.take_x(np.arange(min(EXAMPLE, len(source))))


def free_of(method: Method, settings: Settings) -> tuple[str, ...]:
    """The inputs whose length of text is free. Raises InvalidArgument for names of none."""
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
    """The modules to cut after, and the rows that helped to choose them; None and None for cuts
    into even parts.

    model: makes that of the first seed, on which places are tried; begun: what it was made of by
    another method, as plain data. Raises as `cut` does.
    """
    if not method.auto:
        return method.cuts or None, None
    flags = method.flags(method.seeds[0])
    asked = {key: flags[key] for key in (*ASKED, "seed")} | ({} if begun is None else {"of": begun})
    if not method.layer:  # files of methods that convert nothing keep their names
        del asked["layer"], asked["data"]
    file = folder / f"{checksum(asked)}.json"
    if not file.exists():
        example = as_inputs(example_of(method, settings))
        free = free_of(method, settings)
        most = None if method.parts is None else method.parts - 1
        found = placed(
            model(), preprocess, example, method.labelled, exits=method.exit, length=free, most=most
        )
        told = {"asked": asked, "names": list(found.names), "seen": found.seen.to_json()}
        write_json(file, KIND, SCHEMA, told)
    body = read_json(file, KIND, SCHEMA)[1]
    return tuple(body["names"]), SeenRows.from_json(body["seen"])
