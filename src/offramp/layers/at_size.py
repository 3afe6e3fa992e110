"""A resize of all images to one size, in front of a model that runs at a lower resolution."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = ["AtSize"]


class AtSize(nn.Module):
    """Images [B, C, H, W] -> [B, C, *size], bilinear and antialiased. Images of that size are not
    changed.

    Args:
        size: height and width, or one number for both.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        super().__init__()
        if isinstance(size, int):
            self.size = (size, size)
        else:
            self.size = (int(size[0]), int(size[1]))

    def forward(self, x: Tensor) -> Tensor:
        """Floats [B, C, H, W] -> [B, C, *size]."""
        if tuple(x.shape[2:]) == self.size:
            return x
        return interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)

    def extra_repr(self) -> str:
        """The size, for print."""
        return f"{self.size[0]} x {self.size[1]}"
