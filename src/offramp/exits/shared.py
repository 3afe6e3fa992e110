"""An exit that is one of the model's own layers, which answers at several nodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.networks.nodes import Exit, Seen

__all__ = ["Shared"]


class Shared(Exit):
    """Answers with a module of the model, such as its head; that module is shared and not copied.

    It is given again where a saved network is loaded.
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
