"""A gate that sees its logits divided by a temperature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgument
from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Tempered"]


class Tempered(Gate):
    """Wraps any gate; temperature > 1 softens (Guo et al., 2017, arXiv 1706.04599).

    A temperature changes neither an answer nor the order of margins; it does change that of
    max_prob and neg_entropy, and it lets several exits share one threshold.
    """

    def __init__(self, gate: Gate, temperature: float) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise InvalidArgument(f"temperature is {temperature}, expected a finite number above 0")
        self.gate = gate
        self.reads = gate.reads
        self.temperature = float(temperature)

    @staticmethod
    def fitted(gate: Gate, logits: Tensor, labels: Tensor) -> Tempered:
        """The gate at the temperature with the smallest cross-entropy on held-out logits [N, C] and
        labels [N].
        """
        return Tempered(gate, _best_temperature(logits, labels))

    def score(self, seen: Seen) -> Tensor:
        """The wrapped gate's score of the divided logits."""
        assert seen.own is not None
        earlier = {name: logits / self.temperature for name, logits in seen.logits.items()}
        return self.gate.score(
            Seen(seen.features, earlier, seen.own / self.temperature, seen.inputs)
        )

    def score_range(self) -> ScoreRange:
        """The wrapped gate's: a temperature moves neither the ends nor where a softmax
        saturates.
        """
        return self.gate.score_range()

    def config(self) -> dict[str, Any]:
        """Name, temperature, and the wrapped gate's configuration."""
        return {"name": "Tempered", "temperature": self.temperature, "gate": self.gate.config()}


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the smallest cross-entropy, by L-BFGS on its logarithm."""
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    wide = logits.detach().double()
    y = labels.long()
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wide / log_t.exp(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log_t.detach().exp())
