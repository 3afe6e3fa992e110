"""An exit that adds its logits to those of the exit before it: the additive model of BoostNet.

Yu, Wang, Hua and Shi, Boosted Dynamic Neural Networks, AAAI 2023, arXiv 2211.16726.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from offramp.errors import BadNetwork
from offramp.networks.nodes import Exit, Seen

__all__ = ["Added"]


class Added(Exit):
    """Logits F_n = f_n + weight F_{n-1} [B, C] of an exit f_n and of the exit `before` it, F_{n-1}.

    Written out, F_n is the sum over k <= n of weight^(n-k) f_k. The gradient of F_{n-1} stops here.
    The same code runs in training and in use. The authors' code has two versions, which differ by
    one exit if weights change from exit to exit.

    Args:
        exit: f_n.
        before: the name of the exit before.
        weight: of its logits.
    """

    def __init__(self, exit: Exit, before: str, weight: float = 0.5) -> None:
        super().__init__()
        self.exit = exit
        self.before = before
        self.weight = float(weight)
        self.reads = tuple(dict.fromkeys((before, *exit.reads)))  # each once, in order

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]. Raises BadNetwork if the two exits differ in their number of classes."""
        own = self.exit(seen)  # f_n, [B, C]
        before = seen.logits[self.before].detach()
        if own.shape[1] != before.shape[1]:
            raise BadNetwork(
                f"an exit and {self.before!r}, to which it adds, must have the same number of "
                f"classes, got {own.shape[1]} and {before.shape[1]}"
            )
        total: Tensor = own + self.weight * before
        return total

    def config(self) -> dict[str, Any]:
        """Name, the exit within, the one before it, and the weight."""
        return {
            "name": "Added",
            "exit": self.exit.config(),
            "before": self.before,
            "weight": self.weight,
        }
