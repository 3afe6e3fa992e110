"""Shifts and mirror images of a batch of images [b, C, H, W], an own draw for every row.

The standard augmentation of CIFAR (Lee et al., 2015, arXiv 1409.5185; He et al., 2016, arXiv
1512.03385).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from offramp.errors import BadData

__all__ = ["crop_flip", "flip"]

BORDER = 4


def flip(x: Tensor) -> Tensor:
    """Each image mirrored left to right with probability one half."""
    _require_images(x)
    mirrored = torch.rand(len(x)) < 0.5
    return torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)


def crop_flip(x: Tensor) -> Tensor:
    """Each image shifted by up to four pixels either way, with zeros (black, in uint8) coming in,
    then `flip`.
    """
    _require_images(x)
    rows, _, height, width = x.shape
    framed = pad(x, (BORDER,) * 4)
    top, left = (torch.randint(2 * BORDER + 1, (rows, 1, 1, 1)).to(x.device) for _ in range(2))
    down = top + torch.arange(height, device=x.device)[:, None]
    right = left + torch.arange(width, device=x.device)
    row = torch.arange(rows, device=x.device)
    channel = torch.arange(x.shape[1], device=x.device)
    return flip(framed[row[:, None, None, None], channel[:, None, None], down, right])


def _require_images(x: object) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise BadData(f"this augment needs images [b, C, H, W], got rows of {got}")
