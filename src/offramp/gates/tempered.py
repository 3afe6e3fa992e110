"""A gate that divides its logits by a temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp._support.arguments import require
from offramp.networks.nodes import Gate, Seen
from offramp.plans.scores import ScoreRange

__all__ = ["Tempered"]


class Tempered(Gate):
    """Wraps any gate; a temperature above 1 softens the logits (Guo et al., 2017, arXiv
    1706.04599).

    A temperature changes neither answers nor the order of margins. It changes the order of max_prob
    and neg_entropy, and it lets several exits share one threshold.

    Args:
        gate: the wrapped gate.
        temperature: the divisor, above 0.

    Raises:
        InvalidArgument: the temperature is not a finite number above 0.
    """

    def __init__(self, gate: Gate, temperature: float) -> None:
        super().__init__()
        self.gate = gate
        self.reads = gate.reads
        self.temperature = require("temperature", temperature, above=0)

    @staticmethod
    def fitted(gate: Gate, logits: Tensor, labels: Tensor) -> Tempered:
        """Wrap a gate with the temperature that has the smallest cross-entropy on held-out rows.

        Args:
            gate: the gate.
            logits: of an exit, [N, C].
            labels: [N].
        """
        return Tempered(gate, _best_temperature(logits, labels))

    def score(self, seen: Seen) -> Tensor:
        """The wrapped gate's score of the divided logits, [B]."""
        assert seen.own is not None
        earlier = {name: logits / self.temperature for name, logits in seen.logits.items()}
        return self.gate.score(
            Seen(seen.features, earlier, seen.own / self.temperature, seen.inputs)
        )

    def score_range(self) -> ScoreRange:
        """The wrapped gate's range. A temperature moves neither its ends nor the scores at which a
        softmax saturates.
        """
        return self.gate.score_range()

    def config(self) -> dict[str, Any]:
        """The name, the temperature, and the wrapped gate's configuration."""
        return {"name": "Tempered", "temperature": self.temperature, "gate": self.gate.config()}


def _best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the smallest cross-entropy, by L-BFGS on its logarithm."""
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    double_logits = logits.detach().double()
    y = labels.long()
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(double_logits / log_t.exp(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log_t.detach().exp())
