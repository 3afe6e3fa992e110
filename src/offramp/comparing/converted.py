"""The models of methods with `layer`: converted, with weights of another model's name or of another
method.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from offramp._support.arguments import pairs
from offramp.building.converting import conversions_of, convert, spec_with, split_spec
from offramp.building.factories import make_model
from offramp.comparing.placement import example_of
from offramp.comparing.settings import Method, Settings
from offramp.data.rows import proposing, rows
from offramp.errors import BadData, InvalidArgument

LABELLED = 256  # rows for methods that use gradients or features


def converted(
    model: nn.Module, method: Method, settings: Settings, preprocess: nn.Module | None
) -> nn.Module:
    """Make a copy of a model with the cheaper layers of a method.

    Args:
        model: the model before.
        method: its `layer` says what is replaced by what, its `data` names labelled rows for that.
        settings: whose calibration rows are the example, if the method names none.
        preprocess: of the model.

    Returns:
        The copy; the model itself if the method replaces nothing.

    Raises:
        OfframpError: whatever `convert` raises.
    """
    if not method.layer:
        return model
    example = _prepared(torch.as_tensor(_one(example_of(method, settings))), preprocess)
    data = None
    if method.data is not None:
        with proposing([preprocess]):
            source = rows(method.data)
        batch = next(iter(source.batches(LABELLED)))
        if batch.y is None:
            raise BadData(f"data must have labels, got none in {method.data}")
        x = _prepared(torch.as_tensor(_one(batch.x)), preprocess)
        data = (x, torch.as_tensor(batch.y))
    return convert(model, pairs(method.layer, "layer"), example=example, data=data).eval()


def spec_of(model: nn.Module, spec: str) -> str | None:
    """The name of a model that may be converted; None where layers are the user's own.

    Args:
        model: the model.
        spec: the name of the model before.
    """
    base = split_spec(spec)[0]
    try:
        return spec_with(base, conversions_of(model, make_model(base, fetch=False)))
    except InvalidArgument:
        return None


def _one(x: Any) -> np.ndarray[Any, Any]:
    """The only input of some rows."""
    if isinstance(x, dict):
        raise BadData(f"layer converts models of one input, got rows with {', '.join(sorted(x))}")
    return np.asarray(x)


def _prepared(x: torch.Tensor, preprocess: nn.Module | None) -> torch.Tensor:
    """The model's input of some rows."""
    if preprocess is None:
        return x
    with torch.no_grad():
        made: torch.Tensor = preprocess(x)
    return made
