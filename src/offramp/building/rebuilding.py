"""Build networks again whose segments are pieces of one model: those of `cut(..., skip=)` and of
`unrolled`.

Such a network remembers the text that names the model and how it was taken apart, so that a saved
network needs no code of its user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from offramp.building.skipping import skippable
from offramp.building.unrolling import unrolled
from offramp.errors import BadFile
from offramp.networks.members import SKIP, UNROLLED, WholeModel


def pieces_of(
    whole: WholeModel, model: nn.Module, example: Any, preprocess: nn.Module | None
) -> dict[str, nn.Module]:
    """The segments of a network by name, made from its model once more.

    Args:
        whole: how the model was taken apart.
        model: with any weights.
        example: a small batch of rows.
        preprocess: the preprocessing of the model.

    Returns:
        The segments, with the weights of the model.
    """
    if whole.way == SKIP:
        network = skippable(model, example, whole.units, preprocess=preprocess)
    elif whole.way == UNROLLED:
        network = unrolled(model, example, preprocess=preprocess)
    else:
        raise BadFile(f"the way of a model must be {SKIP} or {UNROLLED}, got {whole.way!r}")
    return {member.name: network.model_of(member) for member in network.members}


def whole_from_json(body: Mapping[str, Any]) -> WholeModel:
    """The model of a network from plain data."""
    spec = body["spec"]
    units = tuple(map(str, body["units"]))
    return WholeModel(None if spec is None else str(spec), str(body["way"]), units)
