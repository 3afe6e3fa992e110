"""The heads of Be Your Own Teacher (Zhang, Song, Gao, Chen, Bao and Ma, 2019, arXiv 1905.08094),
for `distill`.

`attentive` is the head of the journal version, as in the authors' code; `bottleneck` is that of the
conference version, as others rebuilt it and as a class that this code does not use has it. Both
bring features down to about 4x4, with as many times more channels as there are pixels less per
side: on a ResNet for 32x32 images all heads end 512 wide. Where we differ: the number of steps
follows from the size of the features, where the code spells it out for its networks; masks are
resized to the features, which is the same where sides are even; and the mean is over all positions
that are left.
Shapes: B samples, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from offramp.errors import BadNetwork
from offramp.networks.nodes import Exit, Seen

__all__ = ["Attentive", "Squeezed", "attentive", "bottleneck"]

LEFT = 4  # pixels of a side at the end


class Attentive(Exit):
    """A mask in [0.5, 1) times the features, separable convolutions that halve them, the mean, a
    linear layer.

    mask = sigmoid(resized(ReLU(BN(S(x))))), where S is a pair of separable convolutions of which
    the first has stride 2 and which end in a batch norm and a ReLU of their own: the authors' mask
    has two of each in a row.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        steps: how often the features are halved, each time with twice as many channels. None brings
            the shorter side to about 4, at least once.
        normed: whether the mask has its second batch norm and ReLU. False is the form of files that
            the first edition wrote, which lacked them.
    """

    FIRST_EDITION: ClassVar[Mapping[str, Any]] = {"normed": False}

    def __init__(
        self, shape: Sequence[int], classes: int, steps: int | None = None, *, normed: bool = True
    ) -> None:
        super().__init__()
        self.shape = _images(shape)
        self.classes = int(classes)
        self.normed = bool(normed)
        channels = self.shape[0]
        if steps is None:
            self.steps = max(1, (min(self.shape[1:]) // LEFT).bit_length() - 1)
        else:
            self.steps = int(steps)
        second = (nn.BatchNorm2d(channels), nn.ReLU()) if self.normed else ()
        self.mask = nn.Sequential(*_separable(channels, channels), *second)
        self.layers = nn.Sequential(
            *(_separable(channels << step, channels << step + 1) for step in range(self.steps))
        )
        self.linear = nn.Linear(channels << self.steps, self.classes)

    def feature(self, features: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, F]: what the linear layer reads, and `distill` compares."""
        mask = nn.functional.interpolate(
            self.mask(features), features.shape[2:], mode="bilinear"
        ).sigmoid()
        found: Tensor = self.layers(mask * features).mean((2, 3))
        return found

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.feature(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes, steps, and `normed` where it is set: files of the first edition keep
        their fingerprint.
        """
        sizes = {"shape": list(self.shape), "classes": self.classes, "steps": self.steps}
        return {"name": "Attentive", **sizes, **({"normed": True} if self.normed else {})}


class Squeezed(Exit):
    """Convolutions 1x1 to `width` channels, k x k with stride k, 1x1 to k times the channels; the
    mean, a linear layer.

    shape: of one row's features, [channels, H, W]. k is a quarter of the shorter side. Batch norm
    and ReLU follow each convolution.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128) -> None:
        super().__init__()
        self.shape = _images(shape)
        self.classes = int(classes)
        self.width = int(width)
        channels = self.shape[0]
        kernel = max(1, min(self.shape[1:]) // LEFT)
        self.layers = nn.Sequential(
            *_unit(nn.Conv2d(channels, self.width, 1)),
            *_unit(nn.Conv2d(self.width, self.width, kernel, kernel)),
            *_unit(nn.Conv2d(self.width, channels * kernel, 1)),
        )
        self.linear = nn.Linear(channels * kernel, self.classes)

    def feature(self, features: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, F]: what the linear layer reads, and `distill` compares."""
        found: Tensor = self.layers(features).mean((2, 3))
        return found

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.feature(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes and width."""
        return {
            "name": "Squeezed",
            "shape": list(self.shape),
            "classes": self.classes,
            "width": self.width,
        }


def attentive(shape: Sequence[int], classes: int) -> Attentive:
    """The head of the journal version, down to about 4x4."""
    return Attentive(shape, classes)


def bottleneck(shape: Sequence[int], classes: int) -> Squeezed:
    """The head of the conference version: 128 channels between."""
    return Squeezed(shape, classes)


def _images(shape: Sequence[int]) -> tuple[int, ...]:
    if len(shape) != 3:
        raise BadNetwork(
            f"this head needs features of shape [C, H, W], got {tuple(shape)}. Use linear_grid"
        )
    return tuple(shape)


def _unit(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]


def _separable(width_in: int, width: int) -> nn.Sequential:
    """Two separable 3x3 convolutions, the first with stride 2, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for stride, out in ((2, width_in), (1, width)):
        layers += [nn.Conv2d(width_in, width_in, 3, stride, padding=1, groups=width_in, bias=False)]
        layers += _unit(nn.Conv2d(width_in, out, 1, bias=False))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers)
