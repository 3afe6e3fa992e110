"""A small network that rates the ways of a fork: the control node of routed networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.nodes import Chooser, Seen

__all__ = ["Controller", "controller"]


class Controller(Chooser):
    """The mean over all positions, a hidden layer with a ReLU, and a rating for each way.

    Args:
        channels: of the features at the fork, [B, channels] or [B, channels, ...].
        choices: number of ways.
        width: of the hidden layer.
    """

    def __init__(self, channels: int, choices: int, width: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.choices = choices
        self.width = width
        self.hidden = nn.Linear(channels, width)
        self.rates = nn.Linear(width, choices)

    def ratings(self, seen: Seen) -> Tensor:
        """Features [B, channels, ...] -> ratings [B, choices]."""
        pooled = seen.features.float()
        if pooled.dim() > 2:
            pooled = pooled.flatten(2).mean(2)  # [B, C, ...] -> [B, C]
        rated: Tensor = self.rates(self.hidden(pooled).relu())
        return rated

    def config(self) -> dict[str, Any]:
        """The name and the sizes."""
        return {
            "name": "Controller",
            "channels": self.channels,
            "choices": self.choices,
            "width": self.width,
        }


def controller(shape: tuple[int, ...], choices: int, *, width: int = 32) -> Controller:
    """Make a controller for features of a shape.

    Args:
        shape: of one row.
        choices: number of ways.
        width: of the hidden layer.

    Raises:
        BadNetwork: a row is a single number.
    """
    if not shape:
        raise BadNetwork(
            "features must be [B, C] or [B, C, ...] for a controller, got one number a row"
        )
    return Controller(shape[0], choices, width)
