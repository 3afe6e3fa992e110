"""The heads of Be Your Own Teacher (Zhang, Song, Gao, Chen, Bao and Ma, 2019, arXiv 1905.08094),
for `distill`.

`attentive` is the head of the journal version, as in the authors' code. `bottleneck` is the head of
the conference version, as in other people's implementations and in an unused class of the authors'
code. Both bring features down to about 4x4, and multiply the channels by the factor that divides
the side: on a ResNet for 32x32 images all heads end 512 wide. Where we differ: the number of steps
follows from the size of the features, while the code writes it out for its networks; masks are
resized to the features, which is the same if sides are even; and the mean is over all remaining
positions.
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

    mask = sigmoid(resized(ReLU(BN(S(x))))). S is a pair of separable convolutions, the first with
    stride 2. S ends in a batch norm and a ReLU itself, so the authors' mask has two of each in a
    row.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        steps: how often the features are halved, each time with twice as many channels. None brings
            the shorter side to about 4, at least once.
        normed: whether the mask has its second batch norm and ReLU. Files of the first edition have
            none and load with False.
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
            # The largest power of 2 that leaves at least LEFT pixels.
            self.steps = max(1, (min(self.shape[1:]) // LEFT).bit_length() - 1)
        else:
            self.steps = int(steps)
        mask: list[nn.Module] = list(_separable(channels, channels))
        if self.normed:
            mask += [nn.BatchNorm2d(channels), nn.ReLU()]
        self.mask = nn.Sequential(*mask)
        # Each step halves the sides and doubles the channels.
        halvings: list[nn.Module] = []
        for _ in range(self.steps):
            halvings.append(_separable(channels, 2 * channels))
            channels = 2 * channels
        self.layers = nn.Sequential(*halvings)
        self.linear = nn.Linear(channels, self.classes)

    def feature(self, features: Tensor) -> Tensor:
        """The linear layer's input, which `distill` compares: [B, channels, H, W] -> [B, F]."""
        small = self.mask(features)  # [B, channels, H / 2, W / 2]
        mask = nn.functional.interpolate(small, features.shape[2:], mode="bilinear").sigmoid()
        pooled: Tensor = self.layers(mask * features).mean((2, 3))
        return pooled

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C]."""
        logits: Tensor = self.linear(self.feature(seen.features))
        return logits

    def config(self) -> dict[str, Any]:
        """Shape, classes, steps, and `normed` if it is set.

        Files of the first edition keep their fingerprint, because it is left out otherwise.
        """
        config = {
            "name": "Attentive",
            "shape": list(self.shape),
            "classes": self.classes,
            "steps": self.steps,
        }
        if self.normed:
            config["normed"] = True
        return config


class Squeezed(Exit):
    """Three convolutions, the mean and a linear layer.

    The convolutions are 1x1 to `width` channels, k x k with stride k, and 1x1 to k times the
    channels, where k is a quarter of the shorter side. Batch norm and ReLU follow each of them.

    Args:
        shape: of one row's features, [channels, H, W].
        classes: C.
        width: channels of the first two convolutions.
    """

    def __init__(self, shape: Sequence[int], classes: int, width: int = 128) -> None:
        super().__init__()
        self.shape = _images(shape)
        self.classes = int(classes)
        self.width = int(width)
        channels = self.shape[0]
        # One convolution with this stride leaves about LEFT pixels of a side.
        kernel = max(1, min(self.shape[1:]) // LEFT)
        self.layers = nn.Sequential(
            *_unit(nn.Conv2d(channels, self.width, 1)),
            *_unit(nn.Conv2d(self.width, self.width, kernel, kernel)),
            *_unit(nn.Conv2d(self.width, channels * kernel, 1)),
        )
        self.linear = nn.Linear(channels * kernel, self.classes)

    def feature(self, features: Tensor) -> Tensor:
        """The linear layer's input, which `distill` compares: [B, channels, H, W] -> [B, F]."""
        pooled: Tensor = self.layers(features).mean((2, 3))
        return pooled

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
    """The head of the conference version, with 128 channels in between."""
    return Squeezed(shape, classes)


def _images(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one row's features. Raises BadNetwork unless it is [C, H, W]."""
    if len(shape) != 3:
        raise BadNetwork(
            f"this head needs features of shape [C, H, W], got {tuple(shape)}. Use linear_grid"
        )
    return tuple(shape)


def _unit(convolution: nn.Conv2d) -> list[nn.Module]:
    """A convolution with batch norm and ReLU."""
    return [convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU()]


def _separable(width_in: int, width: int) -> nn.Sequential:
    """Two separable 3x3 convolutions, the first with stride 2, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for stride, out in ((2, width_in), (1, width)):
        layers += [nn.Conv2d(width_in, width_in, 3, stride, padding=1, groups=width_in, bias=False)]
        layers += _unit(nn.Conv2d(width_in, out, 1, bias=False))
    # The authors' start: He's rule with fan-out.
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers)
