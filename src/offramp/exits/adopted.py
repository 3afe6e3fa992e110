"""An exit that the user's network was trained with: one of its own modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.nodes import Exit, Seen
from offramp.networks.taps import logits_in

__all__ = ["Adopted"]


class Adopted(Exit):
    """A trained head of the user's model. It is shared with the model and never copied.

    Args:
        module: the name of the head in the model, for example `heads.0`. A network finds the head
            there when it is made.
    """

    head: nn.Module | None

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module
        self.head = None  # until `belong_to`

    def belong_to(self, model: nn.Module) -> None:
        """Find the head in the model. Raises BadNetwork if the model has no module of this name."""
        head = dict(model.named_modules(remove_duplicate=False)).get(self.module)
        if head is None:
            raise BadNetwork(
                f"the model has no module {self.module!r}, which is one of its exits. Give "
                "the model that was adopted"
            )
        self.head = head

    def forward(self, seen: Seen) -> Tensor:
        """The head's logits [B, C] of the tapped features."""
        if self.head is None:
            raise BadNetwork(
                f"the exit {self.module!r} belongs to no model yet; use off.adopt or off.cut"
            )
        logits: Tensor = logits_in(self.head(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Its name, and that of the head in the model."""
        return {"name": "Adopted", "module": self.module}
