"""JEI-DNN's gate: one linear unit on four numbers that tell how uncertain an exit is.

Regol, Chataoui and Coates, 2024, arXiv 2310.09163. The recipe `objective` teaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.nodes import Gate, Seen

__all__ = ["Uncertainty", "uncertainty"]

NUMBERS = 4


class Uncertainty(Gate):
    """w . u + b, the logit of the probability of leaving here; u are the four numbers of `_uncertainties`.

    The exit's logits are detached, as there: teaching a gate never moves an exit. There a row leaves when a probability
    reaches 1/2; here the logit is the score, and the plan sets the threshold. Where it starts is our choice: at the
    margin of the probabilities less 1/2, so that a gate that nobody taught ranks rows by their margin.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Linear(NUMBERS, 1)
        with torch.no_grad():
            self.unit.weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
            self.unit.bias.fill_(-0.5)

    def score(self, seen: Seen) -> Tensor:
        """The logit [B]."""
        assert seen.own is not None
        logits: Tensor = self.unit(_uncertainties(seen.own.detach()))
        return logits[:, 0]

    def config(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"name": "Uncertainty"}


def _uncertainties(logits: Tensor) -> Tensor:
    """Of p = softmax(logits) [B, C]: maximum, entropy, margin of the two largest, entropy of p^2 renormalised: [B, 4].

    p^2 renormalised is the softmax of twice the logits.
    """
    p = logits.softmax(-1)
    first, second = p.topk(2, dim=-1).values.unbind(-1)
    entropies = [torch.special.entr(each).sum(-1) for each in (p, (2 * logits).softmax(-1))]
    return torch.stack([first, entropies[0], first - second, entropies[1]], 1)


def uncertainty(reads: Sequence[str]) -> Uncertainty:
    """The unit; it looks at its own exit alone."""
    return Uncertainty()
