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
    """3x3 convolutions with ReLU, each with a pooling that halves height and width, then one linear
    layer.

    Poolings round sizes up, as in the authors' code (Chainer's cover_all). The paper gives early
    branches more layers and late ones fewer.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        widths: channels of each convolution.
        raw: for taps before an activation, as in the authors' code. A pooling and a ReLU come
            first.

    Raises:
        BadNetwork: the features are not images.
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
        layers: list[nn.Module] = []
        if raw:
            layers += [nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()]
        # The channels of each convolution's input are those of the output before it.
        for width_in, width in zip((shape[0], *widths[:-1]), widths, strict=True):
            layers += [
                nn.Conv2d(width_in, width, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        # A trial run counts the features.
        with torch.no_grad():
            features = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.linear = nn.Linear(features, self.classes)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.convolutions(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes, widths, and `raw` if it is set."""
        config = {
            "name": "Branch",
            "shape": list(self.shape),
            "classes": self.classes,
            "widths": list(self.widths),
        }
        if self.raw:
            config["raw"] = True
        return config


def branch(shape: Sequence[int], classes: int) -> Branch:
    """One convolution of 32 channels."""
    return Branch(shape, classes)


def b_lenet(shape: Sequence[int], classes: int) -> Branch:
    """Branch 1 of B-LeNet, for the tap `conv1` of `lenet`: pooling and ReLU, then one convolution
    of 10 channels.

    Its weights start by LeCun's rule, as in the authors' code.
    """
    exit_ = Branch(shape, classes, (10,), raw=True)
    chainer_start(exit_)
    return exit_
