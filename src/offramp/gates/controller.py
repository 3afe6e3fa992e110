"""A small network that rates the ways of a fork: the control node of routed networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.nodes import Chooser, Seen

__all__ = ["Controller", "controller"]


class Controller(Chooser):
    """The mean over all positions, a hidden layer, and a rating for each way.

    Args:
        channels: of the features at the fork, [B, channels] or [B, channels, ...].
        choices: how many ways there are.
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
        """[B, choices]."""
        pooled = seen.features.float()
        if pooled.dim() > 2:
            pooled = pooled.flatten(2).mean(2)  # [B, C, ...] -> [B, C]
        rated: Tensor = self.rates(self.hidden(pooled).relu())
        return rated

    def config(self) -> dict[str, Any]:
        """Name and sizes."""
        return {
            "name": "Controller",
            "channels": self.channels,
            "choices": self.choices,
            "width": self.width,
        }


def controller(shape: tuple[int, ...], choices: int, *, width: int = 32) -> Controller:
    """A controller for features of a shape, without the batch. Raises BadNetwork for a single
    number a row.
    """
    if not shape:
        raise BadNetwork("a controller reads features [B, C] or [B, C, ...], got one number a row")
    return Controller(shape[0], choices, width)
