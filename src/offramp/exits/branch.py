"""BranchyNet's convolutional side branches (Teerapittayanon et al., 2016, arXiv 1709.01686)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.layers._units import chainer_start
from offramp.networks.nodes import Exit, Seen

__all__ = ["Branch", "b_lenet", "branch"]


class Branch(Exit):
    """3x3 convolutions with ReLU, each halving height and width by a ceil-mode pooling, then one
    linear layer.

    Ceil mode is that of the authors' code (Chainer's cover_all). shape: of one row's features,
    [channels, H, W]. The paper gives early branches more layers and late ones fewer; `widths` has
    one entry per convolution. `raw` is for taps before an activation, where the authors' code has
    them: a pooling and a ReLU come first.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (32,),
        *,
        raw: bool = False,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise BadNetwork(
                f"a convolutional branch needs features of shape [C, H, W], got {tuple(shape)}"
            )
        self.shape = tuple(shape)
        self.classes = int(classes)
        self.widths = tuple(widths)
        self.raw = bool(raw)
        layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()] if raw else []
        for width_in, width in zip((shape[0], *widths[:-1]), widths, strict=True):
            layers += [
                nn.Conv2d(width_in, width, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            features = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.linear = nn.Linear(features, self.classes)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.convolutions(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes, widths, and `raw` where it is set."""
        config = {"shape": list(self.shape), "classes": self.classes, "widths": list(self.widths)}
        return {"name": "Branch", **config, **({"raw": True} if self.raw else {})}


def branch(shape: Sequence[int], classes: int) -> Branch:
    """One convolution of 32 channels."""
    return Branch(shape, classes)


def b_lenet(shape: Sequence[int], classes: int) -> Branch:
    """Branch 1 of B-LeNet, for the tap `conv1` of `lenet`: pooling and ReLU, then one convolution
    of 10 channels.

    Its weights start by LeCun's rule, as in the authors' code.
    """
    made = Branch(shape, classes, (10,), raw=True)
    chainer_start(made)
    return made
