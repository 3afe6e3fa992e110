"""The last exit of Shallow-Deep Networks: where no exit was sure enough, the surest of all
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.networks.nodes import Exit, Seen

__all__ = ["Surest"]


class Surest(Exit):
    """For each row the logits of the exit with the largest softmax probability: the model's own, or
    an earlier one.

    The rule of Kaya, Hong and Dumitras, 2019, arXiv 1810.07052, for rows that reach the end. It
    stands at the model's end and reads all earlier exits (`reads`), so those run even where a plan
    closes their gates. Of equals the deepest answers (our choice). The model's own answer stays in
    the trace, as `answer/backbone`.
    """

    def __init__(self, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits = seen.features
        sure = logits.softmax(-1).amax(-1, keepdim=True)
        for name in reversed(self.reads):
            other = seen.logits[name]
            surer = other.softmax(-1).amax(-1, keepdim=True)
            logits = torch.where(surer > sure, other, logits)
            sure = torch.maximum(surer, sure)
        return logits

    def pool(self, features: Tensor) -> Tensor:
        """Logits [B, C], which are all that it reads."""
        return features

    def config(self) -> dict[str, Any]:
        """Name, and the exits that it reads."""
        return {"name": "Surest", "reads": list(self.reads)}
