"""The header of a trace: what its columns are about, and how it is read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from offramp.plans.provenance import FORM, Origin, form_of
from offramp.plans.scores import ScoreRange
from offramp.plans.topology import Topology


@dataclass(frozen=True)
class Header:
    """What the columns of a trace are about.

    Attributes:
        topology: the nodes of the network, and which follow each other.
        reference: the exit or model that the network is compared with.
        classes: C, the number of classes.
        data: what the rows are called, such as "digits[800:1500]".
        data_fingerprint: a digest of the rows.
        origin: the network, engine and precision that computed the columns.
        class_names: names of the classes, or None.
        trained: False while an exit was never trained.
        digest_form: how the digests of the rows were computed, see `SeenRows`.
        scores: what each gate declares about its scores; nothing is known of a gate that is absent.
        noise: by how much the milliseconds of one call varied while they were measured (0.1 is 10
            %). None where nothing was measured, and in traces from before this was recorded.
        settings: the thresholds of the dial, the first +inf; empty where every path was recorded.
    """

    topology: Topology
    reference: str
    classes: int
    data: str
    data_fingerprint: str
    origin: Origin
    class_names: tuple[str, ...] | None = None
    trained: bool = True
    digest_form: int = FORM
    scores: Mapping[str, ScoreRange] = field(default_factory=dict)
    noise: float | None = None
    settings: tuple[float, ...] = ()


def header_from(body: dict[str, Any], path: str) -> Header:
    """The header of a trace, from the fields of its file."""
    names = body["class_names"]
    scores = {}
    for gate, declared in body.get("scores", {}).items():  # absent in traces of the first edition
        scores[gate] = ScoreRange.from_json(declared)
    topology = Topology.from_json(body.pop("chain"))
    trained = body.pop("taught", True)
    fields = {
        **body,
        "topology": topology,
        "trained": trained,
        "origin": Origin.from_json(body["origin"]),
        "class_names": None if names is None else tuple(names),
        "digest_form": form_of(body.get("digest_form", 1), path),
        "settings": _settings_from(body.get("settings", ())),  # absent in older traces
        "scores": scores,
    }
    return Header(**fields)


def _settings_from(values: Sequence[float]) -> tuple[float, ...]:
    """The settings of a dial from a file, which leaves out the first: it closes every gate."""
    if not values:
        return ()
    return (np.inf, *map(float, values))


def require_header(header: Header) -> None:
    """Raise TypeError for a header from a file in which a field has another type."""
    for text in (header.reference, header.data, header.data_fingerprint):
        if not isinstance(text, str):
            raise TypeError("a field of the header is of another type")
    for name in header.class_names or ():
        if not isinstance(name, str):
            raise TypeError("a field of the header is of another type")
    if not isinstance(header.trained, bool):
        raise TypeError("a field of the header is of another type")
    classes = header.classes
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise TypeError(f"classes is {classes!r}")
