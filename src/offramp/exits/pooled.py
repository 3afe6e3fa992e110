"""Exits on pooled features: one linear layer, or a small MLP.

Shapes: B samples, F pooled features, C classes. `pool` has no parameters, so its output is computed
only once while the backbone is frozen. `classify` has the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from offramp.errors import BadNetwork, InvalidArgument
from offramp.exits._pooling import pooled, require_layout, require_pooling, width
from offramp.networks.nodes import Exit, Seen
from offramp.plans.signature import is_input

__all__ = ["Pooled", "linear", "linear_grid", "linear_masked", "linear_peaks", "mlp"]


class Pooled(Exit):
    """A head on pooled features [B, F]: linear if `hidden` is empty, otherwise an MLP with ReLU.

    Args:
        pool: "mean" is the mean over all positions (F = channels). "grid" is mean, maximum, and
            means over a 4x4 grid (F = 18 channels; on CIFAR ResNet-56 worth 22 points at layer1),
            for signals over four parts (F = 6 channels). "flat" is everything as it is. "peaks" is,
            for signals [B, channels, L], the mean and the maxima of up to 8 equal parts.
        features: F.
        classes: C.
        hidden: widths of the hidden layers.
        mask: an input [B, T], such as "x/attention_mask"; "mean" is then over the positions of text
            [B, T, F] where it is not zero. The values at other positions do not matter.
        layout: where the channels are: "channels_first", "channels_last" or "both"; `cut` reads it
            from the model. None means last of three dimensions and first of more.
        temperature: the divisor of an MLP's logits, in training and in use. 0.5 is the sharpened
            dense cache model of layer caching (SelfXit, arXiv 2209.08625).

    Raises:
        InvalidArgument: the temperature is not above 0, or not 1 without hidden layers; the pool or
            layout is unknown; or there is a mask with another pool than "mean".
    """

    def __init__(
        self,
        pool: str,
        features: int,
        classes: int,
        hidden: Sequence[int] = (),
        mask: str | None = None,
        layout: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf or (temperature != 1 and not hidden):
            raise InvalidArgument(
                f"temperature must be a number above 0, and 1 without hidden layers, got "
                f"{temperature}"
            )
        self.temperature = float(temperature)
        require_pooling(pool, "pool")
        require_layout(layout)
        self.layout = layout
        if mask is not None and (pool != "mean" or not is_input(mask)):
            raise InvalidArgument(
                "a mask needs pool 'mean' and the name of an input (x/...), got pool "
                f"{pool!r} and mask {mask!r}"
            )
        self.pooling = pool
        self.features = int(features)
        self.classes = int(classes)
        self.hidden = tuple(hidden)
        self.mask = mask
        self.reads: tuple[str, ...] = ()
        if mask is not None:
            self.reads = (mask,)
        # Hidden layers have a ReLU each; the last layer gives the logits.
        widths = (self.features, *self.hidden)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], self.classes))

    def pool(self, features: Tensor, inputs: Mapping[str, Tensor] | None = None) -> Tensor:
        """[B, channels, ...] -> [B, F]; with a mask [B, T] among the inputs of text [B, T, F]."""
        if self.mask is None or features.dim() == 2:
            return pooled(features, self.pooling, self.layout)
        return _masked_mean(features, (inputs or {})[self.mask])

    def classify(self, features: Tensor) -> Tensor:
        """[B, F] -> logits [B, C]."""
        logits: Tensor = self.head(features)
        if self.temperature == 1:
            return logits
        return logits / self.temperature

    def forward(self, seen: Seen) -> Tensor:
        """Logits [B, C] of the tapped features."""
        return self.classify(self.pool(seen.features, seen.inputs))

    def config(self) -> dict[str, Any]:
        """Pool, widths and classes."""
        config: dict[str, Any] = {
            "name": "Pooled",
            "pool": self.pooling,
            "features": self.features,
            "classes": self.classes,
        }
        # Files of earlier editions keep their fingerprint, because defaults are left out.
        if self.hidden:
            config["hidden"] = list(self.hidden)
        if self.mask is not None:
            config["mask"] = self.mask
        if self.layout is not None:
            config["layout"] = self.layout
        if self.temperature != 1:
            config["temperature"] = self.temperature
        return config


def _masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Features [B, T, F] -> [B, F]. NaN at a masked position changes nothing."""
    if features.dim() != 3 or mask.shape != features.shape[:2]:
        raise BadNetwork(
            "mask and features must have shapes [B, T] and [B, T, F], got "
            f"{tuple(mask.shape)} and {tuple(features.shape)}. Pool these features without a mask"
        )
    is_kept = mask != 0  # [B, T]
    total = features.masked_fill(~is_kept[:, :, None], 0).sum(1)  # [B, F]
    count = is_kept.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    return total / count


def linear_masked(shape: Sequence[int], classes: int, mask: str = "x/attention_mask") -> Pooled:
    """A linear exit on the mean over the unmasked words of a text [T, F]."""
    if len(shape) != 2:
        raise BadNetwork(
            f"a mask over words needs features of shape [T, F], got {tuple(shape)}. Cut elsewhere"
        )
    return Pooled("mean", shape[1], classes, mask=mask)


def linear(shape: Sequence[int], classes: int, layout: str | None = None) -> Pooled:
    """A linear exit on the mean over positions; `shape` is that of one row's features."""
    return _linear("mean", shape, classes, layout=layout)


def linear_grid(shape: Sequence[int], classes: int, layout: str | None = None) -> Pooled:
    """A linear exit on mean, maximum and a 4x4 grid of means."""
    return _linear("grid", shape, classes, layout=layout)


def linear_peaks(shape: Sequence[int], classes: int) -> Pooled:
    """A linear exit for signals [channels, L]: on the mean and on the maxima of up to 8 equal
    parts.
    """
    return _linear("peaks", shape, classes)


def mlp(
    shape: Sequence[int], classes: int, layout: str | None = None, temperature: float = 1.0
) -> Pooled:
    """One hidden layer of 128 units on mean, maximum and grid; `mlp?temperature=0.5` is
    sharpened.
    """
    return Pooled(
        "grid",
        width(shape, "grid", layout),
        classes,
        (128,),
        layout=layout,
        temperature=temperature,
    )


def _linear(
    pool: str,
    shape: Sequence[int],
    classes: int,
    hidden: Sequence[int] = (),
    layout: str | None = None,
) -> Pooled:
    """An exit whose width follows from the pooling."""
    return Pooled(pool, width(shape, pool, layout), classes, hidden, layout=layout)
