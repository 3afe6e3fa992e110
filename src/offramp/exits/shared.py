"""An exit that is one of the model's own layers, used at several nodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.networks.nodes import Exit, Seen

__all__ = ["Shared"]


class Shared(Exit):
    """The output of a module of the model, for example its head.

    The module is shared with the model and not copied. It is handed over again when a saved network
    is loaded.

    Args:
        head: the module, [B, F] -> [B, C].
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, seen: Seen) -> Tensor:
        """Features [B, F] -> logits [B, C]."""
        logits: Tensor = self.head(seen.features)
        return logits

    def config(self) -> dict[str, Any]:
        """The name."""
        return {"name": "Shared"}
