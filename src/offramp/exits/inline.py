"""Exits that read the one before through a small learned block: inline subnetwork collaboration.

Li, Zhang, Qi, Yang and Huang, Improved Techniques for Training Adaptive Deep Networks (IMTA), 2019,
arXiv 1908.06294; as in the authors' code. The recipe `imta` makes them of exits that end in a
linear layer, and trains them. Shapes: B samples, F input features of an exit's last layer, C
classes.
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

    f [B, F] is the input of another exit's last layer. k is as wide as f, is computed from the
    logits [B, C] of the exit before, and its norm is a batch norm. The first exit has no k.
    Gradients flow back through z_before, as in the authors' code: an exit also learns to be useful
    to the next one. According to secondary sources the paper stops them there; we had no copy of
    it.

    Args:
        exit: the exit that computes f. It is copied, and its last linear layer is left out.
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
        reads = list(exit.reads)
        width = self.features  # of the linear layer's input
        self.block: nn.Sequential | None = None
        if before is not None:
            reads = [before, *reads]
            width = 2 * self.features
            dense = nn.Linear(self.classes, self.features)
            self.block = nn.Sequential(dense, nn.BatchNorm1d(self.features), nn.ReLU())
        self.reads = tuple(dict.fromkeys(reads))  # each once, in order
        self.linear = nn.Linear(width, self.classes)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]. Raises BadNetwork if the exit before has another number of classes."""
        features = self.exit(seen)
        if self.block is not None and self.before is not None:
            earlier = seen.logits[self.before]
            if earlier.shape[1:] != (self.classes,):
                raise BadNetwork(
                    f"exit {self.before!r} must hand on the logits of {self.classes} classes, "
                    f"got rows of shape {tuple(earlier.shape[1:])}"
                )
            if self.detach:
                earlier = earlier.detach()
            features = torch.cat([features, self.block(earlier)], 1)  # [B, F] -> [B, 2 F]
        logits: Tensor = self.linear(features)
        return logits

    def config(self) -> dict[str, Any]:
        """Name, the exit within, the one before, and whether gradients stop there."""
        config: dict[str, Any] = {
            "name": "Inline",
            "exit": self.exit.config(),
            "before": self.before,
        }
        if self.detach:
            config["detach"] = True
        return config


def parted(exit_: Exit) -> tuple[Exit, nn.Linear]:
    """An exit in two parts: everything before its last linear layer, and that layer.

    Args:
        exit_: any exit with a linear layer.

    Returns:
        A copy of the exit whose output is the last layer's input [B, F], and a copy of that layer.

    Raises:
        BadNetwork: the exit has no linear layer.
    """
    body = copy.deepcopy(exit_)
    linear = list[tuple[str, nn.Linear]]()
    for name, module in body.named_modules():
        if isinstance(module, nn.Linear):
            linear.append((name, module))
    if not linear:
        kind = type(exit_).__name__
        raise BadNetwork(f"the exit must end in a linear layer, got a {kind} without one")
    name, last = linear[-1]
    # Put an identity in its place: the attribute `key` of the module `parent`.
    parent, _, key = name.rpartition(".")
    setattr(body.get_submodule(parent), key, nn.Identity())
    return body, last
