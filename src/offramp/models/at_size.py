"""A model of this shelf that resizes its images first."""

from __future__ import annotations

from typing import Any

from torch import nn

from offramp._support.find import shelved
from offramp.layers.at_size import AtSize

__all__ = ["at_size"]


def at_size(model: str = "resnet20", size: int = 32, **arguments: Any) -> nn.Sequential:
    """Make a model that resizes its images first.

    Args:
        model: its name on this shelf.
        size: height and width after the resize.
        arguments: of the model.
    """
    return nn.Sequential(AtSize(size), shelved("models", model)(**arguments))
