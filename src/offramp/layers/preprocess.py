"""What stands before a member: cast, resize, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BadData, InvalidArgument

__all__ = ["Preprocess"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Preprocess(nn.Module):
    """Images [B, C, H, W], uint8 or float, to the normalised float images that a model was trained
    on.

    y = (x / scale - mean) / std, after an antialiased resize to `size` (H, W) if the images differ
    from it. With `short` their shorter side becomes that long, and the middle of `size` is cut out:
    nothing is stretched. With `expects` (H, W), images of another size are refused: for models that
    would run on them, and answer badly. Its constants are no state: a network with preprocessing
    loads the weights of one without.
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
        if interpolation not in INTERPOLATIONS or (
            short is not None and (size is None or short < max(size))
        ):
            raise InvalidArgument(
                f"preprocessing has size={size}, short={short}, interpolation={interpolation!r}, "
                f"expected short >= "
                "size and "
                f"one of {', '.join(INTERPOLATIONS)}; change them"
            )
        self.scale = float(scale)
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.expects = None if expects is None else (int(expects[0]), int(expects[1]))
        self.short = None if short is None else int(short)
        self.interpolation = interpolation
        self.register_buffer(
            "mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> floats of the same shape (or of `size`). Raises BadData for other
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
        high, wide = y.shape[-2:]
        if self.short is not None:
            less = min(high, wide)
            size = self.short * high // less, self.short * wide // less
        if self.interpolation == "nearest":
            y = nn.functional.interpolate(y, size, mode="nearest")
        elif size != (high, wide):
            y = nn.functional.interpolate(
                y, size, mode=self.interpolation, antialias=True, align_corners=False
            )
        if self.short is None or self.size is None:
            return y
        top, left = (round((now - kept) / 2) for now, kept in zip(size, self.size, strict=True))
        return y[..., top : top + self.size[0], left : left + self.size[1]]

    def config(self) -> dict[str, Any]:
        """Plain data from which it is built again."""
        mean, std = (value.flatten().tolist() for value in (self.mean, self.std))
        config = {
            "mean": mean,
            "std": std,
            "scale": self.scale,
            "size": self.size,
            "expects": self.expects,
        }
        config |= {
            "short": self.short,
            "interpolation": None if self.interpolation == "bilinear" else self.interpolation,
        }
        return {
            "name": "Front",
            **{key: value for key, value in config.items() if value is not None},
        }
