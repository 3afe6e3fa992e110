"""The side branches of B-AlexNet and B-ResNet-110, with initial weights as in the authors' code.

Teerapittayanon, McDanel and Kung, 2016, arXiv 1709.01686. The branch of B-LeNet is in
exits/branch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.layers._units import chainer_start
from offramp.layers.lateral import lateral_norm
from offramp.layers.residual import WSCALE, as_first_edition, branchy_block
from offramp.networks.nodes import Exit, Seen

__all__ = [
    "Normed",
    "Residual",
    "b_alexnet",
    "b_alexnet_1",
    "b_alexnet_2",
    "b_resnet",
    "b_resnet_1",
    "b_resnet_2",
]

ROOM = 4  # pixels of a side that two 3x3 poolings of stride 2 need


class Normed(Exit):
    """ReLU, pooling, local response norm; a 3x3 convolution with ReLU per entry of `widths`;
    pooling; a linear layer.

    Poolings are 3x3 with stride 2 and round sizes up, like Chainer's.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        widths: channels of each 3x3 convolution.
        first: channels of a 5x5 convolution before everything else. None leaves it out.
        pool: False leaves both poolings out.

    Raises:
        BadNetwork: the features are not images, or too small for the poolings.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        widths: Sequence[int] = (32,),
        *,
        first: int | None = None,
        pool: bool = True,
    ) -> None:
        super().__init__()
        least = 1
        pooling: list[nn.Module] = []
        if pool:
            least = ROOM
            pooling = [nn.MaxPool2d(3, 2, ceil_mode=True)]
        self.shape = _room(shape, least)
        self.classes = int(classes)
        self.widths = tuple(widths)
        self.first = first
        self.pooling = bool(pool)
        layers: list[nn.Module] = []
        channels = self.shape[0]
        if first is not None:
            layers.append(nn.Conv2d(channels, first, 5, padding=2))
            channels = first
        layers += [nn.ReLU(), *pooling, lateral_norm()]
        for width_in, width in pairwise((channels, *self.widths)):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, *pooling, nn.Flatten())
        # A trial run counts the features.
        with torch.no_grad():
            features = self.layers(torch.zeros(1, *self.shape)).shape[1]
        self.linear = nn.Linear(features, self.classes)
        chainer_start(self)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.layers(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes, widths, the first convolution, and whether it pools."""
        config = {"shape": list(self.shape), "classes": self.classes, "widths": list(self.widths)}
        return {"name": "Normed", **config, "first": self.first, "pool": self.pooling}


class Residual(Exit):
    """Basic blocks with as many channels as the features, then one linear layer on all positions.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        blocks: the number of blocks.
        biased: whether convolutions have biases and batch norms an epsilon of 2e-5, as in the
            authors' code. Files of the first edition load with False.
    """

    FIRST_EDITION: ClassVar[Mapping[str, Any]] = {"biased": False}

    def __init__(
        self, shape: Sequence[int], classes: int, blocks: int = 1, *, biased: bool = True
    ) -> None:
        super().__init__()
        self.shape = _room(shape, 1)
        self.classes = int(classes)
        self.count = int(blocks)
        self.biased = bool(biased)
        channels, height, width = self.shape
        basic = [branchy_block(channels, channels) for _ in range(self.count)]
        self.blocks = nn.Sequential(*basic)
        self.linear = nn.Linear(channels * height * width, self.classes)
        # The scale of the authors' initial weights.
        chainer_start(self, WSCALE)
        if not self.biased:
            as_first_edition(self.blocks)

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.blocks(seen.features).flatten(1))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes, the number of blocks, and `biased` if it is set."""
        config = {
            "name": "Residual",
            "shape": list(self.shape),
            "classes": self.classes,
            "blocks": self.count,
        }
        if self.biased:
            config["biased"] = True
        return config


def b_alexnet(shape: Sequence[int], classes: int, reads: Sequence[str]) -> Normed:
    """B-AlexNet's branch for this place: the first at the first cut of `alexnet` (conv2), the
    second after it (conv3).

    `reads`, the exits before, only determines the place. The branch reads none of them.
    """
    if reads:
        return b_alexnet_2(shape, classes)
    return b_alexnet_1(shape, classes)


def b_alexnet_1(shape: Sequence[int], classes: int, convolutions: int = 2) -> Normed:
    """Branch 1 of B-AlexNet, for the tap `conv2` of `alexnet`: convolutions of 32 channels.

    The paper's Figure 5 varies their number from 0 to 4 (the code has 2). With 0 both poolings
    stay, which is our choice.
    """
    if not isinstance(convolutions, int) or convolutions < 0:
        raise InvalidArgument(
            f"convolutions must be a whole number of at least 0, got {convolutions!r}"
        )
    return Normed(shape, classes, (32,) * convolutions)


def b_alexnet_2(shape: Sequence[int], classes: int) -> Normed:
    """Branch 2 of B-AlexNet, for the tap `conv3` of `alexnet`: one convolution of 32 channels."""
    return Normed(shape, classes)


def b_resnet(shape: Sequence[int], classes: int, reads: Sequence[str]) -> Normed | Residual:
    """B-ResNet-110's branch for this place: the first at the first cut of `resnet110_branchy`
    (stem), the second after it.

    `reads`, the exits before, only determines the place. The branch reads none of them.
    """
    if reads:
        return b_resnet_2(shape, classes)
    return b_resnet_1(shape, classes)


def b_resnet_1(shape: Sequence[int], classes: int) -> Normed:
    """Branch 1 of B-ResNet-110, for the tap `stem`: 5x5 to 64 channels, two 3x3 of 32, no pooling.

    Every row pays for it: 48 M MACs, a fifth of the trunk. If few rows leave there, it costs more
    than it saves.
    """
    return Normed(shape, classes, (32, 32), first=64, pool=False)


def b_resnet_2(shape: Sequence[int], classes: int) -> Residual:
    """Branch 2 of B-ResNet-110, for the tap `layer1`: one basic block."""
    return Residual(shape, classes)


def _room(shape: Sequence[int], least: int) -> tuple[int, ...]:
    """The shape of one row's features. Raises BadNetwork unless it is [C, H, W] with room."""
    if len(shape) != 3 or min(shape[1:]) < least:
        raise BadNetwork(
            f"a branch of BranchyNet needs features of shape [C, H, W] of at least {least} x "
            f"{least}, got {tuple(shape)}. Cut elsewhere, or use linear_grid"
        )
    return tuple(shape)
