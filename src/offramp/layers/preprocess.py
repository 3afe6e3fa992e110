"""The preprocessing in front of a model: cast, resize, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadData, InvalidArgument

__all__ = ["Preprocess"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Preprocess(nn.Module):
    """Turn images [B, C, H, W], uint8 or float, into the normalised floats that a model was trained
    on: y = (x / scale - mean) / std, after an optional resize.

    The constants are not in the state dict, so a network with preprocessing loads the weights of a
    network without.

    Args:
        mean: of each channel, or one for all, after the division by `scale`.
        std: of each channel, or one for all.
        scale: divisor of the pixels; 255 for bytes.
        size: (H, W). Images of another size are resized to it, antialiased.
        expects: (H, W). Images of another size are refused, for models that would run on them but
            answer badly.
        short: the shorter side is resized to this length, and the middle of `size` is cut out, so
            that nothing is stretched.
        interpolation: nearest, bilinear or bicubic.

    Raises:
        InvalidArgument: `interpolation` is another one, or `short` does not fit `size`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        scale: float = 255.0,
        size: tuple[int, int] | None = None,
        expects: tuple[int, int] | None = None,
        short: int | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        if interpolation not in INTERPOLATIONS:
            raise InvalidArgument(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}"
            )
        if short is not None and size is None:
            raise InvalidArgument(f"short must come with size, got short={short} alone")
        if short is not None and size is not None and short < max(size):
            raise InvalidArgument(
                f"short must be at least {max(size)}, the longer side of size, got {short}"
            )
        self.scale = float(scale)
        self.size = _pair(size)
        self.expects = _pair(expects)
        self.short = None if short is None else int(short)
        self.interpolation = interpolation
        # [C, 1, 1], or [1, 1, 1] for all channels
        mean_tensor = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        std_tensor = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("mean", mean_tensor, persistent=False)
        self.register_buffer("std", std_tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> floats [B, C, H, W], or [B, C, *size]. Raises BadData for other
        shapes.
        """
        channels = self.mean.shape[0]
        if x.dim() != 4 or channels not in (1, x.shape[1]):
            raise BadData(f"images must be [B, {channels}, H, W], got {tuple(x.shape)}")
        if self.expects is not None and tuple(x.shape[-2:]) != self.expects:
            got = "x".join(map(str, x.shape[-2:]))
            want = "x".join(map(str, self.expects))
            spec = f"imagefolder:DIR?resize={max(self.expects)}&crop={want}"
            raise BadData(
                f"images must be {want}, got {got}. Resize them ({spec}), or use a Preprocess "
                "with size="
            )
        y = x.to(self.mean.dtype)
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            y = self._resized(y, self.size)
            if self.interpolation == "bicubic" and not x.is_floating_point():
                y = y.clamp(0, 255)  # a cubic overshoots at edges; bytes cannot
        return (y / self.scale - self.mean) / self.std

    def _resized(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Floats [B, C, H, W] -> [B, C, *size]."""
        height, width = y.shape[-2:]
        if self.short is not None:  # the shorter side becomes `short`, and the ratio stays
            shorter = min(height, width)
            size = self.short * height // shorter, self.short * width // shorter
        if self.interpolation == "nearest":
            y = nn.functional.interpolate(y, size, mode="nearest")
        elif size != (height, width):
            y = nn.functional.interpolate(
                y, size, mode=self.interpolation, antialias=True, align_corners=False
            )
        if self.short is None or self.size is None:
            return y
        # cut out the middle
        top = round((size[0] - self.size[0]) / 2)
        left = round((size[1] - self.size[1]) / 2)
        return y[..., top : top + self.size[0], left : left + self.size[1]]

    def config(self) -> dict[str, Any]:
        """Plain data from which the preprocessing can be built again."""
        config: dict[str, Any] = {
            "name": "Front",  # the name of this class in the files of the first version
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "scale": self.scale,
        }
        # defaults are left out
        for name in ("size", "expects", "short"):
            value = getattr(self, name)
            if value is not None:
                config[name] = value
        if self.interpolation != "bilinear":
            config["interpolation"] = self.interpolation
        return config


def _pair(size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width as Python's own numbers."""
    if size is None:
        return None
    return int(size[0]), int(size[1])
