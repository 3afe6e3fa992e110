"""Exits that read the one before through a small learned block: inline subnetwork collaboration.

Li, Zhang, Qi, Yang and Huang, Improved Techniques for Training Adaptive Deep Networks (IMTA), 2019,
arXiv 1908.06294; as in the authors' code. The recipe `imta` hangs them on a network whose exits end
in a linear layer, and trains them. Shapes: B samples, F features that the last layer of an exit
reads, C classes.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.nodes import Exit, Seen

__all__ = ["Inline"]


class Inline(Exit):
    """Logits linear([f, k]) [B, C], where k = relu(norm(dense(z_before))).

    f [B, F] is what the last layer of another exit reads. k is as wide as f, from the logits [B, C]
    of the exit before, and its norm is a batch norm. The first exit has no k. Gradients flow back
    through z_before, as in the authors' code: an exit also learns to be of use to the next one. By
    other people's notes the paper stops them there; we had no copy of it.

    Args:
        exit: the exit that f is of. It is copied, and its last linear layer is left out.
        before: the name of the exit before.
        detach: stop gradients at z_before.
    """

    def __init__(self, exit: Exit, before: str | None = None, *, detach: bool = False) -> None:
        super().__init__()
        self.exit, last = parted(exit)
        self.before = before
        self.features = last.in_features
        self.classes = last.out_features
        self.detach = bool(detach)
        self.reads = tuple(dict.fromkeys((*(() if before is None else (before,)), *exit.reads)))
        self.block: nn.Sequential | None = None
        if before is not None:
            dense = nn.Linear(self.classes, self.features)
            self.block = nn.Sequential(dense, nn.BatchNorm1d(self.features), nn.ReLU())
        self.linear = nn.Linear(self.features * (1 if before is None else 2), self.classes)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]. Raises BadNetwork where the exit before has another number of classes."""
        features = self.exit(seen)
        if self.block is not None and self.before is not None:
            earlier = seen.logits[self.before]
            if earlier.shape[1:] != (self.classes,):
                raise BadNetwork(
                    f"exit {self.before!r} must hand on the logits of {self.classes} classes, "
                    f"got rows of shape {tuple(earlier.shape[1:])}"
                )
            known = self.block(earlier.detach() if self.detach else earlier)
            features = torch.cat([features, known], 1)  # [B, 2 F]
        logits: Tensor = self.linear(features)
        return logits

    def config(self) -> dict[str, Any]:
        """Name, the exit within, the one before, and whether gradients stop there."""
        detach = {"detach": True} if self.detach else {}
        return {"name": "Inline", "exit": self.exit.config(), "before": self.before, **detach}


def parted(exit_: Exit) -> tuple[Exit, nn.Linear]:
    """A copy of an exit that gives what its last linear layer reads, [B, F], and that layer.

    Raises BadNetwork for an exit without a linear layer.
    """
    body = copy.deepcopy(exit_)
    found = [(name, part) for name, part in body.named_modules() if isinstance(part, nn.Linear)]
    if not found:
        kind = type(exit_).__name__
        raise BadNetwork(f"the exit must end in a linear layer, got a {kind} without one")
    name, last = found[-1]
    parent, _, key = name.rpartition(".")
    setattr(body.get_submodule(parent), key, nn.Identity())
    return body, last
